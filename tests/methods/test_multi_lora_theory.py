"""The paper's theory where it says something that can be computed; and where its own examples break its premises.

Definition 1.1: ``L(x, y) = sum_i L(x, y_i)`` with a shared part ``x (d,)`` and parts ``y_i (m,)`` of each of k tasks.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from leantune.testing.closeness import assert_close

D, M, K = 3, 2, 4
Loss = Callable[[Tensor, Tensor], Tensor]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def over_tasks(loss: Loss) -> Callable[[Tensor], Tensor]:
    """Definition 1.1 as a function of one vector ``(d + k m,)``."""

    def total(z: Tensor) -> Tensor:
        return torch.stack([loss(z[:D], y) for y in z[D:].view(-1, M)]).sum()

    return total


def curved(x: Tensor, y: Tensor) -> Tensor:
    """A smooth loss in which the two parts meet, as A and B_i do in a product."""
    return torch.sin(x @ noise(D, M, seed=9) @ y) + 0.1 * (x.square().sum() + y.square().sum())


def test_claim_4_2_the_gradient_is_a_sum_and_k_parts() -> None:
    z = noise(D + K * M)
    got = jacobian(over_tasks(curved), z)
    parts = [jacobian(curved, (z[:D], y)) for y in z[D:].view(K, M)]
    shared = torch.stack([part[0] for part in parts]).sum(0)
    exact = torch.cat([shared, *(part[1] for part in parts)])
    assert_close(got, exact, torch.float64, 16, 8, wrong=[torch.cat([shared / K, exact[D:]])], what="gradient")


def test_tasks_do_not_meet_in_the_hessian() -> None:
    """Section 4.5: the block of two different tasks is zero, so given x they are independent problems."""
    H = hessian(over_tasks(curved), noise(D + K * M))
    blocks = H[D:, D:].view(K, M, K, M)
    for i in range(K):
        for j in range(K):
            assert (blocks[i, :, j] != 0).any() == (i == j)
    assert H[:D, D:].abs().min() > 0


def quadratic(Q: Tensor) -> Loss:
    """``z^T Q z / 2`` with ``z = (x, y)``."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = torch.cat([x, y])
        return 0.5 * z @ Q @ z

    return loss


def extremes(H: Tensor) -> tuple[float, float]:
    values = torch.linalg.eigvalsh(H)
    return float(values[0]), float(values[-1])


@pytest.mark.parametrize("seed", range(5))
def test_lemmas_4_4_and_4_6_constants_grow_at_most_by_k(seed: int) -> None:
    """Smoothness exactly, by Hessians; the Lipschitz constant by gradients at the same points."""
    root = noise(D + M, D + M, seed=seed)
    loss = quadratic(root @ root.t())
    beta = extremes(root @ root.t())[1]
    total_beta = extremes(hessian(over_tasks(loss), noise(D + K * M)))[1]
    assert total_beta <= K * beta * (1 + 1e-12)
    # k is needed: a loss of the shared part alone is k times as steep.
    shared_alone = torch.diag(torch.tensor([1.0] * D + [0.0] * M, dtype=torch.float64))
    H = hessian(over_tasks(quadratic(shared_alone)), noise(D + K * M))
    assert extremes(H)[1] == pytest.approx(K * extremes(shared_alone)[1])
    z = noise(D + K * M, seed=seed)
    gammas = [torch.cat(jacobian(curved, (z[:D], y))).norm() for y in z[D:].view(K, M)]
    assert jacobian(over_tasks(curved), z).norm() <= K * max(gammas)


@pytest.mark.parametrize("seed", range(5))
def test_lemma_4_8_where_its_premise_holds(seed: int) -> None:
    """alpha-strong convexity of each task, ``(k-1)(alpha_0 - alpha) <= alpha/2``: then alpha/2 together."""
    root = noise(D + M, D + M, seed=seed)
    # Close to the identity, as the premise forces it to be.
    Q = torch.eye(D + M, dtype=torch.float64) + 0.01 * (root + root.t()) / (2 * (D + M))
    alpha, alpha_0 = extremes(Q)[0], extremes(Q[:D, :D])[1]
    assert (K - 1) * (alpha_0 - alpha) <= alpha / 2
    assert extremes(hessian(over_tasks(quadratic(Q)), noise(D + K * M)))[0] >= alpha / 2


