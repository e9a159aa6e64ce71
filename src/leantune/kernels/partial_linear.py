r"""A linear layer of which only a slice trains: :math:`y = x W^T + b` with :math:`W` frozen but for rows or columns.

With :math:`S` the chosen entries (``|S| = s``) and :math:`D` the delta of the slice::

    axis "in":   y = x W^T + b + x[S] D^T          D (out, s): input columns S
    axis "out":  y = x W^T + b;  y[S] += x D^T     D (s, in):  output rows S

Backward forms the gradient of the input and of the slice, nothing else. On axis "in" it needs ``x[S]`` alone, saved
as a copy: a view would keep the whole activation alive, which is the saving lost. On axis "out" the gradient of a row
needs all of ``x``, which is saved as it is, once for every layer that reads it.

Source: S2FT (NeurIPS 2024), section 3.3, "Partial Back-propagation Algorithm". There the slice is written into ``W``;
here it stays beside it, so that a reference forward, a second forward, a quantised base or another adapter never
meets a changed weight.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from leantune.kernels.accumulation import add_product

Axis = Literal["in", "out"]
Entries = Tensor | slice
"""Chosen entries along an axis: distinct int64 indices ``(s,)``, or one contiguous run."""


def pick(x: Tensor, entries: Entries) -> Tensor:
    """A contiguous copy of ``x[..., entries]``: a view would keep all of ``x`` alive."""
    if isinstance(entries, slice):
        return x[..., entries].clone(memory_format=torch.contiguous_format)
    return x.index_select(-1, entries)


def _add_at(flat: Tensor, entries: Entries, share: Tensor) -> None:
    """``flat[:, entries] += share`` in place."""
    if isinstance(entries, slice):
        flat[:, entries].add_(share)
    else:
        flat.index_add_(1, entries, share.to(flat.dtype))


def partial_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, index: Entries, axis: Axis
) -> Tensor:
    """The same function the plain way: scatter the delta into a copy of the weight, then one dense linear.

    Args and result as :func:`partial_linear`; every tensor in one dtype. Its weight gradient is dense.
    """
    dim = 1 if axis == "in" else 0
    if isinstance(index, slice):
        index = torch.arange(weight.shape[dim], device=weight.device)[index]
    return F.linear(x, weight.index_add(dim, index, delta.to(weight.dtype)), bias)


def add_slice(result: Tensor, x: Tensor, delta: Tensor, index: Entries, axis: Axis) -> Tensor:
    """``result`` plus the slice's share of the output, by plain autograd: for a base that is no dense matrix.

    Args:
        result: what the base layer returned, ``(..., out)``, any floating dtype.
        x: input of the layer, ``(..., in)``.
        delta: ``(out, s)`` for axis "in", ``(s, in)`` for axis "out"; the product is formed in its dtype.
        index: the chosen entries, int64 ``(s,)``.
        axis: "in" for columns, "out" for rows.

    Returns:
        ``(..., out)`` in the dtype of ``result``.
    """
    if axis == "in":
        share = F.linear(pick(x, index).to(delta.dtype), delta)
        return result + share.to(result.dtype)
    share = F.linear(x.to(delta.dtype), delta)
    if isinstance(index, slice):
        index = torch.arange(result.shape[-1], device=result.device)[index]
    return result.index_add(-1, index, share.to(result.dtype))


class _PartialLinear(torch.autograd.Function):
    """See :func:`partial_linear`. Rows of ``x`` are flattened to ``(n, in)`` for the matrix products."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, index: Entries, axis: Axis
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        rows = y.view(-1, y.shape[-1])
        if axis == "in":
            # Only these s columns of the activation stay alive.
            kept = pick(x, index)
            kept = kept.view(-1, kept.shape[-1])
            add_product(rows, kept.to(delta.dtype), delta.t())
        else:
            kept = x
            share = x.reshape(-1, x.shape[-1]).to(delta.dtype) @ delta.t()
            _add_at(rows, index, share)
        gathered = isinstance(index, Tensor)
        ctx.save_for_backward(kept, weight, delta, *([index] if gathered else []))
        ctx.run = None if gathered else index
        ctx.axis = axis
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, delta, *gathered = ctx.saved_tensors
        index = ctx.run if ctx.run is not None else gathered[0]
        grad_x = grad_delta = None
        grad_rows = grad_y.reshape(-1, grad_y.shape[-1])
        # Axis "out": only the chosen outputs see the slice.
        seen = pick(grad_rows, index) if ctx.axis == "out" else grad_rows
        seen = seen.to(delta.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ weight
            flat = grad_x.view(-1, grad_x.shape[-1])
            if ctx.axis == "in":
                _add_at(flat, index, seen @ delta)
            else:
                add_product(flat, seen, delta)
        if ctx.needs_input_grad[3]:
            grad_delta = seen.t() @ kept.reshape(-1, kept.shape[-1]).to(delta.dtype)
        return grad_x, None, None, grad_delta, None, None


def partial_linear(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, index: Entries, axis: Axis) -> Tensor:
    r"""``x W^T + b`` with a trained slice beside the frozen ``W``; the backward touches the slice alone.

    Args:
        x: ``(..., in)``, in the dtype of ``weight``.
        weight: ``(out, in)``, frozen.
        bias: ``(out,)`` or None, frozen.
        delta: ``(out, s)`` for axis "in", ``(s, in)`` for axis "out"; float32 beside a bfloat16 weight is the usual
            case, and the slice's products and gradient are then formed in float32.
        index: the ``s`` distinct entries, int64, or a contiguous run as a ``slice``.
        axis: "in" for input columns, "out" for output rows.

    Returns:
        ``(..., out)`` in the dtype of ``weight``. Bytes saved for backward: ``n s`` entries of ``x`` on axis "in" (a
        copy), ``x`` itself on axis "out"; the weight, delta and index are shared, not copied.
    """
    return _PartialLinear.apply(x, weight, bias, delta, index, axis)
