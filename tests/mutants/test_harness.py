"""The harness that plants faults, on a project of three lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from harness import Fault, HarnessError, Project, check, judge, run
from mutant import FAULTS
from run import PROJECT

CODE = '''"""Adds."""


def add(one, two):
    return one + two  # the sum
'''

TEST = """from tiny.sums import add


def test_add():
    assert add(2, 3) == 5
"""

SIGN = Fault("sign", "tiny/sums.py", "one + two", "one - two", "sums are differences", ("test_sums.py",))


@pytest.fixture
def tiny(tmp_path: Path) -> Project:
    """A project with one function and one test."""
    package = tmp_path / "src" / "tiny"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "sums.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "test_sums.py").write_text(TEST, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    return Project(root=tmp_path, source=tmp_path / "src", package="tiny")


def test_a_fault_is_caught_and_the_source_untouched(tiny: Project) -> None:
    verdicts = run(tiny, [SIGN])
    assert [(each.state, each.detail) for each in verdicts] == [("caught", "test_sums.py::test_add")]
    assert (tiny.source / "tiny" / "sums.py").read_text(encoding="utf-8") == CODE


def test_a_harmless_change_is_reported_as_survived(tiny: Project) -> None:
    harmless = replace(SIGN, name="comment", old="# the sum", new="# the total")
    states = {each.fault.name: each.state for each in run(tiny, [SIGN, harmless], jobs=2)}
    assert states == {"sign": "caught", "comment": "survived"}


def test_a_fault_that_breaks_the_import_is_no_catch(tiny: Project) -> None:
    verdict = judge(tiny, replace(SIGN, old="def add", new="def ad d"))
    assert verdict.state == "error"
    assert "without a failing test" in verdict.detail


def test_a_fault_out_of_step_with_the_code_is_an_error(tiny: Project) -> None:
    out_of_step = [
        replace(SIGN, name="gone", old="one * two"),
        replace(SIGN, name="twice", old="two"),
        replace(SIGN, name="moved", file="tiny/products.py"),
        replace(SIGN, name="idle", new=SIGN.old),
        replace(SIGN, name="untested", tests=("test_products.py",)),
    ]
    with pytest.raises(HarnessError) as caught:
        check(tiny, [*out_of_step, SIGN, SIGN])
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["sign", "gone", "twice", "moved", "idle", "untested"]
    assert "stands 0 times" in lines[1]


def test_a_suite_that_is_red_without_a_fault_proves_nothing(tiny: Project) -> None:
    (tiny.root / "test_sums.py").write_text(TEST.replace("== 5", "== 6"), encoding="utf-8")
    with pytest.raises(HarnessError, match="the sound code is not green"):
        run(tiny, [SIGN])


def test_another_copy_on_the_path_is_noticed(tiny: Project) -> None:
    with pytest.raises(HarnessError, match="not from the copy"):
        run(replace(tiny, package="json"), [SIGN])


def test_the_planted_faults_are_in_step_with_the_code() -> None:
    check(PROJECT, FAULTS)
    assert len(FAULTS) >= 80
