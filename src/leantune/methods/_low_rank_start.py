r"""Where ``B``, ``R`` and ``A`` start, from the matrix that their product is to be: a weight, or a first step on it.

With ``M ~ U S V^T`` its truncated SVD and ``s`` the scaling::

    split "core"    B = U      R = S / s    A = V^T       both factors orthonormal (LoRA-SB, eq. 2)
    split "left"    B = U S    R = I / s    A = V^T       LoRA-SB, appendix D.2, and LoRA-XS's factors
    split "right"   B = U      R = I / s    A = S V^T     its mirror image

A start that is to leave the base's function as it is takes the factors and ``R = 0``, where, unlike LoRA's ``B = 0``
beside a trained ``A``, nothing is lost: ``dL/dR = s B^T G A^T`` is not zero there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leantune.core.linalg import truncated_svd
from leantune.methods._selection import seeded

Split = Literal["core", "left", "right"]
NOISE = 0.2
"""Standard deviation of a core that is to change the function."""
SPLITS: tuple[Split, ...] = ("core", "left", "right")


@dataclass
class Start:
    """Truncated factors of one layer, and how much of the matrix they hold.

    Attributes:
        U: ``(out, r)``, orthonormal.
        S: ``(r,)``, falling.
        Vh: ``(r, in)``, orthonormal.
        energy: ``||M||_F^2`` of the whole matrix.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    energy: float

    @property
    def captured(self) -> float:
        """Share of the matrix's energy in these triplets."""
        return float(self.S.double().square().sum()) / self.energy if self.energy > 0 else 1.0

    def cut(self, rank: int) -> Start:
        """The first ``rank`` triplets."""
        return Start(self.U[:, :rank], self.S[:rank], self.Vh[:rank], self.energy)

    def to(self, device: torch.device | str) -> Start:
        """The same on another device."""
        return Start(self.U.to(device), self.S.to(device), self.Vh.to(device), self.energy)

    def factors(self, split: Split, scaling: float, *, keep_function: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``B``, ``R``, ``A`` with ``scaling B R A = U S Vh``, or with ``R = 0``."""
        root = torch.diag(self.S) if split == "core" else torch.eye(len(self.S)).to(self.S)
        core = torch.zeros_like(root) if keep_function else root / scaling
        B = self.U * self.S if split == "left" else self.U
        A = self.S[:, None] * self.Vh if split == "right" else self.Vh
        return B, core, A


def decompose(matrix: Tensor, rank: int, *words: object) -> Start:
    """The truncated SVD of a layer's matrix, its randomness seeded by ``words`` (seed and path)."""
    energy = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    return Start(*truncated_svd(matrix, rank, seeded("svd", *words)), energy)


def kaiming(out_features: int, in_features: int, like: Tensor, *words: object) -> Tensor:
    """A fresh linear layer's weight: U(-1/sqrt(in), 1/sqrt(in)) (Kaiming, as torch draws it with a = sqrt 5)."""
    bound = 1 / math.sqrt(in_features)
    drawn = torch.rand(out_features, in_features, generator=seeded("kaiming", *words))
    return drawn.mul_(2 * bound).sub_(bound).to(like)


def add_noise(matrix: Tensor, deviation: float, *words: object) -> Tensor:
    """``matrix`` plus N(0, deviation^2) in each entry, in place."""
    drawn = torch.randn(matrix.shape, generator=seeded("noise", *words))
    return matrix.add_(drawn.to(matrix), alpha=deviation)
