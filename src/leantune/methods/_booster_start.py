r"""A booster's start along the gradient: the directions in which the loss falls fastest, at no extra pass.

A fresh booster is ``s B A`` with ``B = 0``, so that the model is the one before the round and the first backward of the
round meets the true gradient ``G = dL/dW (out, in)`` of the weight. With it

    A <- diag(|a_1|, ..., |a_r|) V_r^T        V_r: the top r right singular vectors of G,
                                              |a_i|: the lengths of the random rows that stood there
    dL/dB = s G A^T

and ``B`` stays zero. Why this: a first step ``B = -eta dL/dB`` changes the weight by ``D = -eta s^2 G A^T A`` and the
loss, to first order, by ``-eta s^2 ||G A^T||_F^2``. Among all ``A`` with orthogonal rows of these lengths that is
largest for ``V_r``, the longest row first: ``sum |a_i|^2 s_i^2``, against ``||G||_F^2 sum |a_i|^2 / in`` on average for
random rows. At rank 1 the gain is ``in s_1^2 / ||G||_F^2``: ``in / min(out, in)`` for a flat spectrum, at most ``in``.
The lengths are kept, so that a learning rate means the same with either start.

All of it happens inside the backward of one autograd function (:class:`AlignedShare`): the gradient of a layer is
formed, used and freed when backward reaches it. The cost is that of one weight gradient a layer and round (what full
fine-tuning pays in every step) and a small truncated SVD. Of several forward passes of a step the one whose backward
comes first decides. ``A`` is a parameter and is saved; a resumed run therefore continues with it, and a booster whose
``B`` is zero still is turned anew by whichever step comes next, in an interrupted run as in one that was not.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from leantune.core.linalg import truncated_svd

_OVERSAMPLING, _ITERATIONS = 8, 3


class Trained(Protocol):
    """A booster in training: ``scaling B A``."""

    A: Any
    B: Any
    scaling: float


def aligned(A: Tensor, gradient: Tensor) -> Tensor:
    """Rows along the top right singular vectors of the gradient, as long as those of ``A``, the longest first.

    Args:
        A: the random start, ``(r, in)``.
        gradient: ``(out, in)``; where it is zero or not finite, ``A`` comes back as it is.

    Returns:
        ``(r, in)``; beyond the gradient's sides, rows of ``A`` are left.
    """
    if not bool(torch.isfinite(gradient).all()) or not bool(gradient.any()):
        return A
    r = min(len(A), *gradient.shape)
    generator = torch.Generator().manual_seed(0)
    _, _, Vh = truncated_svd(gradient, r, generator, oversampling=_OVERSAMPLING, iterations=_ITERATIONS)
    lengths = A.norm(dim=1, keepdim=True).sort(dim=0, descending=True).values
    result = A.clone()
    result[:r] = lengths[:r] * Vh
    return result


class AlignedShare(torch.autograd.Function):
    """What a booster with ``B = 0`` adds to the output, which is nothing; its backward turns ``A``, see the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, booster: Trained) -> Tensor:
        del A
        ctx.save_for_backward(x)
        ctx.booster = booster
        return x.new_zeros(*x.shape[:-1], B.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), own = ctx.saved_tensors, ctx.booster
        rows, out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if own.B.grad is None:
            gradient = out.t() @ rows
            with torch.no_grad():
                own.A.copy_(aligned(own.A, gradient))
            of_B = gradient @ own.A.t()
            # What other forward passes of this step add must be of the same A: for them there is a gradient already.
            own.B.grad = torch.zeros_like(own.B)
        else:
            of_B = out.t() @ (rows @ own.A.t())
        # B is zero: nothing comes back to x, nor to A.
        return None, torch.zeros_like(own.A), own.scaling * of_B, None


def aligned_share(x: Tensor, booster: Trained) -> Tensor:
    """The share ``(..., out)`` of a booster that has taken no step, for ``x (..., in)`` of the booster's dtype."""
    share: Tensor = AlignedShare.apply(x, booster.A, booster.B, booster)
    return share
