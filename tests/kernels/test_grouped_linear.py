"""The grouped kernel against its plain reference, its gradients, what it keeps, and what an absent group gets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from leantune.kernels.grouped_linear import RowGroups, add_grouped, grouped_linear, grouped_linear_reference
from leantune.testing.closeness import assert_close, assert_same

OUT, IN, RANK = 7, 9, 3
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Arguments of one call, in float64 unless said otherwise."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    shared: Tensor
    factors: tuple[Tensor, ...]
    scaling: tuple[float, ...]
    groups: RowGroups

    def call(self, function: Any = grouped_linear) -> Tensor:
        return function(self.x, self.weight, self.bias, self.shared, self.factors, self.scaling, self.groups)


def make(
    assignment: list[int | None],
    count: int,
    middle: tuple[int, ...] = (2,),
    *,
    out: int = OUT,
    width: int = IN,
    rank: int = RANK,
    bias: bool = True,
    trains: bool = False,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Case(
        x=noise(len(assignment), *middle, width).requires_grad_(),
        weight=noise(out, width),
        bias=noise(out) if bias else None,
        shared=noise(rank, width).requires_grad_(trains),
        factors=tuple(noise(out, rank).requires_grad_() for _ in range(count)),
        # All different: a scale applied to another group's rows must show.
        scaling=tuple(0.5 + 0.75 * number for number in range(count)),
        groups=RowGroups.of(assignment, count, CPU),
    )


def add_to_base(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shared: Tensor,
    factors: Any,
    scaling: Any,
    groups: RowGroups,
) -> Tensor:
    """What is used over a base that is no dense matrix: base output first, the share by plain autograd."""
    return add_grouped(F.linear(x, weight, bias), x, shared, factors, scaling, groups)


def gradients(case: Case, function: Any = grouped_linear) -> list[Tensor | None]:
    """Output, then the gradients of x, A (where it trains) and every B, for a seeded gradient of the output."""
    y = case.call(function)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    wanted = [case.x, *([case.shared] if case.shared.requires_grad else []), *case.factors]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad_y, allow_unused=True)]


def assert_equals_reference(case: Case, function: Any = grouped_linear) -> None:
    got, exact = gradients(case, function), gradients(case, grouped_linear_reference)
    absent = [size == 0 for size in case.groups.sizes]
    for position, (value, truth) in enumerate(zip(got, exact, strict=True)):
        factor = position - (len(got) - len(absent))
        if factor >= 0 and absent[factor]:
            assert value is None, "a group without rows got a gradient"
        elif truth is None:
            assert value is None or not value.any()
        else:
            assert value is not None
            torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-11)
            assert not case.x.numel() or truth.abs().max() > 1e-6, "the truth is zero; nothing was compared"


@pytest.mark.parametrize("function", [grouped_linear, add_to_base])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_the_reference_for_any_grouping(function: Any, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    # None is a row of no group; a group that nobody draws is empty.
    assignment = data.draw(st.lists(st.none() | st.integers(0, count - 1), min_size=1, max_size=6))
    if all(each is None for each in assignment):
        assignment[0] = 0
    case = make(
        assignment,
        count,
        data.draw(st.sampled_from([(), (1,), (3,), (2, 2)])),
        out=data.draw(st.integers(1, 8)),
        width=data.draw(st.integers(1, 8)),
        rank=data.draw(st.integers(1, 4)),
        bias=data.draw(st.booleans()),
        trains=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 1000)),
    )
    assert_equals_reference(case, function)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("assignment", [[0, 0], [1, 0, None, 1], [2, None], [0]])
def test_gradcheck(assignment: list[int | None], trains: bool) -> None:
    case = make(assignment, 3, trains=trains)
    present = [factor for factor, size in zip(case.factors, case.groups.sizes, strict=True) if size]
    given = (case.x, *([case.shared] if trains else []), *present)
    assert gradcheck(lambda *_: case.call(), given)


def test_rows_are_grouped_by_what_they_name() -> None:
    groups = RowGroups.of([1, None, 0, 1], 3, CPU)
    assert groups.sizes == (1, 2, 0)
    assert groups.order is not None
    assert groups.order.tolist() == [2, 0, 3]
    assert RowGroups.of([0, 0, 2], 3, CPU) == RowGroups((2, 0, 1))
    # Sorted, but the last row belongs to nobody.
    assert RowGroups.of([0, None], 1, CPU).order is not None
    assert RowGroups.of([None], 1, CPU).sizes == (0,)


@pytest.mark.parametrize("function", [grouped_linear, add_to_base])
def test_each_row_is_what_it_is_alone(function: Any) -> None:
    """Bit for bit is more than a blocked matrix product promises; so to rounding, and against its neighbours' B."""
    case = make([1, 0, None, 1, 2], 3)
    together = case.call(function).detach()
    for row, group in enumerate([1, 0, None, 1, 2]):
        alone = replace(case, x=case.x[row : row + 1], groups=RowGroups.of([group], 3, CPU)).call(function).detach()
        others = [
            replace(case, x=case.x[row : row + 1], groups=RowGroups.of([other], 3, CPU)).call(function).detach()
            for other in (0, 1, 2, None)
            if other != group
        ]
        assert_close(together[row : row + 1], alone, torch.float64, 4, IN, wrong=others, what=f"row {row}")


