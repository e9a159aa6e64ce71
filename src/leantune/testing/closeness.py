"""Comparisons that raise, and that first prove of themselves that a wrong result would not pass.

A tolerance has a reason: each of ``depth`` roundings in a chain is an independent relative error of at most
``eps / 2``, so the error of the chain grows like ``sqrt(depth) * eps`` times the size of the result; ``k`` allows for
the constant that the kind of operation brings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def _norm(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value.double()))


def tolerance(exact64: Tensor, dtype: torch.dtype, k: float, depth: int) -> float:
    """``k * sqrt(depth) * eps(dtype) * ||exact64||``: how far, in Euclidean norm, a result in ``dtype`` may be off."""
    return k * math.sqrt(depth) * torch.finfo(dtype).eps * _norm(exact64)


def assert_close(
    actual: Tensor,
    exact64: Tensor,
    dtype: torch.dtype,
    k: float,
    depth: int,
    *,
    wrong: Iterable[Tensor] = (),
    what: str = "result",
) -> None:
    """Raise unless ``actual`` is ``exact64`` up to the roundings of ``depth`` operations in ``dtype``.

    Args:
        actual: what the code under test gave, of any floating dtype.
        exact64: the truth, in float64.
        dtype: the dtype that ``actual`` was computed in.
        k: constant of the bound, for the kind of operation.
        depth: how many roundings follow each other.
        wrong: results that a likely fault would give; the bound must reject each of them too.
        what: the name of the result in the message.

    Raises:
        AssertionError: ``actual`` is off; or the comparison could not have told zeros, half the truth, or one of
            ``wrong`` from the truth, and so proves nothing.
    """
    if exact64.dtype != torch.float64:
        raise AssertionError(f"{what}: the truth is {exact64.dtype}; it must be computed in float64")
    if actual.shape != exact64.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, wanted {tuple(exact64.shape)}")
    if not torch.isfinite(exact64).all():
        raise AssertionError(f"{what}: the truth is not finite")
    bound = tolerance(exact64, dtype, k, depth)
    faults = {"zeros": torch.zeros_like(exact64), "half the truth": exact64 / 2}
    faults.update({f"wrong result {number}": value for number, value in enumerate(wrong, 1)})
    for name, fault in faults.items():
        if _norm(fault.double() - exact64) <= bound:
            raise AssertionError(
                f"{what}: the bound {bound:.3g} would let {name} pass (norm of the truth {_norm(exact64):.3g}); "
                "the comparison proves nothing"
            )
    error = _norm(actual.detach().double() - exact64)
    # Written so that a NaN fails.
    if not error <= bound:
        raise AssertionError(f"{what}: off by {error:.3g} in norm, {bound:.3g} is allowed ({dtype}, depth {depth})")


def assert_same(actual: Tensor, expected: Tensor, what: str = "tensor") -> None:
    """Raise unless both are the same bit for bit, shape and dtype included."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise AssertionError(
            f"{what}: {actual.dtype} {tuple(actual.shape)}, wanted {expected.dtype} {tuple(expected.shape)}"
        )
    if not torch.equal(actual, expected):
        changed = int((actual != expected).sum())
        raise AssertionError(f"{what}: {changed} of {expected.numel()} entries differ; they must be the same bits")


def assert_differs(actual: Tensor, other: Tensor, what: str = "tensor") -> None:
    """Raise when both are the same: the step that should have made them different did nothing."""
    if torch.equal(actual, other):
        raise AssertionError(f"{what}: nothing changed")


def assert_same_state(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str = "state") -> None:
    """Raise unless two states have the same names with the same bits; an empty state proves nothing and raises too."""
    if not expected:
        raise AssertionError(f"{what}: nothing to compare")
    missing, extra = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    if missing or extra:
        raise AssertionError(f"{what}: missing {missing}, unexpected {extra}")
    for name, value in expected.items():
        assert_same(actual[name], value, f"{what}, {name}")
