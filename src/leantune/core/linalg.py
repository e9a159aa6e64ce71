r"""Dense linear algebra of low-rank methods: truncated singular value decompositions and sketches, on plain tensors.

Randomness comes from a generator that is given, never from the global state, and is drawn on the CPU, so that every
device and every process sees the same numbers.

Sources: randomized range finder and subspace iteration: Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithms
4.4 and 5.1. Two-sided sketch: Tropp, Yurtsever, Udell, Cevher, SIAM J. Matrix Anal. 38 (2017), algorithm 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 16
"""Least number of extra directions of a randomized decomposition; at least half as many as are wanted are added."""
ITERATIONS = 8
"""Power iterations. Few do not suffice on the flat spectrum of a sign matrix (``tests/core/test_linalg.py``)."""
_EXACT_SIDE = 256


def orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the columns of ``matrix`` ``(n, k)``, ``k <= n``, in its dtype."""
    return torch.linalg.qr(matrix).Q


def gaussian(rows: int, columns: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Independent N(0, 1) entries of ``like``'s dtype on its device, drawn in float32 on the CPU."""
    return torch.randn(rows, columns, generator=generator).to(like)


def truncated_svd(
    matrix: Tensor,
    rank: int,
    generator: torch.Generator,
    *,
    oversampling: int | None = None,
    iterations: int = ITERATIONS,
    exact: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``rank`` singular triplets: ``matrix ~ U diag(S) Vh``.

    A small matrix, or one of which nearly everything is wanted, is decomposed exactly; any other by a randomized
    range finder with power iterations, orthonormalised after each product.

    Args:
        matrix: ``(m, n)``, float32 or float64.
        rank: how many, at most ``min(m, n)``.
        generator: of the range finder's start, on the CPU.
        oversampling: extra directions; default: half of ``rank``, at least 16.
        iterations: power iterations.
        exact: decide it here instead.

    Returns:
        ``U (m, rank)``, ``S (rank,)`` falling, ``Vh (rank, n)``; the largest entry of each column of ``U`` is positive.
    """
    shorter = min(matrix.shape)
    width = min(rank + (max(OVERSAMPLING, rank // 2) if oversampling is None else oversampling), shorter)
    if exact is None:
        exact = shorter <= _EXACT_SIDE or 3 * width >= shorter
    if exact:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return _turned(U[:, :rank], S[:rank], Vh[:rank])
    Q = orthonormal(matrix @ gaussian(matrix.shape[1], width, generator, matrix))
    for _ in range(iterations):
        Q = orthonormal(matrix @ orthonormal(matrix.t() @ Q))
    inner, S, Vh = torch.linalg.svd(Q.t() @ matrix, full_matrices=False)
    return _turned(Q @ inner[:, :rank], S[:rank], Vh[:rank])


def _turned(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The signs of singular vectors are free, and differ between libraries: fix them."""
    if not U.numel():
        return U, S, Vh
    top = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return U * top, S, Vh * top.t()


def two_sided_reconstruction(Y: Tensor, Z: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    """``G ~ Q X`` from the sketches ``Y = G Omega`` and ``Z = Psi G`` of a matrix that nobody holds any more.

    Args:
        Y: ``(m, k)``.
        Z: ``(l, n)``, ``l > k``.
        psi: ``(l, m)``.

    Returns:
        ``Q (m, k)`` orthonormal, and ``X = (Psi Q)^+ Z`` ``(k, n)``.
    """
    Q = orthonormal(Y)
    U, T = torch.linalg.qr(psi @ Q)
    return Q, torch.linalg.solve_triangular(T, U.t() @ Z, upper=True)


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """``||U^T V||_F^2 / k`` of two orthonormal bases ``(n, k)``: 1 for the same subspace, about ``k / n`` by chance."""
    return float((first.t() @ second).double().square().sum() / first.shape[1])


def orthonormality_error(basis: Tensor) -> float:
    """The largest entry of ``|Q^T Q - I|`` for ``Q (n, k)``, formed in float64."""
    gram = basis.double().t() @ basis.double()
    return float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max()) if len(gram) else 0.0
