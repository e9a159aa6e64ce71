r"""A low-rank change ``B A`` at a smaller rank, without ever forming ``B A``, with what that leaves out said exactly.

For ``B (out, k)`` and ``A (k, in)``, e.g. the ``k`` boosters that a layer collected::

    B = Q_B R_B,   A^T = Q_A R_A        two thin QR
    R_B R_A^T = U S V^T                 an SVD no larger than (k, k)
    B' = Q_B U_r S_r^(1/2),   A' = S_r^(1/2) V_r^T Q_A^T

``B' A'`` is the best approximation of rank r in the Frobenius and in the spectral norm, and its errors are
``sqrt(s_{r+1}^2 + ...)`` and ``s_{r+1}`` (Eckart, Young, Psychometrika 1 (1936); Mirsky 1960). Everything is computed
in float64; memory is that of the factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from leantune.core.errors import AdapterError, describe


@dataclass(frozen=True)
class RankError:
    """What a smaller rank leaves out of a change.

    Attributes:
        absolute: ``||B A - B' A'||_F``.
        relative: the same as a share of ``||B A||_F``; 0 for a change of nothing.
        spectral: ``||B A - B' A'||_2``.
        norm: ``||B A||_F``.
        rank: the smallest rank that leaves out no more than the rounding of the factors' dtype.
    """

    absolute: float
    relative: float
    spectral: float
    norm: float
    rank: int


@dataclass(frozen=True)
class Recompression:
    """The same over all layers of an adapter.

    Attributes:
        rank: what was asked for.
        needed_rank: the smallest rank that would leave nothing out of any layer.
        layers: each layer's own error, by its path.
    """

    rank: int
    needed_rank: int
    layers: dict[str, RankError]

    @property
    def worst(self) -> str:
        """The layer that loses the largest share of its change."""
        return max(self.layers, key=lambda path: self.layers[path].relative)

    @property
    def total(self) -> RankError:
        """All layers as one change: Frobenius norms add up in squares, the spectral error is the largest."""
        errors = self.layers.values()
        absolute, norm = (math.hypot(*(getattr(each, name) for each in errors)) for name in ("absolute", "norm"))
        return RankError(
            absolute,
            absolute / norm if norm else 0.0,
            max(each.spectral for each in errors),
            norm,
            max(each.rank for each in errors),
        )

    @property
    def is_exact(self) -> bool:
        """Whether nothing is left out but rounding."""
        return self.needed_rank <= self.rank

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "worst": self.worst, "total": asdict(self.total), "is_exact": self.is_exact}


def recompress(B: Tensor, A: Tensor, r: int) -> tuple[Tensor, Tensor, RankError]:
    """The best factors of rank ``r`` of ``B A``.

    Factors of rank ``r`` or less already come back as they are, bit for bit.

    Args:
        B: ``(out, k)``.
        A: ``(k, in)``.
        r: the rank wanted, at least 1.

    Returns:
        ``B' (out, r)``, ``A' (r, in)`` in the given dtype, singular values shared evenly between them, and the error of
        their exact product. (Rounding them to the dtype comes on top.)

    Raises:
        AdapterError: ``r`` is below 1, or a factor holds values that are not finite.
    """
    if r < 1:
        raise AdapterError(describe("rank", str(r), "at least 1", "choose a larger rank"))
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        raise AdapterError(describe("recompress", "factors that are not finite", "numbers", "train again"))
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().t())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.t(), full_matrices=False)
    error = _error(S, r, (B, A))
    if A.shape[0] <= r:
        return B, A, error
    root = S[:r].sqrt()
    return (Q_B @ (U[:, :r] * root)).to(B.dtype), ((root[:, None] * Vh[:r]) @ Q_A.t()).to(A.dtype), error


def recompress_all(
    factors: Mapping[str, tuple[Tensor, Tensor]], r: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], Recompression]:
    """Every layer of an adapter at rank ``r`` or less, and the error of each.

    Args:
        factors: ``(B, A)`` by the layer's path.
        r: the rank.

    Raises:
        AdapterError: see :func:`recompress`; the layer is named.
    """
    smaller, errors = {}, {}
    for path, (B, A) in factors.items():
        try:
            B, A, errors[path] = recompress(B, A, r)
        except AdapterError as error:
            raise AdapterError(f"module {path}, {error}") from error
        smaller[path] = (B, A)
    return smaller, Recompression(r, max(1, *(each.rank for each in errors.values())), errors)


def require_exact(found: Recompression, where: str) -> None:
    """Raise when a smaller rank leaves something out.

    Args:
        found: the result of :func:`recompress_all`.
        where: what is being exported, for the message.

    Raises:
        AdapterError: it does; the rank that would not is named.
    """
    if found.is_exact:
        return
    lost = f"rank {found.rank} leaves out {found.total.relative:.2%} of the change"
    worst = f"{found.layers[found.worst].relative:.2%} in {found.worst}"
    raise AdapterError(
        describe(
            where,
            f"{lost} ({worst})",
            "an export that is exact",
            f"give --rank {found.needed_rank} or more, or leave --exact out",
        )
    )


def _error(values: Tensor, r: int, factors: Iterable[Tensor]) -> RankError:
    """Of the singular values ``(k,)``, falling."""
    norm = torch.linalg.vector_norm(values).item()
    absolute = torch.linalg.vector_norm(values[r:]).item()
    # What is left out at rank 0, 1, ...; some roundings of the factors' dtype are no loss.
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()
    rank = int((tails > 8 * max(torch.finfo(factor.dtype).eps for factor in factors) * norm).sum())
    spectral = values[r].item() if len(values) > r else 0.0
    return RankError(absolute, absolute / norm if norm else 0.0, spectral, norm, rank)
