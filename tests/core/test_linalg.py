"""Truncated decompositions against the exact ones, sketches, and the global random state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leantune.core.linalg import (
    gaussian,
    orthonormal,
    orthonormality_error,
    subspace_overlap,
    truncated_svd,
    two_sided_reconstruction,
)

ROWS, COLUMNS, RANK = 400, 300, 24


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)


def falling() -> Tensor:
    """A matrix whose singular values fall like 1 / k."""
    U, V = orthonormal(noise(ROWS, COLUMNS, 2)), orthonormal(noise(COLUMNS, COLUMNS, 3))
    return U / torch.arange(1, COLUMNS + 1, dtype=torch.float64) @ V.t()


def signs() -> Tensor:
    """Signs of a gradient of few directions under much noise: a bulk of nearly equal singular values, little above."""
    return (noise(ROWS, 6, 4) @ noise(6, COLUMNS, 5) + 2 * noise(ROWS, COLUMNS, 6)).sign()


def flat() -> Tensor:
    """Signs of pure noise: nothing stands out at all."""
    return noise(ROWS, COLUMNS, 7).sign()


# How much less than the best rank-r approximation may be captured, and how well the directions that stand out (as many
# as named) agree: on a flat spectrum there are none, and any directions are nearly as good as the best.
CASES = {"falling": (falling, 1e-6, RANK), "signs": (signs, 5e-3, 6), "flat": (flat, 5e-3, 0)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("turned", [False, True])
def test_randomized_against_exact(case: str, turned: bool) -> None:
    make, loss, standing = CASES[case]
    matrix = make().t() if turned else make()
    exact_U, exact_S, exact_Vh = torch.linalg.svd(matrix, full_matrices=False)
    U, S, Vh = truncated_svd(matrix.float(), RANK, generator(), exact=False)
    assert (U.shape, S.shape, Vh.shape) == ((matrix.shape[0], RANK), (RANK,), (RANK, matrix.shape[1]))
    assert U.dtype == torch.float32
    assert max(orthonormality_error(U), orthonormality_error(Vh.t())) < 1e-5

    best = float((exact_S[RANK:] ** 2).sum()) / float((exact_S**2).sum())
    found = float((matrix - (U * S).double() @ Vh.double()).square().sum()) / float(matrix.square().sum())
    assert best - 1e-6 <= found <= best + loss
    # One that is not iterated must not pass, or the bound says nothing.
    rough = truncated_svd(matrix.float(), RANK, generator(), exact=False, iterations=0)
    worse = float((matrix - (rough[0] * rough[1]).double() @ rough[2].double()).square().sum())
    assert worse / float(matrix.square().sum()) > best + loss
    if standing:
        for mine, theirs in ((U, exact_U), (Vh.t(), exact_Vh.t())):
            assert subspace_overlap(mine[:, :standing].double(), theirs[:, :standing]) > 1 - 1e-3


def test_small_ones_are_exact() -> None:
    matrix = noise(60, 40).sign()
    U, S, Vh = truncated_svd(matrix, 5, generator())
    exact = torch.linalg.svd(matrix, full_matrices=False)
    assert float((S - exact.S[:5]).abs().max()) < 1e-12
    best = (exact.U[:, :5] * exact.S[:5]) @ exact.Vh[:5]
    assert float(((U * S) @ Vh - best).abs().max()) < 1e-12


def test_signs_are_fixed() -> None:
    matrix = noise(50, 30)
    U, _, Vh = truncated_svd(matrix, 4, generator())
    turned_U, _, turned_Vh = truncated_svd(-matrix, 4, generator())
    tops = U.gather(0, U.abs().argmax(0, keepdim=True))
    assert bool((tops > 0).all())
    assert float((U - turned_U).abs().max()) < 1e-10
    assert float((Vh + turned_Vh).abs().max()) < 1e-10


def test_rank_zero_and_matrices_of_lower_rank() -> None:
    assert truncated_svd(noise(6, 4), 0, generator())[1].numel() == 0
    matrix = (noise(400, 2) @ noise(2, 300)).float()
    U, S, Vh = truncated_svd(matrix, RANK, generator(), exact=False)
    assert orthonormality_error(U) < 1e-5
    assert orthonormality_error(Vh.t()) < 1e-5
    assert float((matrix - (U * S) @ Vh).abs().max()) < 1e-3


def test_the_generator_alone_decides() -> None:
    matrix = signs().float()
    before = torch.get_rng_state()
    first = truncated_svd(matrix, 8, generator(1), exact=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = truncated_svd(matrix, 8, generator(1), exact=False)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    other = truncated_svd(matrix, 8, generator(2), exact=False)
    assert not torch.equal(first[0], other[0])


def test_a_sketch_gives_a_matrix_of_low_rank_back() -> None:
    matrix = noise(80, 5) @ noise(5, 50)
    omega, psi = gaussian(50, 8, generator(1), matrix), gaussian(17, 80, generator(2), matrix)
    Q, X = two_sided_reconstruction(matrix @ omega, psi @ matrix, psi)
    assert orthonormality_error(Q) < 1e-12
    assert float((Q @ X - matrix).abs().max()) < 1e-9 * float(matrix.abs().max())


def test_overlap_is_one_for_the_same_subspace_and_small_by_chance() -> None:
    basis = orthonormal(noise(200, 10))
    turned = basis @ orthonormal(noise(10, 10, 8))
    assert abs(subspace_overlap(basis, turned) - 1) < 1e-12
    assert subspace_overlap(basis, orthonormal(noise(200, 10, 9))) < 0.15
