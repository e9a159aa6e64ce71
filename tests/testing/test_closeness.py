"""The comparing functions themselves: each must refuse what is wrong, and must refuse to prove nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leantune.testing.closeness import (
    assert_close,
    assert_differs,
    assert_same,
    assert_same_state,
    tolerance,
)

TRUTH = torch.tensor([[1.0, -2.0], [3.0, 0.5]], dtype=torch.float64)


def close(actual: torch.Tensor, exact: torch.Tensor = TRUTH, **more: object) -> None:
    given_options = {"dtype": torch.float32, "k": 1.0, "depth": 4, **more}
    assert_close(actual, exact, **given_options)  # type: ignore[arg-type]


def test_the_bound() -> None:
    eps = torch.finfo(torch.float32).eps
    assert tolerance(TRUTH, torch.float32, 3.0, 4) == pytest.approx(6 * eps * (1 + 4 + 9 + 0.25) ** 0.5)


def test_what_is_within_the_bound_passes() -> None:
    close(TRUTH.clone())
    close(TRUTH.float())
    error = torch.zeros_like(TRUTH)
    error[0, 0] = 0.99 * tolerance(TRUTH, torch.float32, 1.0, 4)
    close(TRUTH + error)


@pytest.mark.parametrize(
    ("actual", "text"),
    [
        (TRUTH + 1e-6, "off by"),
        (torch.zeros_like(TRUTH), "off by"),
        (TRUTH / 2, "off by"),
        (-TRUTH, "off by"),
        (TRUTH.t(), "off by"),
        (TRUTH.flatten(), "shape"),
        (torch.full_like(TRUTH, float("nan")), "off by nan"),
        (torch.full_like(TRUTH, float("inf")), "off by inf"),
    ],
)
def test_what_is_off_is_refused(actual: torch.Tensor, text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        close(actual)


@pytest.mark.parametrize(
    ("exact", "more", "text"),
    [
        (torch.zeros(3, dtype=torch.float64), {}, "let zeros pass"),
        (torch.zeros(0, dtype=torch.float64), {}, "let zeros pass"),
        (TRUTH, {"dtype": torch.bfloat16, "k": 64}, "let zeros pass"),
        (TRUTH, {"dtype": torch.bfloat16, "k": 40}, "let half the truth pass"),
        (TRUTH, {"wrong": [TRUTH + 1e-9]}, "let wrong result 1 pass"),
        (TRUTH, {"wrong": [TRUTH + 1, TRUTH]}, "let wrong result 2 pass"),
        (TRUTH.float(), {}, "must be computed in float64"),
        (TRUTH * float("nan"), {}, "not finite"),
    ],
)
def test_a_comparison_that_proves_nothing_is_refused(exact: torch.Tensor, more: dict[str, object], text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        close(exact.clone(), exact, **more)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8).filter(lambda values: any(abs(v) > 1e-3 for v in values)))
def test_half_and_nothing_never_pass(values: list[float]) -> None:
    exact = torch.tensor(values, dtype=torch.float64)
    close(exact, exact)
    for wrong in (torch.zeros_like(exact), exact / 2, -exact, exact * 1.01):
        with pytest.raises(AssertionError):
            close(wrong, exact)


def test_same_means_the_same_bits() -> None:
    assert_same(TRUTH.clone(), TRUTH)
    other = TRUTH.clone()
    other[0, 0] = torch.nextafter(other[0, 0], torch.tensor(9.0, dtype=torch.float64))
    with pytest.raises(AssertionError, match="1 of 4 entries differ"):
        assert_same(other, TRUTH)
    with pytest.raises(AssertionError, match="float32"):
        assert_same(TRUTH.float(), TRUTH)
    with pytest.raises(AssertionError, match=r"\(4,\)"):
        assert_same(TRUTH.flatten(), TRUTH)


def test_differing_is_asked_for() -> None:
    assert_differs(TRUTH, TRUTH + 1)
    with pytest.raises(AssertionError, match="nothing changed"):
        assert_differs(TRUTH, TRUTH.clone())


def test_states() -> None:
    state = {"a": TRUTH, "b": TRUTH + 1}
    assert_same_state(dict(state), state)
    for wrong, text in (
        ({"a": TRUTH}, r"missing \['b'\]"),
        ({**state, "c": TRUTH}, r"unexpected \['c'\]"),
        ({"a": TRUTH, "b": TRUTH}, "state, b: 4 of 4 entries differ"),
    ):
        with pytest.raises(AssertionError, match=text):
            assert_same_state(wrong, state)
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_same_state({}, {})
