"""Errors say where, what, what was wanted and what to do; several come together."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leantune.core import errors
from leantune.core.errors import (
    ConfigError,
    DataError,
    DependencyError,
    LeantuneError,
    TargetError,
    describe,
    did_you_mean,
    raise_all,
    require,
)


def test_the_form() -> None:
    assert describe("a.yaml", "lr=x", "a number", "write lr: 1e-3") == "a.yaml: lr=x; a number; write lr: 1e-3"


def test_every_error_is_a_leantune_error() -> None:
    found = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, Exception)]
    assert len(found) >= 9
    assert all(issubclass(each, LeantuneError) for each in found)


@pytest.mark.parametrize("error", [ConfigError, TargetError])
def test_hosts_that_catch_value_errors_catch_ours(error: type[Exception]) -> None:
    assert issubclass(error, ValueError)


def test_nothing_is_raised_for_no_problem() -> None:
    raise_all([], DataError)


def test_one_problem_stands_alone() -> None:
    with pytest.raises(DataError, match=r"^row 3: empty$"):
        raise_all(["row 3: empty"], DataError)


def test_all_problems_are_told() -> None:
    with pytest.raises(DataError) as caught:
        raise_all(["row 3: empty", "row 5: no answer"], DataError)
    assert str(caught.value) == "2 problems:\n  - row 3: empty\n  - row 5: no answer"


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("down_prj", ["down_proj", "up_proj"], "did you mean 'down_proj'?"),
        ("xyz", ["lora", "s2ft"], "known: lora, s2ft"),
        ("xyz", [], "none is known"),
    ],
)
def test_near_names_are_suggested(name: str, known: list[str], expected: str) -> None:
    assert did_you_mean(name, known) == expected


@given(st.lists(st.text(min_size=1, max_size=8), max_size=6), st.text(max_size=8))
def test_a_suggestion_never_fails_and_names_what_is_known(known: list[str], name: str) -> None:
    said = did_you_mean(name, known)
    assert not known or any(each in said for each in known)


def test_a_package_that_is_there_passes() -> None:
    require("json", "train")


def test_a_missing_package_says_how_to_get_it() -> None:
    with pytest.raises(DependencyError, match=r"pip install 'leantune\[eval\]'"):
        require("a_package_that_nobody_wrote", "eval")
