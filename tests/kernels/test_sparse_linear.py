"""The kernel against its plain reference by both ways, its gradient against the dense one, and what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from leantune.kernels import sparse_linear as kernel
from leantune.kernels.sparse_linear import add_entries, index_dtype, scatter, sparse_linear, sparse_linear_reference
from leantune.testing.closeness import assert_close, assert_differs, assert_same

OUT, IN = 7, 9
WAYS = ("entries", "chunks", "one chunk")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By entries; by chunks of two rows, the last one short; by one chunk."""
    if request.param == "entries" and not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL, and so no CSR products on a CPU")
    monkeypatch.setattr(kernel, "MOST_ENTRIES", 1.0 if request.param == "entries" else 0.0)
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 2 * IN * 8 if request.param == "chunks" else 8 << 20)
    return str(request.param)


@dataclass
class Case:
    """Arguments of one call, in float64 unless said otherwise."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    values: Tensor
    index: Tensor

    def call(self, function: Any = sparse_linear) -> Tensor:
        return function(self.x, self.weight, self.bias, self.values, self.index)


def make(
    leading: tuple[int, ...] = (4,),
    count: int = 11,
    *,
    out: int = OUT,
    width: int = IN,
    bias: bool = True,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    order = torch.randperm(out * width, generator=generator)[:count]
    return Case(
        x=noise(*leading, width).requires_grad_(),
        weight=noise(out, width),
        bias=noise(out) if bias else None,
        values=noise(count).requires_grad_(),
        index=order.sort().values.to(index_dtype(out, width)),
    )


def gradients(case: Case, function: Any = sparse_linear, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the input, gradient of the values, for a seeded gradient of the output."""
    y = case.call(function)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    grad_x, grad_values = torch.autograd.grad(y, (case.x, case.values), grad_y)
    return y.detach(), grad_x, grad_values


def assert_equals_reference(case: Case, function: Any = sparse_linear) -> None:
    got, exact = gradients(case, function), gradients(case, sparse_linear_reference)
    for name, value, truth in zip(("output", "gradient of x", "gradient of the values"), got, exact, strict=True):
        assert value.shape == truth.shape
        if truth.numel():
            torch.testing.assert_close(
                value, truth, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
            assert not case.x.numel() or truth.abs().max() > 1e-9, "the truth is zero; nothing was compared"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_the_reference_for_any_shape(way: str, data: st.DataObject) -> None:
    leading = data.draw(st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)]))
    out, width = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    count = data.draw(st.integers(1, out * width))
    case = make(leading, count, out=out, width=width, bias=data.draw(st.booleans()), seed=data.draw(st.integers(0, 99)))
    assert_equals_reference(case)
    assert_equals_reference(case, _two_steps)