def printed(k: int) -> Tensor:
    """The matrix of lemma A.1, ``(k + 1, k + 1)``."""
    H = torch.eye(k + 1, dtype=torch.float64) * 4
    H[0, 1:] = H[1:, 0] = -3
    return H


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_lemma_a_1_as_printed(k: int) -> None:
    """Part 1, the sum of all entries; part 2, each task's own block is positive; together they are not, from k = 2."""
    H = printed(k)
    assert H.sum().item() == -2 * k + 4
    assert extremes(H[:2, :2])[0] == pytest.approx(1.0)
    # Its smallest eigenvalue is 4 - 3 sqrt(k): negative for k = 2 already, where the sum of the entries is still zero.
    assert extremes(H)[0] == pytest.approx(4 - 3 * k**0.5)
    assert (extremes(H)[0] < 0) == (k >= 2)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_lemma_a_1_is_not_of_definition_1_1(k: int) -> None:
    """Its corner is one task's, where definition 1.1 adds up k of them: that sum is as convex as each task."""
    loss = quadratic(printed(1))
    z = noise(1 + k)

    def total(point: Tensor) -> Tensor:
        return torch.stack([loss(point[:1], y[None]) for y in point[1:]]).sum()

    H = hessian(total, z)
    assert H[0, 0].item() == pytest.approx(4 * k)
    torch.testing.assert_close(H[1:, :], printed(k)[1:, :])
    assert extremes(H)[0] >= extremes(printed(1))[0] - 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_strong_convexity_needs_no_premise_under_definition_1_1(seed: int) -> None:
    """Lemma 4.8 asks for more than it needs: a sum of ``H_i >= alpha`` on ``(x, y_i)`` is ``>= alpha`` on all."""
    root = noise(D + M, D + M, seed=seed)
    Q = root @ root.t() + 0.1 * torch.eye(D + M, dtype=torch.float64)
    alpha, alpha_0 = extremes(Q)[0], extremes(Q[:D, :D])[1]
    assert (K - 1) * (alpha_0 - alpha) > alpha / 2, "the premise holds; nothing beyond it was shown"
    assert extremes(hessian(over_tasks(quadratic(Q)), noise(D + K * M)))[0] >= alpha * (1 - 1e-12)


def softmax_loss(A: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    """Definition B.1: ``0.5 ||softmax(A x) - b||^2``."""
    return lambda x: 0.5 * (torch.softmax(A @ x, dim=0) - b).square().sum()


def case(n: int, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return noise(n, d, seed=seed), torch.softmax(noise(n, seed=seed + 100), dim=0), noise(d, seed=seed + 200)


def middle(f: Tensor, b: Tensor) -> Tensor:
    """``B(x)`` of lemma B.4 as printed."""
    return (
        (3 * f - 2 * b) @ f * torch.outer(f, f)
        + torch.outer(b * f, f)
        + torch.outer(f, b * f)
        + (f - b) @ f * torch.diag(f)
        + torch.diag((2 * f - b) * f)
    )


def corrected(f: Tensor, b: Tensor) -> Tensor:
    """``B(x)`` with the derivative carried through: other signs and factors than the printed one."""
    return (
        (3 * f - 2 * b) @ f * torch.outer(f, f)
        + torch.outer(b * f, f)
        + torch.outer(f, b * f)
        - 2 * (torch.outer(f * f, f) + torch.outer(f, f * f))
        - (f - b) @ f * torch.diag(f)
        + torch.diag((2 * f - b) * f)
    )


SIZES = [(10, 5), (10, 20), (20, 10)]


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_lemma_b_3_gradient_of_softmax_regression(n: int, d: int) -> None:
    A, b, x = case(n, d, seed=n + d)
    f = torch.softmax(A @ x, dim=0)
    c = f - b
    exact = A.t() @ (-f * (c @ f) + f * c)
    assert_close(jacobian(softmax_loss(A, b), x), exact, torch.float64, 16, n, what="gradient")


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_lemma_b_4_hessian_of_softmax_regression(n: int, d: int) -> None:
    """Right in the corrected form; the printed form is off by more than rounding."""
    A, b, x = case(n, d, seed=n + d)
    f = torch.softmax(A @ x, dim=0)
    got = hessian(softmax_loss(A, b), x)
    assert_close(got, A.t() @ corrected(f, b) @ A, torch.float64, 64, n, wrong=[A.t() @ middle(f, b) @ A], what="H")


@pytest.mark.parametrize(("n", "d"), SIZES)
def test_table_3_softmax_regression_is_never_strongly_convex(n: int, d: int) -> None:
    """alpha = 0.00 in the paper: the premise of its own theorem fails on its own example. It is not even convex."""
    lowest = []
    for seed in range(20):
        A, b, x = case(n, d, seed=1000 * seed)
        lowest.append(extremes(hessian(softmax_loss(A, b), x))[0])
    assert max(lowest) < 1e-2
    assert min(lowest) < -1e-6, "no point with a direction downwards was found"


def test_softmax_regression_is_flat_along_the_ones() -> None:
    """Whoever shifts all logits changes nothing: with ``A v = 1`` the Hessian has an eigenvalue 0 for every x."""
    n, d = 6, 6
    A, b, x = case(n, d, seed=1)
    H = hessian(softmax_loss(A, b), x)
    v = torch.linalg.solve(A, torch.ones(n, dtype=torch.float64))
    assert (H @ v).norm() < 1e-10 * H.norm() * v.norm()
    assert H.norm() > 1e-3
