"""One adapter's ``B R A`` in one linear layer: two frozen factors and the trained core between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leantune.core.linalg import orthonormality_error

ORTHONORMAL = 1e-5
"""Most that an entry of ``B^T B - I`` or ``A A^T - I`` may be off for the factor to count as orthonormal."""
# A millionth of the largest singular value, squared: what is below is the rounding of float32.
_SINGULAR = 1e-12
_NARROW = (torch.float16, torch.bfloat16)


class Preconditioned(torch.autograd.Function):
    """The identity on the core; its backward makes of ``g`` the gradient ``left g right`` (LoRA-SB, Theorem 2)."""

    @staticmethod
    def forward(ctx: Any, core: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return core.view_as(core)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        left, right = ctx.saved_tensors
        return (left @ grad.to(left.dtype) @ right).to(grad.dtype), None, None


def _inverse(gram: Tensor) -> Tensor:
    """The inverse; of factors that lack the full rank (a weight of lower rank), on the directions that they have."""
    return torch.linalg.pinv(gram, rtol=_SINGULAR, hermitian=True)


class CoreFactors(nn.Module):
    """``x -> s dropout(x) A^T R^T B^T`` with ``A (r, in)``, ``R (r, r)``, ``B (out, r)``; ``R`` alone trains.

    What autograd keeps for the backward is one r-wide product (and the factors, which are there anyway; with dropout,
    its mask).

    Args:
        shape: ``(out, in)``.
        rank: ``r``.
        alpha: ``s = alpha / r``; None for ``s = 1``.
        dropout: share of ``x`` that is dropped while training, the rest scaled up.
        precondition: whether ``R``'s gradient is ``(B^T B)^-1 g (A A^T)^-1 / s^2``.
    """

    B: Tensor
    A: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        *,
        precondition: bool = False,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.precondition = precondition
        self.waits = True
        self.weight = nn.Parameter(torch.zeros(rank, rank))
        self.register_buffer("B", torch.zeros(shape[0], rank))
        self.register_buffer("A", torch.zeros(rank, shape[1]))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self._inverses: tuple[Tensor, Tensor] | None = None

    @property
    def rank(self) -> int:
        """``r``, of this layer."""
        return int(self.weight.shape[0])

    @property
    def scaling(self) -> float:
        """``s``."""
        return 1.0 if self.alpha is None else self.alpha / max(self.rank, 1)

    def start(self, B: Tensor, R: Tensor, A: Tensor) -> None:
        """Take these factors, of any rank, and this core; the trained parameter stays the same object."""
        for name, value in (("B", B), ("A", A)):
            self.register_buffer(name, value.detach().to(getattr(self, name), copy=True).contiguous())
        with torch.no_grad():
            if self.weight.shape == R.shape:
                self.weight.copy_(R)
            else:
                self.weight.data = R.detach().to(self.weight, copy=True).contiguous()
        self._inverses = None
        self.waits = False

    def copy_start(self, other: CoreFactors) -> None:
        """Take over another adapter's factors and core, or that it still waits for them."""
        self.start(other.B, other.weight, other.A)
        self.waits = other.waits

    def forward(self, x: Tensor) -> Tensor:
        """``s dropout(x) A^T R^T B^T`` ``(..., out)``, computed in the factors' dtype."""
        core = self.weight.to(self.A.dtype)
        if self.precondition and core.requires_grad:
            core = Preconditioned.apply(core, *self._preconditioner())
        x = self.dropout(x.to(self.A.dtype))
        return F.linear(F.linear(F.linear(x, self.A), self.scaling * core), self.B)

    def left(self) -> Tensor:
        """``s B R`` ``(out, r)``."""
        return self.B @ (self.scaling * self.weight.detach().to(self.B.dtype))

    def delta(self) -> Tensor:
        """``s B R A`` ``(out, in)``."""
        return self.left() @ self.A

    def is_orthonormal(self) -> bool:
        """Whether both frozen factors are, so that the plain gradient is already the best one (Theorem 2)."""
        return max(orthonormality_error(self.B), orthonormality_error(self.A.t())) <= ORTHONORMAL

    def _preconditioner(self) -> tuple[Tensor, Tensor]:
        if self._inverses is None or self._inverses[0].device != self.B.device:
            wide, squared = torch.float64, self.scaling**2
            left = _inverse(self.B.to(wide).t() @ self.B.to(wide)) / squared
            right = _inverse(self.A.to(wide) @ self.A.to(wide).t())
            self._inverses = (left.to(self.B.dtype), right.to(self.A.dtype))
        return self._inverses

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> CoreFactors:
        kept = {name: getattr(self, name) for name in ("B", "A")}
        super()._apply(function, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            # A host that casts the model to 16 bits would leave the factors orthonormal to two digits.
            if after.dtype in _NARROW and before.dtype not in _NARROW and not before.is_meta:
                setattr(self, name, before.to(after.device))
        self._inverses = None
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # The file decides the rank: of a layer whose rank was allotted, the config may not know it yet.
        stored = {name: state_dict.get(prefix + name) for name in ("weight", "B", "A")}
        core, B, A = stored["weight"], stored["B"], stored["A"]
        if core is not None and core.shape != self.weight.shape:
            self.weight = nn.Parameter(self.weight.new_zeros(core.shape), requires_grad=self.weight.requires_grad)
        if B is not None and A is not None:
            if B.shape[1] != self.B.shape[1]:
                self.B, self.A = self.B.new_zeros(B.shape), self.A.new_zeros(A.shape)
            self.waits = self.waits and core is None
        self._inverses = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
