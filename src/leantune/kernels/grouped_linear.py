r"""A frozen linear layer whose batch rows have low-rank factors of their own, over one shared projection.

With :math:`A` ``(r, in)`` shared by all, :math:`B_i` ``(out, r)`` and the scaling :math:`s_i` of group ``i``, and rows
:math:`R_i` of the batch::

    z = x A^T                            once for the whole batch, (rows, ..., r)
    y = x W^T + b;  y[R_i] += s_i z[R_i] B_i^T

Rows are sorted by group, so that each factor is one matrix product; a row of no group is left as the base made it.
Backward needs ``z`` alone (the input only where ``A`` itself trains)::

    dB_i = s_i dy[R_i]^T z[R_i]          dz[R_i] = s_i dy[R_i] B_i
    dx   = dy W + dz A                   dA      = dz^T x, the sum over the groups

A group without rows gets no gradient, not zeros: an optimizer would step on zeros (momentum, weight decay).

Source: Multi-LoRA ("Partially decomposable loss analysis and sharing"), algorithm 1 and claim 4.2. The paper trains
its tasks one after the other; one batch with rows of all of them is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from leantune.kernels.accumulation import add_product


@dataclass(frozen=True)
class RowGroups:
    """Which rows of a batch go to which factor.

    Attributes:
        sizes: how many rows each factor gets, in the order of the factors; zero for a factor that is absent.
        order: the rows sorted by factor, int64 ``(sum(sizes),)``; None where they stand sorted and none is left out.
    """

    sizes: tuple[int, ...]
    order: Tensor | None = None

    @classmethod
    def of(cls, assignment: Sequence[int | None], count: int, device: torch.device) -> RowGroups:
        """The groups of a batch.

        Args:
            assignment: for each row the number of its factor, or None.
            count: how many factors there are.
            device: of the batch.
        """
        rows: list[list[int]] = [[] for _ in range(count)]
        for row, factor in enumerate(assignment):
            if factor is not None:
                rows[factor].append(row)
        order = [row for group in rows for row in group]
        stand_sorted = order == list(range(len(assignment)))
        return cls(tuple(map(len, rows)), None if stand_sorted else torch.tensor(order, device=device).long())

    def segments(self, tokens: int) -> list[slice]:
        """Where each group stands among the sorted rows of ``tokens`` positions each."""
        ends = list(accumulate(size * tokens for size in self.sizes))
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _tokens(x: Tensor) -> int:
    """Positions of one batch row of ``x (rows, ..., width)``."""
    return x.shape[1:-1].numel()


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _sorted(x: Tensor, order: Tensor | None) -> Tensor:
    """``x (rows, ..., width)`` by group, flattened to ``(n, width)``."""
    return _flat(x if order is None else x.index_select(0, order))


def grouped_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shared: Tensor,
    factors: Sequence[Tensor],
    scaling: Sequence[float],
    groups: RowGroups,
) -> Tensor:
    """The same function the plain way: each row by the dense weight of its own group.

    Args and result as :func:`grouped_linear`; every tensor in one dtype.
    """
    y = F.linear(x, weight, bias)
    order = torch.arange(len(x), device=x.device) if groups.order is None else groups.order
    for rows, factor, scale in zip(order.split(list(groups.sizes)), factors, scaling, strict=True):
        own = weight + scale * factor @ shared
        y = y.index_copy(0, rows, F.linear(x[rows], own, bias))
    return y


def add_grouped(
    result: Tensor,
    x: Tensor,
    shared: Tensor,
    factors: Sequence[Tensor],
    scaling: Sequence[float],
    groups: RowGroups,
) -> Tensor:
    """``result`` plus each row's share, by plain autograd: for a base that is no dense matrix, and for dropout.

    Args:
        result: what the base layer returned, ``(rows, ..., out)``, any floating dtype.
        x: input of the layer, ``(rows, ..., in)``.
        shared, factors, scaling, groups: as in :func:`grouped_linear`.

    Returns:
        ``(rows, ..., out)`` in the dtype of ``result``. Saved for backward: ``z``, unless ``shared`` trains.
    """
    present = [number for number, size in enumerate(groups.sizes) if size]
    if not present:
        return result
    dtype = factors[present[0]].dtype
    z = _sorted(F.linear(x.to(shared.dtype), shared).to(dtype), groups.order)
    segments = groups.segments(_tokens(x))
    pieces = [F.linear(z[segments[i]], factors[i].to(dtype)) * scaling[i] for i in present]
    if groups.order is not None:
        # Rows of no group take a row of zeros. Not index_copy, which would keep the whole share for its backward.
        place = groups.order.new_full((len(x),), len(groups.order))
        place[groups.order] = torch.arange(len(groups.order), device=place.device)
        pieces.append(z.new_zeros(_tokens(x), pieces[0].shape[-1]))
        share = torch.cat(pieces).view(len(groups.order) + 1, *result.shape[1:]).index_select(0, place)
    else:
        share = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    # Added before the sum is rounded, so that a row is to the last bit what it is alone.
    return (result + share.view(result.shape)).to(result.dtype)


class _GroupedLinear(torch.autograd.Function):
    """See :func:`grouped_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shared: Tensor,
        scaling: Sequence[float],
        groups: RowGroups,
        *factors: Tensor,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        # The r-wide product is all that stays alive of the input.
        z = _sorted(F.linear(x.to(shared.dtype), shared).to(factors[0].dtype), groups.order)
        rows = _sorted(y, groups.order)
        for part, factor, scale in zip(groups.segments(_tokens(x)), factors, scaling, strict=True):
            add_product(rows[part], z[part], factor.t(), scale)
        if groups.order is not None:
            y.index_copy_(0, groups.order, rows.view(len(groups.order), *y.shape[1:]))
        ctx.keeps_input = ctx.needs_input_grad[3]
        ctx.save_for_backward(z, weight, shared, *((x,) if ctx.keeps_input else ()), *factors)
        ctx.scaling, ctx.groups = scaling, groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, shared, *rest = ctx.saved_tensors
        groups: RowGroups = ctx.groups
        x = rest.pop(0) if ctx.keeps_input else None
        factors: list[Tensor] = rest
        seen = _sorted(grad_y, groups.order).to(z.dtype)
        grad_z = torch.empty_like(z)
        grad_factors: list[Tensor | None] = []
        # A factor without a row is absent from the batch; None tells the optimizer so, zeros would not.
        wanted = [asks and size > 0 for asks, size in zip(ctx.needs_input_grad[6:], groups.sizes, strict=True)]
        parts = zip(groups.segments(_tokens(grad_y)), factors, ctx.scaling, wanted, strict=True)
        for part, factor, scale, wants in parts:
            torch.mm(seen[part], factor * scale, out=grad_z[part])
            grad_factors.append((seen[part].t() @ z[part]) * scale if wants else None)
        grad_z = grad_z.to(shared.dtype)
        if groups.order is not None:
            scattered = grad_z.new_zeros(*grad_y.shape[:-1], z.shape[-1])
            scattered.index_copy_(0, groups.order, grad_z.view(len(groups.order), *scattered.shape[1:]))
            grad_z = _flat(scattered)
        grad_x = grad_shared = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ weight
            add_product(grad_x.view(-1, grad_x.shape[-1]), grad_z, shared)
        if x is not None:
            grad_shared = grad_z.t() @ _flat(x).to(grad_z.dtype)
        return grad_x, None, None, grad_shared, None, None, *grad_factors


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shared: Tensor,
    factors: Sequence[Tensor],
    scaling: Sequence[float],
    groups: RowGroups,
) -> Tensor:
    r"""``x W^T + b`` with a low-rank share for each row's own group, over one projection ``A``.

    Args:
        x: ``(rows, ..., in)``, in the dtype of ``weight``.
        weight: ``(out, in)``, frozen.
        bias: ``(out,)`` or None, frozen.
        shared: ``A (r, in)``; frozen, or trained by the sum over the groups.
        factors: ``B_i (out, r)``, one dtype; float32 beside a bfloat16 weight is the usual case.
        scaling: ``s_i``, one for each factor.
        groups: which rows are whose.

    Returns:
        ``(rows, ..., out)`` in the dtype of ``weight``. Bytes saved for backward: ``r`` entries for each position of a
        row that has a group, and ``x`` itself where ``shared`` trains.
    """
    return _GroupedLinear.apply(x, weight, bias, shared, tuple(scaling), groups, *factors)
