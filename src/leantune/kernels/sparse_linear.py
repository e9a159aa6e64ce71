r"""A linear layer of which single entries train: :math:`y = x (W + D)^T + b`, ``W`` frozen, ``D`` zero but at those.

With ``K`` chosen entries of ``W (out, in)``, their flat positions ``index`` (row times ``in`` plus column, sorted) and
their values ``v``::

    forward:    y = x W^T + b + x D^T                D[index] = v
    backward:   dx = dy (W + D)                      dv = (dy^T x)[index]

No dense trained copy of ``W`` exists, and no dense gradient: both products go one of two ways.

- *entries*: ``D`` as a CSR matrix, its products and the sampled ``dy^T x`` cost ``K`` multiplications a token. For a
  CPU whose torch has MKL, and few entries (:data:`MOST_ENTRIES` of the weight; measured in ``docs/spft.md``).
- *chunks*: a stretch of rows of ``D`` at a time (at most :data:`CHUNK_BYTES`) as a dense matrix, and in the backward
  a stretch of ``dy^T x`` from which the chosen entries are picked. Costs the time of full fine-tuning and one more
  product, but the memory of one stretch. For everything else: a GPU, many entries.

Over a base of 16 bits ``W + D`` would round small values away, so ``x D^T`` stays a product of its own: in float32 by
entries, in the base's dtype by chunks (as any mixed-precision training does it: ``v`` itself stays float32).

Source: unstructured sparse fine-tuning as S2FT (NeurIPS 2024), section 2 and appendix C, compares it: entries chosen
at random, a share p of all linear layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 8 << 20
"""The most that one stretch of rows takes."""

MOST_ENTRIES = 1 / 32
"""The share of a weight above which dense stretches are faster than a CSR matrix."""


def index_dtype(out: int, width: int) -> torch.dtype:
    """The narrowest integers that the flat positions of an ``(out, width)`` weight fit into."""
    return torch.int32 if out * width <= torch.iinfo(torch.int32).max else torch.int64


def scatter(values: Tensor, index: Tensor, out: int, width: int) -> Tensor:
    """``D``, dense ``(out, width)``: for references, merging and export, never for training."""
    return values.new_zeros(out * width).index_add(0, index, values).view(out, width)


def sparse_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    """The same function the plain way: a dense ``W + D``, then one linear, whose weight gradient is dense.

    Args and result as :func:`sparse_linear`; every tensor in one dtype.
    """
    return F.linear(x, weight + scatter(values, index, *weight.shape), bias)


def by_entries(out: int, width: int, count: int, device: torch.device) -> bool:
    """Whether the CSR way is the faster one there, and exists: without MKL torch has no such products on a CPU."""
    return device.type == "cpu" and torch.backends.mkl.is_available() and count <= MOST_ENTRIES * out * width


@cache
def _announced() -> None:
    # torch says once a process that CSR is in beta.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


def _csr(values: Tensor, index: Tensor, out: int, width: int) -> Tensor:
    _announced()
    starts = torch.arange(out + 1, dtype=torch.int64, device=index.device) * width
    first = torch.searchsorted(index.long(), starts).to(index.dtype)
    return torch.sparse_csr_tensor(first, index % width, values, (out, width), check_invariants=False)


def _turned(product: Tensor) -> Tensor:
    # Copied first: an addition of a transposed matrix takes several times as long.
    return product.t().contiguous()


def _stretches(index: Tensor, out: int, width: int, itemsize: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Stretches of rows: the rows, their entries, and where these stand in the flat stretch (int64)."""
    step = max(1, CHUNK_BYTES // (width * itemsize))
    firsts = [*range(0, out, step), out]
    limits = torch.tensor([first * width for first in firsts], dtype=index.dtype, device=index.device)
    ends = torch.searchsorted(index, limits).tolist()
    for number, first in enumerate(firsts[:-1]):
        entries = slice(ends[number], ends[number + 1])
        yield slice(first, firsts[number + 1]), entries, index[entries].long() - first * width


def _stretch(weight: Tensor | None, width: int, rows: slice, values: Tensor, local: Tensor) -> Tensor:
    """Rows of ``W + D``, dense; without a weight those of ``D``."""
    if weight is None:
        dense = values.new_zeros(rows.stop - rows.start, width)
    else:
        # A copy in the plain layout, whatever that of the weight.
        dense = weight[rows].clone(memory_format=torch.contiguous_format)
    dense.view(-1).index_add_(0, local, values)
    return dense


class _SparseLinear(torch.autograd.Function):
    """See :func:`sparse_linear`. Rows of ``x`` are flattened to ``(n, in)``; without a weight it is ``x D^T`` alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, values: Tensor, index: Tensor, out: int
    ) -> Tensor:
        rows, width = x.reshape(-1, x.shape[-1]), x.shape[-1]
        ctx.save_for_backward(x, weight, values, index)
        ctx.out = out
        if by_entries(out, width, values.numel(), x.device):
            wide = rows.to(values.dtype)
            share = _turned(torch.sparse.mm(_csr(values, index, out, width), wide.t()))
            y = share if weight is None else F.linear(rows, weight, bias).add_(share)
            return y.view(*x.shape[:-1], out)
        y = rows.new_zeros(len(rows), out) if weight is None else F.linear(rows, weight, bias)
        for part, entries, local in _stretches(index, out, width, rows.element_size()):
            # Apart from W here: W + D in stretches would not be W x to the bit while D is zero.
            if local.numel():
                dense = _stretch(None, width, part, values[entries].to(rows.dtype), local)
                y[:, part].addmm_(rows, dense.t())
        return y.view(*x.shape[:-1], out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, values, index = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, ctx.out)
        with torch.autocast(x.device.type, enabled=False):
            if by_entries(ctx.out, x.shape[-1], values.numel(), x.device):
                grad_x, grad_values = _backward_by_entries(ctx, rows, grad_rows, weight, values, index)
            else:
                grad_x, grad_values = _backward_by_chunks(ctx, rows, grad_rows, weight, values, index)
        return None if grad_x is None else grad_x.view(x.shape), None, None, grad_values, None, None


Gradients = tuple[Tensor | None, Tensor | None]


def _backward_by_entries(
    ctx: Any, x: Tensor, grad_y: Tensor, weight: Tensor | None, values: Tensor, index: Tensor
) -> Gradients:
    grad_x = grad_values = None
    matrix = _csr(values, index, ctx.out, x.shape[-1])
    wide = grad_y.to(values.dtype)
    if ctx.needs_input_grad[0]:
        share = _turned(torch.sparse.mm(matrix.t(), wide.t()))
        grad_x = share.to(x.dtype) if weight is None else (grad_y @ weight).add_(share)
    if ctx.needs_input_grad[3]:
        blank = torch.sparse_csr_tensor(
            matrix.crow_indices(), matrix.col_indices(), torch.zeros_like(values), matrix.shape, check_invariants=False
        )
        # Only the chosen entries of the product are formed.
        grad_values = torch.sparse.sampled_addmm(blank, wide.t(), x.to(values.dtype)).values()
    return grad_x, grad_values


def _backward_by_chunks(
    ctx: Any, x: Tensor, grad_y: Tensor, weight: Tensor | None, values: Tensor, index: Tensor
) -> Gradients:
    joined = weight if weight is not None and weight.dtype == values.dtype else None
    grad_x = None
    if ctx.needs_input_grad[0]:
        if weight is not None and joined is None:
            grad_x = grad_y @ weight
        else:
            grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    grad_values = torch.zeros_like(values) if ctx.needs_input_grad[3] else None
    grad_y = grad_y.to(x.dtype)
    for part, entries, local in _stretches(index, ctx.out, x.shape[-1], x.element_size()):
        if joined is None and not local.numel():
            continue
        if grad_x is not None:
            dense = _stretch(joined, x.shape[-1], part, values[entries].to(x.dtype), local)
            grad_x.addmm_(grad_y[:, part], dense)
        if grad_values is not None and local.numel():
            # The dense gradient of this stretch, dropped before the next one is formed.
            grad_values[entries] = (grad_y[:, part].t() @ x).view(-1)[local].to(values.dtype)
    return grad_x, grad_values


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
    r"""``x (W + D)^T + b`` with a frozen ``W`` and trained entries ``v`` beside it; the backward keeps theirs alone.

    Args:
        x: ``(..., in)``, in the dtype of ``weight``.
        weight: ``(out, in)``, frozen.
        bias: ``(out,)`` or None, frozen.
        values: ``(K,)`` the entries of ``D``; float32 beside a bfloat16 weight is the usual case.
        index: ``(K,)`` their distinct flat positions, ascending, of :func:`index_dtype`.

    Returns:
        ``(..., out)`` in the dtype of ``weight``. Saved for backward: ``x`` itself; everything else is shared.
    """
    return _SparseLinear.apply(x, weight, bias, values, index, weight.shape[0])


def add_entries(result: Tensor, x: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """``result + x D^T``, for a base that is no dense matrix of ``x``'s dtype (packed, hooked, under autocast).

    Args:
        result: what the base layer returned, ``(..., out)``, any floating dtype.
        x: input of the layer, ``(..., in)``.
        values: ``(K,)`` the entries of ``D``.
        index: ``(K,)`` their flat positions.

    Returns:
        ``(..., out)`` in the dtype of ``result``.
    """
    with torch.autocast(x.device.type, enabled=False):
        share = _SparseLinear.apply(x, None, None, values, index, result.shape[-1])
    return result + share.to(result.dtype)