@pytest.mark.parametrize("function", [grouped_linear, add_to_base])
def test_a_row_of_no_group_is_the_base_to_the_bit(function: Any) -> None:
    case = make([None, 0, None], 1)
    base = F.linear(case.x, case.weight, case.bias)
    y = case.call(function)
    assert_same(y[[0, 2]].detach(), base[[0, 2]].detach(), "rows of no group")
    assert (y[1] - base[1]).abs().max() > 0.1


@pytest.mark.parametrize("function", [grouped_linear, add_to_base])
def test_an_absent_group_takes_no_optimizer_step(function: Any) -> None:
    """AdamW with momentum and weight decay: zeros as a gradient would move it, None does not."""
    case = make([0, 1], 2)
    optimizer = torch.optim.AdamW(case.factors, lr=0.1, weight_decay=0.5)
    case.call(function).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = [factor.detach().clone() for factor in case.factors]
    absent = replace(case, groups=RowGroups.of([0, 0], 2, CPU))
    absent.call(function).square().sum().backward()
    assert case.factors[1].grad is None
    optimizer.step()
    assert_same(case.factors[1].detach(), before[1], "the absent factor")
    assert not torch.equal(case.factors[0], before[0])


def test_a_projection_that_trains_gets_the_sum_over_the_groups() -> None:
    """Claim 4.2 of the paper, on one layer."""
    case = make([0, 1, 1, 2], 3, trains=True)
    grad_y = torch.randn(4, 2, OUT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (together,) = torch.autograd.grad(case.call(), case.shared, grad_y)
    alone = []
    for group in range(3):
        rows = [row for row, own in enumerate([0, 1, 1, 2]) if own == group]
        part = replace(case, x=case.x[rows], groups=RowGroups.of([group] * len(rows), 3, CPU))
        alone += torch.autograd.grad(part.call(), case.shared, grad_y[rows])
    exact = torch.stack(alone).sum(0)
    assert_close(together, exact, torch.float64, 8, 8, wrong=[exact / 3, *alone], what="gradient of A")


def _saved(call: Any) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call().sum().backward()
    return kept


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("assignment", [[0, 0, 1, 1], [1, None, 0, 1]])
@pytest.mark.parametrize("function", [grouped_linear, add_to_base])
def test_of_the_input_only_the_product_with_a_is_kept(function: Any, assignment: list[int | None]) -> None:
    case = make(assignment, 2, middle=(5,))
    order = [] if case.groups.order is None else [case.groups.order]
    given = {_storage(value) for value in (case.weight, case.shared, *case.factors, *order)}
    own = {_storage(tensor): tensor for tensor in _saved(lambda: case.call(function)) if _storage(tensor) not in given}
    rows = sum(case.groups.sizes)
    floating = [tensor.untyped_storage().nbytes() for tensor in own.values() if tensor.is_floating_point()]
    # Storages, not tensors: a view would hold what it is a view of.
    assert sum(floating) == rows * 5 * RANK * 8
    assert _storage(case.x) not in own


def test_the_input_is_kept_where_a_trains() -> None:
    case = make([0, 1], 2, trains=True)
    assert _storage(case.x) in {_storage(tensor) for tensor in _saved(case.call)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_factors_beside_a_weight_of_16_bits(dtype: torch.dtype) -> None:
    """Two roundings: of the base's product and of the sum; gradients of B are formed in float32."""
    exact_case = make([1, 0, None], 2)
    with torch.no_grad():
        for value in (exact_case.x, exact_case.weight, exact_case.bias):
            assert value is not None
            value.copy_(value.to(dtype))
        for value in (exact_case.shared, *exact_case.factors):
            value.copy_(value.float())
    case = replace(
        exact_case,
        x=exact_case.x.detach().to(dtype).requires_grad_(),
        weight=exact_case.weight.to(dtype),
        bias=exact_case.bias.to(dtype) if exact_case.bias is not None else None,
        shared=exact_case.shared.float(),
        factors=tuple(factor.detach().float().requires_grad_() for factor in exact_case.factors),
    )
    y, exact = case.call(), exact_case.call(grouped_linear_reference)
    assert y.dtype == dtype
    assert_close(y, exact.detach(), dtype, 1, 2, what="output")
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    got = torch.autograd.grad(y, (case.x, *case.factors), grad_y)
    truth = torch.autograd.grad(exact, (exact_case.x, *exact_case.factors), grad_y.double())
    assert [value.dtype for value in got] == [dtype, torch.float32, torch.float32]
    assert_close(got[0], truth[0], dtype, 1, 2, what="gradient of x")
    for value, true in zip(got[1:], truth[1:], strict=True):
        assert_close(value, true, torch.float32, 4, 10, what="gradient of B")


@pytest.mark.parametrize("function", [grouped_linear, add_to_base])
@pytest.mark.parametrize("assignment", [[0, 0], [None, 0]])
def test_a_share_finer_than_16_bits_is_seen_in_the_output(function: Any, assignment: list[int | None]) -> None:
    """A base of -1 and a share a little above 1, which 16 bits cannot tell from 1: the sum is the difference."""
    fine = torch.finfo(torch.bfloat16).eps / 8
    x, weight = torch.ones(2, 1, dtype=torch.bfloat16), torch.full((1, 1), -1.0, dtype=torch.bfloat16)
    factor = torch.full((1, 1), 1 + fine)
    y = function(x, weight, None, torch.ones(1, 1), (factor,), (1.0,), RowGroups.of(assignment, 1, CPU))
    assert_same(y[1], torch.full((1,), fine, dtype=torch.bfloat16), "output")


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_any_memory_layout(layout: str) -> None:
    case = make([1, 0, 1], 2, middle=(3,))
    noise = torch.randn(3, 3, 2 * IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = {
        "transposed": lambda: noise[..., :IN].transpose(0, 1),
        "strided": lambda: noise[..., ::2],
        "expanded": lambda: noise[:1, :1, :IN].expand(3, 3, IN),
    }[layout]()
    assert not x.is_contiguous()
    # As Conv1D's weight comes.
    weight = case.weight.t().contiguous().t()
    assert_equals_reference(replace(case, x=x.detach().requires_grad_(), weight=weight))


def test_a_second_derivative_is_refused() -> None:
    case = make([0, 1], 2)
    (grad_x,) = torch.autograd.grad(case.call().square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.sum().backward()
