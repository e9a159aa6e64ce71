"""Convex problems in one weight, with their constants, and a booster trained on them, for the theory tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

OUT, IN, ROWS = 4, 3, 12
EXACT = torch.float64
# Roundings of a few dozen float64 operations on numbers around one.
EPS = 1e-12


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=EXACT)


def squares(value: Tensor) -> Tensor:
    """``||value||_F^2`` of each matrix of a stack."""
    return value.square().sum((-2, -1))


def best(matrix: Tensor, r: int) -> Tensor:
    """``[matrix]_r``, of each matrix of a stack."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[..., :r] * S[..., None, :r]) @ Vh[..., :r, :]


@dataclass(frozen=True)
class LeastSquares:
    """``||W X - Y||_F^2 / 2n``; its Hessian is ``X X^T / n`` for each row of ``W``."""

    X: Tensor
    Y: Tensor

    @classmethod
    def of(cls, seed: int) -> LeastSquares:
        return cls(noise(seed, IN, ROWS), noise(seed + 1, OUT, ROWS))

    def loss(self, W: Tensor) -> Tensor:
        return squares(W @ self.X - self.Y) / (2 * self.X.shape[1])

    def gradient(self, W: Tensor) -> Tensor:
        return (W @ self.X - self.Y) @ self.X.T / self.X.shape[1]

    @property
    def hessian(self) -> Tensor:
        return self.X @ self.X.T / self.X.shape[1]

    @property
    def bounds(self) -> tuple[float, float]:
        """``(beta, mu)``."""
        values = torch.linalg.eigvalsh(self.hessian)
        return values[-1].item(), values[0].item()

    def optimum(self) -> Tensor:
        return torch.linalg.lstsq(self.X.T, self.Y.T).solution.T

    def part(self, columns: slice) -> LeastSquares:
        """A minibatch."""
        return LeastSquares(self.X[:, columns], self.Y[:, columns])


@dataclass(frozen=True)
class LogCosh:
    """``mean log cosh(W x - y) + ridge / 2 ||W||_F^2``: smooth, strongly convex, not quadratic."""

    X: Tensor
    Y: Tensor
    ridge: float = 0.3

    @classmethod
    def of(cls, seed: int) -> LogCosh:
        return cls(noise(seed, IN, ROWS), 2 * noise(seed + 1, OUT, ROWS))

    def loss(self, W: Tensor) -> Tensor:
        errors = W @ self.X - self.Y
        return torch.log(torch.cosh(errors)).sum((-2, -1)) / self.X.shape[1] + self.ridge / 2 * squares(W)

    def gradient(self, W: Tensor) -> Tensor:
        return torch.tanh(W @ self.X - self.Y) @ self.X.T / self.X.shape[1] + self.ridge * W

    @property
    def bounds(self) -> tuple[float, float]:
        """``(beta, mu)``: log cosh has a second derivative in (0, 1]."""
        return torch.linalg.eigvalsh(self.X @ self.X.T / self.X.shape[1])[-1].item() + self.ridge, self.ridge

    def optimum(self) -> Tensor:
        W = torch.zeros(OUT, IN, dtype=EXACT)
        for _ in range(600):
            W = W - self.gradient(W) / self.bounds[0]
        assert self.gradient(W).norm() < EPS
        return W

    def hessian_times(self, W: Tensor, D: Tensor) -> Tensor:
        slope = 1 - torch.tanh(W @ self.X - self.Y).square()
        return (slope * (D @ self.X)) @ self.X.T / self.X.shape[1] + self.ridge * D


PROBLEMS = [LeastSquares, LogCosh]
ZERO = torch.zeros(OUT, IN, dtype=EXACT)


@dataclass(frozen=True)
class Path:
    """A booster trained by SGD on both factors from ``B = 0``, ``A = A0``, and the gradients that it met."""

    B: Tensor
    A: Tensor
    gradients: list[Tensor]

    @classmethod
    def train(cls, batches: list[LeastSquares], W: Tensor, A: Tensor, step: float, B: Tensor | None = None) -> Path:
        B = torch.zeros(OUT, A.shape[0], dtype=EXACT) if B is None else B
        met = []
        for batch in batches:
            G = batch.gradient(W + B @ A)
            met.append(G)
            B, A = B - step * G @ A.T, A - step * B.T @ G
        return cls(B, A, met)

    @property
    def bound(self) -> float:
        """The largest spectral norm among the gradients, the paper's G (there: Frobenius, which is no smaller)."""
        return max(torch.linalg.matrix_norm(G, 2).item() for G in self.gradients)


def minibatches(problem: LeastSquares, size: int = 3) -> list[LeastSquares]:
    return [problem.part(slice(start, start + size)) for start in range(0, ROWS, size)]


def variance(problem: LeastSquares, W: Tensor) -> float:
    """Of the gradient of one minibatch: ``E ||G_j - G||_F^2``."""
    G = problem.gradient(W)
    return float(np.mean([squares(batch.gradient(W) - G).item() for batch in minibatches(problem)]))
