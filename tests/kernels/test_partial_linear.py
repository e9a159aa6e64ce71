"""The kernel against its plain reference, its gradient against the dense one, and what it keeps for the backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from leantune.kernels.partial_linear import (
    Axis,
    Entries,
    add_slice,
    partial_linear,
    partial_linear_reference,
    pick,
)
from leantune.testing.closeness import assert_close, assert_differs, assert_same

OUT, IN = 7, 9
AXES: tuple[Axis, ...] = ("in", "out")


@dataclass
class Case:
    """Arguments of one call, in float64 unless said otherwise."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    delta: Tensor
    index: Entries
    axis: Axis

    def call(self, function: Any = partial_linear) -> Tensor:
        return function(self.x, self.weight, self.bias, self.delta, self.index, self.axis)


def make(
    axis: Axis,
    leading: tuple[int, ...] = (4,),
    count: int = 3,
    *,
    out: int = OUT,
    width: int = IN,
    bias: bool = True,
    run: bool = False,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    length = width if axis == "in" else out
    order = torch.randperm(length, generator=generator)[:count]
    first = int(order[0]) % (length - count + 1)
    return Case(
        x=noise(*leading, width).requires_grad_(),
        weight=noise(out, width),
        bias=noise(out) if bias else None,
        delta=noise(*((out, count) if axis == "in" else (count, width))).requires_grad_(),
        # Not sorted: nothing may depend on an order.
        index=slice(first, first + count) if run else order,
        axis=axis,
    )


def gradients(case: Case, function: Any = partial_linear, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the input, gradient of the delta, for a seeded gradient of the output."""
    y = case.call(function)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    grad_x, grad_delta = torch.autograd.grad(y, (case.x, case.delta), grad_y)
    return y.detach(), grad_x, grad_delta


def assert_equals_reference(case: Case) -> None:
    got, exact = gradients(case), gradients(case, partial_linear_reference)
    for name, value, truth in zip(("output", "gradient of x", "gradient of delta"), got, exact, strict=True):
        assert value.shape == truth.shape
        if truth.numel():
            torch.testing.assert_close(
                value, truth, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
            assert not case.x.numel() or truth.abs().max() > 1e-6, "the truth is zero; nothing was compared"


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_equals_the_reference_for_any_shape(data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from(AXES))
    leading = data.draw(st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)]))
    out, width = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    count = data.draw(st.integers(1, width if axis == "in" else out))
    bias, run = data.draw(st.booleans()), data.draw(st.booleans())
    seed = data.draw(st.integers(0, 1000))
    assert_equals_reference(make(axis, leading, count, out=out, width=width, bias=bias, run=run, seed=seed))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("run", [False, True])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_gradcheck(axis: Axis, run: bool, leading: tuple[int, ...]) -> None:
    case = make(axis, leading, run=run)
    assert gradcheck(
        lambda x, delta: partial_linear(x, case.weight, case.bias, delta, case.index, axis), (case.x, case.delta)
    )


@pytest.mark.parametrize("axis", AXES)
def test_gradient_is_the_slice_of_the_dense_gradient(axis: Axis) -> None:
    """With a zero delta, the gradient of the delta is the rows or columns S of the dense weight's gradient."""
    case = make(axis, (2, 5))
    with torch.no_grad():
        case.delta.zero_()
    _, grad_x, grad_delta = gradients(case)
    dense = case.weight.clone().requires_grad_()
    y = torch.nn.functional.linear(case.x, dense, case.bias)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact_x, exact_weight = torch.autograd.grad(y, (case.x, dense), grad_y)
    assert isinstance(case.index, Tensor)
    exact_slice = exact_weight.index_select(1 if axis == "in" else 0, case.index)
    torch.testing.assert_close(grad_delta, exact_slice, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad_x, exact_x, rtol=1e-10, atol=1e-10)
    others = exact_weight.index_select(1 if axis == "in" else 0, (case.index + 1) % (IN if axis == "in" else OUT))
    assert_differs(grad_delta, others, "the slice beside the chosen one")


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("run", [False, True])
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "transposed-3d", "channels"])
def test_any_memory_layout_of_the_input(axis: Axis, run: bool, layout: str) -> None:
    case = make(axis, (3, 4), run=run)
    noise = torch.randn(4, 4, 2 * IN, dtype=torch.float64)
    x = {
        "transposed": lambda: noise[0, :, :IN].t().contiguous().t(),
        "strided": lambda: noise[..., ::2],
        "expanded": lambda: noise[:1, :1, :IN].expand(3, 4, IN),
        "transposed-3d": lambda: noise[..., :IN].transpose(0, 1),
        "channels": lambda: noise[..., :IN].permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }[layout]()
    assert not x.is_contiguous()
    case.x = x.requires_grad_()
    assert_equals_reference(case)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided"])