def _two_steps(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    """What is used over a base that is no dense matrix: the base's output first, then the share."""
    return add_entries(torch.nn.functional.linear(x, weight, bias), x, values, index)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_gradcheck(way: str, leading: tuple[int, ...]) -> None:
    case = make(leading)
    assert gradcheck(
        lambda x, values: sparse_linear(x, case.weight, case.bias, values, case.index), (case.x, case.values)
    )


def test_gradient_is_the_chosen_part_of_the_dense_gradient(way: str) -> None:
    case = make((2, 5))
    with torch.no_grad():
        case.values.zero_()
    _, grad_x, grad_values = gradients(case)
    dense = case.weight.clone().requires_grad_()
    y = torch.nn.functional.linear(case.x, dense, case.bias)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact_x, exact_weight = torch.autograd.grad(y, (case.x, dense), grad_y)
    torch.testing.assert_close(grad_values, exact_weight.flatten()[case.index], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad_x, exact_x, rtol=1e-10, atol=1e-10)
    assert_differs(grad_values, exact_weight.t().flatten()[case.index], "the entries of the transposed gradient")


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "transposed-3d"])
def test_any_memory_layout(way: str, layout: str) -> None:
    case = make((3, 4))
    noise = torch.randn(4, 4, 2 * IN, dtype=torch.float64)
    x = {
        "transposed": lambda: noise[0, :, :IN].t().contiguous().t(),
        "strided": lambda: noise[..., ::2],
        "expanded": lambda: noise[:1, :1, :IN].expand(3, 4, IN),
        "transposed-3d": lambda: noise[..., :IN].transpose(0, 1),
    }[layout]()
    assert not x.is_contiguous()
    case.x = x.requires_grad_()
    case.weight = case.weight.t().contiguous().t()
    assert_equals_reference(case)
    y, exact = case.call(), case.call(sparse_linear_reference)
    for grad_y in (torch.ones((), dtype=torch.float64).expand(y.shape), torch.rand_like(y.mT.contiguous()).mT):
        got = torch.autograd.grad(y, (case.x, case.values), grad_y, retain_graph=True)
        wanted = torch.autograd.grad(exact, (case.x, case.values), grad_y, retain_graph=True)
        for value, truth in zip(got, wanted, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("two_steps", [False, True])
def test_float32_values_beside_a_weight_of_16_bits(way: str, dtype: torch.dtype, two_steps: bool) -> None:
    exact_case = make((2, 5))
    with torch.no_grad():
        for value in (exact_case.x, exact_case.weight, exact_case.bias):
            assert value is not None
            value.copy_(value.to(dtype))
    case = Case(
        exact_case.x.detach().to(dtype).requires_grad_(),
        exact_case.weight.to(dtype),
        None if exact_case.bias is None else exact_case.bias.to(dtype),
        exact_case.values.detach().float().requires_grad_(),
        exact_case.index,
    )
    y, exact = case.call(_two_steps if two_steps else sparse_linear), exact_case.call(sparse_linear_reference)
    grad_y = torch.randn(y.shape, dtype=torch.float64).to(dtype)
    grad_x, grad_values = torch.autograd.grad(y, (case.x, case.values), grad_y)
    exact_x, exact_values = torch.autograd.grad(exact, (exact_case.x, exact_case.values), grad_y.double())
    assert (y.dtype, grad_x.dtype, grad_values.dtype) == (dtype, dtype, torch.float32)
    without = torch.nn.functional.linear(exact_case.x, exact_case.weight, exact_case.bias).detach()
    # Roundings: of the base's product, of the values, of their product, of the sum.
    assert_close(y, exact.detach(), dtype, 1, 4, wrong=(without,), what="output")
    assert_close(grad_x, exact_x, dtype, 1, 4, wrong=(grad_y.double() @ exact_case.weight,), what="gradient of x")
    # By entries in float32 throughout; by chunks one rounding of each sum.
    formed = torch.float32 if way == "entries" else dtype
    assert_close(grad_values, exact_values, formed, 4 if way == "entries" else 1, 10, what="gradient of the values")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_that_the_weight_would_round_away_are_seen(way: str, dtype: torch.dtype) -> None:
    """A value below half a unit in the last place of its weight, where the base's share cancels."""
    tiny = torch.finfo(dtype).eps / 16
    weight, x = torch.ones(3, 2, dtype=dtype), torch.tensor([[1.0, -1.0]], dtype=dtype)
    values, index = torch.tensor([tiny]), torch.tensor([2], dtype=torch.int32)
    assert_same(sparse_linear(x, weight, None, values, index), torch.tensor([[0, tiny, 0]], dtype=dtype), "output")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _saved(case: Case) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = case.call()
    y.sum().backward()
    return kept


def test_nothing_is_kept_but_the_input(way: str) -> None:
    case = make((6, 5))
    kept = {_storage(tensor) for tensor in _saved(case)}
    assert kept == {_storage(value) for value in (case.x, case.weight, case.values, case.index)}


def test_no_dense_gradient_is_alive_beyond_a_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest product of a backward by chunks is a stretch of rows; by entries none of the weight's size is."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            # Views of the weight are not memory of their own; a CSR matrix has no dense storage.
            if isinstance(result, Tensor) and result.layout == torch.strided and _storage(result) != weight:
                self.seen.append(result.numel())
            return result

    out, width, n = 64, 32, 2
    case = make((n,), count=20, out=out, width=width)
    weight = _storage(case.weight)
    for entries in (False, True):
        if entries and not torch.backends.mkl.is_available():
            continue
        monkeypatch.setattr(kernel, "MOST_ENTRIES", 1.0 if entries else 0.0)
        monkeypatch.setattr(kernel, "CHUNK_BYTES", 4 * width * 8)
        with Sizes() as sizes:
            gradients(case)
        assert max(sizes.seen) < out * width / 4, f"entries={entries}"
        assert max(sizes.seen) >= n * out


def test_input_without_gradient_and_frozen_values(way: str) -> None:
    case = make()
    _, expected_x, expected = gradients(case)
    grad_y = torch.randn(4, OUT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, values = case.x, case.values
    case.x = x.detach()
    assert_same(torch.autograd.grad(case.call(), values, grad_y)[0], expected)
    case.x, case.values = x, values.detach()
    assert_same(torch.autograd.grad(case.call(), x, grad_y)[0], expected_x)


def test_a_second_derivative_is_refused(way: str) -> None:
    case = make()
    (grad_x,) = torch.autograd.grad(case.call().square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.sum().backward()


def test_frozen_tensors_keep_their_bits(way: str) -> None:
    case = make()
    before = [value.detach().clone() for value in (case.x, case.weight, case.values, case.index)]
    gradients(case)
    for value, old in zip((case.x, case.weight, case.values, case.index), before, strict=True):
        assert_same(value.detach(), old)
    assert case.weight.grad is None


def test_zero_values_leave_the_base_bit_for_bit(way: str) -> None:
    case = make((5,))
    with torch.no_grad():
        case.values.zero_()
    assert_same(case.call().detach(), torch.nn.functional.linear(case.x, case.weight, case.bias).detach())


def test_under_autocast_the_share_is_formed_in_its_own_dtype(way: str) -> None:
    case = make((5,))
    plain = _two_steps(*vars(case).values()).detach()
    with torch.autocast("cpu", torch.bfloat16):
        share = add_entries(torch.zeros(5, OUT, dtype=torch.float64), case.x, case.values, case.index)
    base = torch.nn.functional.linear(case.x, case.weight, case.bias).detach()
    assert_close(share.detach() + base, plain, torch.float64, 4, 4, what="share under autocast")


def test_positions_are_as_narrow_as_they_can_be() -> None:
    assert index_dtype(4096, 14336) == torch.int32
    assert index_dtype(1 << 16, 1 << 15) == torch.int64
    assert index_dtype(1, (1 << 31) - 1) == torch.int32


def test_scatter_is_the_dense_delta() -> None:
    case = make(count=3)
    dense = scatter(case.values.detach(), case.index, OUT, IN)
    rows, columns = case.index // IN, case.index % IN
    assert_same(dense[rows, columns], case.values.detach())
    assert int((dense != 0).sum()) == 3