def test_any_memory_layout_of_the_gradient(axis: Axis, layout: str) -> None:
    case = make(axis, (3, 4))
    shape = case.call().shape
    noise = torch.randn(4, 3, 2 * OUT, dtype=torch.float64)
    grad_y = {
        "expanded": lambda: torch.ones((), dtype=torch.float64).expand(shape),
        "transposed": lambda: noise[..., :OUT].transpose(0, 1),
        "strided": lambda: noise.transpose(0, 1)[..., ::2],
    }[layout]()
    assert not grad_y.is_contiguous()
    got = torch.autograd.grad(case.call(), (case.x, case.delta), grad_y)
    exact = torch.autograd.grad(case.call(partial_linear_reference), (case.x, case.delta), grad_y)
    for value, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", AXES)
def test_transposed_weight(axis: Axis) -> None:
    """The weight of ``Conv1D`` comes as a transposed view."""
    case = make(axis, (2, 3))
    plain = gradients(case)
    case.weight = case.weight.t().contiguous().t()
    assert not case.weight.is_contiguous()
    for value, truth in zip(gradients(case), plain, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("run", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_delta_beside_a_weight_of_16_bits(axis: Axis, run: bool, dtype: torch.dtype) -> None:
    """Two roundings: of the base's product and of the sum."""
    exact_case = make(axis, (2, 5), run=run)
    with torch.no_grad():
        for value in (exact_case.x, exact_case.weight, exact_case.bias):
            assert value is not None
            value.copy_(value.to(dtype))
        exact_case.delta.copy_(exact_case.delta.float())
    case = Case(
        exact_case.x.detach().to(dtype).requires_grad_(),
        exact_case.weight.to(dtype),
        None if exact_case.bias is None else exact_case.bias.to(dtype),
        exact_case.delta.detach().float().requires_grad_(),
        exact_case.index,
        axis,
    )
    y, exact = case.call(), exact_case.call()
    assert y.dtype == dtype
    grad_y = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    grad_x, grad_delta = torch.autograd.grad(y, (case.x, case.delta), grad_y)
    exact_x, exact_delta = torch.autograd.grad(exact, (exact_case.x, exact_case.delta), grad_y.double())
    without = torch.nn.functional.linear(exact_case.x, exact_case.weight, exact_case.bias).detach()
    assert (grad_x.dtype, grad_delta.dtype) == (dtype, torch.float32)
    assert_close(y, exact.detach(), dtype, 1, 2, wrong=(without,), what="output")
    wrong_x = (grad_y.double() @ exact_case.weight,)
    assert_close(grad_x, exact_x, dtype, 1, 2, wrong=wrong_x, what="gradient of x")
    # Formed in float32 throughout, from inputs of 16 bits that are exact there.
    assert_close(grad_delta, exact_delta, torch.float32, 4, 10, what="gradient of delta")


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_slice_finer_than_16_bits_is_seen_in_the_output(axis: Axis, dtype: torch.dtype) -> None:
    """Two entries of D that 16 bits cannot tell apart, inputs that cancel: the share is their difference, exactly."""
    fine = torch.finfo(dtype).eps / 8
    pair = torch.tensor([1 + fine, 1.0])
    x, weight = torch.zeros(1, 4, dtype=dtype), torch.zeros(3, 4, dtype=dtype)
    x[0, 0], x[0, 1] = 1, -1
    if axis == "in":
        delta, index, expected = pair.repeat(3, 1), torch.tensor([0, 1]), torch.full((1, 3), fine)
    else:
        delta, index, expected = torch.zeros(1, 4), torch.tensor([2]), torch.tensor([[0, 0, fine]])
        delta[0, :2] = pair
    assert_same(partial_linear(x, weight, None, delta, index, axis), expected.to(dtype), "output")


def _saved(case: Case) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = case.call()
    assert kept, "nothing was saved"
    y.sum().backward()
    return kept


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("run", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_columns_save_the_selected_part_of_the_input_alone(run: bool, transposed: bool) -> None:
    case = make("in", (6, 5), count=2, run=run)
    if transposed:
        case.weight = case.weight.t().contiguous().t()
    shared = {_storage(value) for value in (case.weight, case.delta)}
    if isinstance(case.index, Tensor):
        shared.add(_storage(case.index))
    own = [tensor for tensor in _saved(case) if _storage(tensor) not in shared]
    assert len(own) == 1, "one tensor of its own: the selected columns"
    # The storage, not the tensor: a view would have two columns and hold all nine.
    assert own[0].untyped_storage().nbytes() == 6 * 5 * 2 * own[0].element_size()
    assert _storage(own[0]) != _storage(case.x)


@pytest.mark.parametrize("run", [False, True])
def test_rows_save_the_input_itself(run: bool) -> None:
    case = make("out", (6, 5), count=2, run=run)
    shared = {_storage(value) for value in (case.x, case.weight, case.delta)}
    if isinstance(case.index, Tensor):
        shared.add(_storage(case.index))
    saved = _saved(case)
    assert {_storage(tensor) for tensor in saved} <= shared, "something was copied"
    assert _storage(case.x) in {_storage(tensor) for tensor in saved}


def test_16_bit_columns_are_saved_in_16_bits() -> None:
    case = make("in", (6, 5), count=2)
    case.x = case.x.detach().bfloat16().requires_grad_()
    case.weight, case.bias = case.weight.bfloat16(), None
    case.delta = case.delta.detach().float().requires_grad_()
    own = [tensor for tensor in _saved(case) if tensor.dtype == torch.bfloat16 and tensor.shape != case.weight.shape]
    assert [tensor.untyped_storage().nbytes() for tensor in own] == [6 * 5 * 2 * 2]


@pytest.mark.parametrize("axis", AXES)
def test_pick_copies(axis: Axis) -> None:
    x = torch.randn(4, IN)
    for entries in (slice(0, IN), slice(2, 5), torch.tensor([3, 1])):
        chosen = pick(x, entries)
        assert chosen.is_contiguous()
        assert _storage(chosen) != _storage(x)
        assert_same(chosen, x[:, entries])


@pytest.mark.parametrize("axis", AXES)
def test_input_without_gradient(axis: Axis) -> None:
    case = make(axis)
    _, _, expected = gradients(case)
    case.x = case.x.detach()
    y = case.call()
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad_delta,) = torch.autograd.grad(y, case.delta, grad_y)
    assert_same(grad_delta, expected)


@pytest.mark.parametrize("axis", AXES)
def test_frozen_delta_still_passes_the_gradient_on(axis: Axis) -> None:
    case = make(axis)
    _, expected, _ = gradients(case)
    case.delta = case.delta.detach()
    y = case.call()
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad_x,) = torch.autograd.grad(y, case.x, grad_y)
    assert_same(grad_x, expected)


@pytest.mark.parametrize("axis", AXES)
def test_a_second_derivative_is_refused(axis: Axis) -> None:
    case = make(axis)
    (grad_x,) = torch.autograd.grad(case.call().square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.sum().backward()


@pytest.mark.parametrize("axis", AXES)
def test_frozen_weight_gets_no_gradient_and_keeps_its_bits(axis: Axis) -> None:
    case = make(axis)
    before = case.weight.clone()
    x_before, delta_before = case.x.detach().clone(), case.delta.detach().clone()
    gradients(case)
    assert case.weight.grad is None
    assert_same(case.weight, before, "weight")
    assert_same(case.x.detach(), x_before, "x")
    assert_same(case.delta.detach(), delta_before, "delta")


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("run", [False, True])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)])
def test_add_slice_is_the_same_share(axis: Axis, run: bool, leading: tuple[int, ...]) -> None:
    """What is used over a base that is no dense matrix: base output first, the share by plain autograd."""
    case = make(axis, leading, run=run)

    def two_steps(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, index: Entries, axis: Axis) -> Tensor:
        return add_slice(torch.nn.functional.linear(x, weight, bias), x, delta, index, axis)

    for value, truth in zip(gradients(case, two_steps), gradients(case), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
