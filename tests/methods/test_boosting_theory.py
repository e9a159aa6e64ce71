"""What the XGBLoRA paper (arXiv 2410.19694, appendices A to C) proves of boosting with low-rank updates, corrected.

The appendix treats linear models, and so does this file (boosting_problem.py): ``L(W)`` convex in one weight ``W (out,
in)``, in float64, with nothing drawn that a seed does not fix. Where an expectation over minibatches is claimed, it is
taken over all sequences of minibatches, so that no tolerance hides chance. The paper writes the update of a round as
``A B^T``; here it is ``D = B A``, ``B (out, r)``, ``A (r, in)``. ``beta`` and ``mu`` bound the Hessian from above and
below, ``k = min(out, in)``, ``G`` is the gradient and ``[G]_r`` its best rank-r approximation.

Each test says what is printed, what is wrong with it, and what holds instead; each printed form that is false meets an
example in which it fails.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from boosting_problem import (
    EPS,
    EXACT,
    IN,
    OUT,
    PROBLEMS,
    ROWS,
    ZERO,
    LeastSquares,
    LogCosh,
    Path,
    best,
    minibatches,
    noise,
    squares,
    variance,
)
from torch import Tensor

from leantune.testing.closeness import assert_close

# Lemma 4: how a booster approximates the gradient


@pytest.mark.parametrize("r", [1, 2, 3])
def test_lemma_4_rank_r_loses_at_most_half_of_what_is_printed(r: int) -> None:
    """Printed (step 3): ``||G - [G]_r||_F <= ||G||_* / sqrt(r)``. True, and so is half of it: the tail's squares sum to
    at most ``s_r (N - r s_r) <= N^2 / 4r`` with ``N = ||G||_*``. A flat spectrum of 2r values attains it.
    """
    for seed in range(20):
        G = noise(seed, 8, 6)
        lost = (G - best(G, r)).norm()
        assert lost <= torch.linalg.matrix_norm(G, "nuc") / (2 * math.sqrt(r)) + EPS
    flat = torch.eye(2 * r, dtype=EXACT)
    assert_close((flat - best(flat, r)).norm(), torch.tensor(2 * r / (2 * math.sqrt(r)), dtype=EXACT), EXACT, 8, 8)


def test_lemma_4_as_printed_fails() -> None:
    """Printed: ``||grad L(W + D) - D||_F <= C1 / sqrt(r) + C2 / sqrt(M)`` with C1 from the nuclear norm of that
    gradient and C2 from the noise of its minibatches. The two terms on the left have different units and opposite
    signs: a booster that reached the optimum has a gradient of zero and is itself as large as ever.
    """
    problem = LeastSquares.of(0)
    # Full rank and the whole batch, so that neither the rank nor the noise can be blamed.
    D = problem.optimum() - ZERO
    G = problem.gradient(ZERO + D)
    C1, C2 = torch.linalg.matrix_norm(G, "nuc").item(), 0.0
    assert C1 < EPS
    assert (G - D).norm() > 0.5 > C1 / math.sqrt(IN) + C2


@pytest.mark.parametrize("M", [1, 2, 4])
@pytest.mark.parametrize("r", [1, 2])
def test_lemma_4_corrected_for_the_best_booster(r: int, M: int) -> None:
    """Holds: with the step size that is missing, ``D = -eta [G_M]_r`` for the mean ``G_M`` of M minibatch gradients at
    ``W`` of variance ``v``::

        E ||D / eta + G||_F <= (||G||_* + sqrt(k v / M)) / (2 sqrt(r)) + sqrt(v / M)

    by the rank bound above on ``G_M`` (``||.||_* <= sqrt(k) ||.||_F`` on its noise) and Jensen. The law of large
    numbers, printed instead, gives no rate; independence and a finite variance do.
    """
    problem = LeastSquares.of(2)
    W, eta = noise(9, OUT, IN), 0.37
    G, v = problem.gradient(W), variance(problem, W)
    each = torch.stack([batch.gradient(W) for batch in minibatches(problem)])
    means = torch.stack([each[list(drawn)].mean(0) for drawn in itertools.product(range(len(each)), repeat=M)])
    error = (-eta * best(means, r) / eta + G).square().sum((-2, -1)).sqrt().mean()
    nuclear = torch.linalg.matrix_norm(G, "nuc").item()
    assert error <= (nuclear + math.sqrt(min(OUT, IN) * v / M)) / (2 * math.sqrt(r)) + math.sqrt(v / M)
    # The noise part alone: exact, so that the bound above rests on a true premise.
    assert_close(squares(means - G).mean(), torch.tensor(v / M, dtype=EXACT), EXACT, 32, 64)


def test_lemma_4_corrected_for_a_trained_booster() -> None:
    """Printed (step 4): the trained update is about the mean of the minibatch gradients. That mean has full rank in
    general. Holds: from ``B = 0`` the booster is the sum of the gradients it met, seen through the ``A`` it began
    with, up to the third order: ``||D + eta sum_k G_k A0^T A0||_F <= a^2 (sinh(2 s) / 2 - s)`` with ``a = ||A0||_F``,
    ``s = eta M max ||G_k||_2``. Every word of the expansion of ``B_M A_M`` is bounded by its scalar counterpart
    (Lemma 5), and the words of first order are the sum itself.
    """
    problem = LeastSquares.of(4)
    A0, errors = noise(5, 2, IN) / 2, []
    for eta in (0.02, 0.01):
        path = Path.train(minibatches(problem), ZERO, A0, eta)
        first = -eta * sum(path.gradients, torch.zeros_like(ZERO)) @ A0.T @ A0
        s = eta * len(path.gradients) * path.bound
        errors.append((path.B @ path.A - first).norm().item())
        assert errors[-1] <= squares(A0) * (math.sinh(2 * s) / 2 - s)
        assert errors[-1] < 0.1 * first.norm()
    # Half the step, an eighth of the error.
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.15)


@pytest.mark.parametrize("r", [1, 2, 4, 8])
def test_lemma_4_fails_for_a_random_start(r: int) -> None:
    """Not in the appendix: what ``A0`` sees. The lemma compares with ``[G]_r``, but a random orthonormal ``A`` keeps
    ``E ||G A^T A||_F^2 = (r / in) ||G||_F^2`` (here exactly, over coordinate frames), so its error is ``sqrt(1 - r /
    in)`` of ``||G||_F``, above what is printed from r = 2 on. The top right singular vectors as ``A`` give ``[G]_r``:
    this is the gradient-aligned start.
    """
    d = 16
    G = noise(7, 8, 1) @ noise(8, 1, d)
    frames = torch.eye(d, dtype=EXACT)
    # Unions of r consecutive coordinates, cyclically: each coordinate stands in r of d frames.
    lost = [squares(G - G[:, kept] @ frames[kept]) for kept in ([(i + j) % d for j in range(r)] for i in range(d))]
    assert_close(torch.stack(lost).mean(), (1 - r / d) * squares(G), EXACT, 8, 64)
    printed = torch.linalg.matrix_norm(G, "nuc") / math.sqrt(r)
    assert (torch.stack(lost).mean().sqrt() > printed) == (r >= 2)
    A = torch.linalg.svd(G).Vh[:r]
    assert (G - G @ A.T @ A).norm() < EPS * G.norm()


# Lemma 5: how far the factors of a booster go


def test_lemma_5_as_printed_speaks_of_a_booster_that_never_moves() -> None:
    """Printed: ``||A||_F <= eta M G`` and ``||B||_F <= eta M G`` after M steps from ``A = 0``. The gradient of ``A`` is
    ``B^T G`` and that of ``B`` is ``G A^T``: with ``B = 0`` too, as in a fresh booster, both are zero always. From the
    start of LoRA, ``A0`` random, the printed bound fails; so do the inequalities of its steps 4 and 5, which together
    would force ``A = 0`` whenever ``eta M G < 1``.
    """
    batches = minibatches(LeastSquares.of(0))
    still = Path.train(batches, ZERO, torch.zeros(2, IN, dtype=EXACT), 0.1)
    assert still.bound > 0.1
    assert not still.A.any()
    assert not still.B.any()
    moved = Path.train(batches, ZERO, noise(1, 2, IN), 0.01)
    frobenius = 0.01 * len(batches) * max(G.norm().item() for G in moved.gradients)
    assert frobenius < 1
    assert moved.A.norm() > frobenius
    assert moved.A.norm() > frobenius * moved.B.norm()
    assert moved.B.any()


@pytest.mark.parametrize("step", [0.01, 0.1, 0.3])
def test_lemma_5_corrected(step: float) -> None:
    """Holds: from ``B = 0`` and ``||A0||_F = a``, with all gradients at most ``G`` in spectral norm and ``x = eta G``::

        ||A_M||_F <= a ((1 + x)^M + (1 - x)^M) / 2 <= a cosh(x M)
        ||B_M||_F <= a ((1 + x)^M - (1 - x)^M) / 2 <= a sinh(x M)

    since ``(||A||, ||B||)`` grow no faster than ``(p, q) -> (p + x q, q + x p)``, whose sum and difference are
    geometric. For small ``x M`` the factor that trains is ``B``, at most ``a x M``, and ``A`` stays where it began.
    """
    for seed in range(6):
        batches = minibatches(LeastSquares.of(seed))
        A0 = noise(seed + 50, 2, IN)
        path = Path.train(batches, ZERO, A0, step)
        a, x, M = A0.norm().item(), step * path.bound, len(batches)
        even, odd = ((1 + x) ** M + (1 - x) ** M) / 2, ((1 + x) ** M - (1 - x) ** M) / 2
        assert path.A.norm() <= a * even + EPS <= a * math.cosh(x * M) + 2 * EPS
        assert path.B.norm() <= a * odd + EPS <= a * math.sinh(x * M) + 2 * EPS


def test_lemma_5_corrected_is_attained() -> None:
    """One weight and the loss ``-g w``: the recursion of the bound is then the training itself."""
    a, eta, g, M = 0.7, 0.2, 1.5, 6
    A, B = a, 0.0
    for _ in range(M):
        A, B = A + eta * g * B, B + eta * g * A
    x = eta * g
    assert pytest.approx(a * ((1 + x) ** M + (1 - x) ** M) / 2, rel=EPS) == A
    assert pytest.approx(a * ((1 + x) ** M - (1 - x) ** M) / 2, rel=EPS) == B
    assert a * g * eta * M < B


# Lemma 6: the gradient is Lipschitz


@pytest.mark.parametrize("problem", PROBLEMS)
def test_lemma_6_holds(problem: type[LeastSquares] | type[LogCosh]) -> None:
    """Printed: ``||grad L(W1) - grad L(W2)||_F <= L ||W1 - W2||_F`` for a Hessian of at most L (or L'). True."""
    made = problem.of(3)
    for seed in range(20):
        one, other = 2 * noise(seed, OUT, IN), 2 * noise(seed + 100, OUT, IN)
        change = (made.gradient(one) - made.gradient(other)).norm()
        assert change <= made.bounds[0] * (one - other).norm() * (1 + EPS)


def test_lemma_6_is_attained_by_least_squares() -> None:
    """Along the top eigenvector of the Hessian: no smaller constant will do."""
    problem = LeastSquares.of(3)
    top = torch.linalg.eigh(problem.hessian).eigenvectors[:, -1]
    D = torch.outer(noise(4, OUT), top)
    change = (problem.gradient(D) - problem.gradient(ZERO)).norm()
    assert_close(change, problem.bounds[0] * D.norm(), EXACT, 16, 32)


def test_lemma_6_has_no_mean_value() -> None:
    """Printed (step 3): one ``W_t`` between the two with ``grad L(W1) - grad L(W2) = Hessian(W_t) (W1 - W2)``. In more
    than one dimension there need be none: for ``u^3 / 6 + v^4 / 12`` between (0, 0) and (1, 1) the first entry asks for
    t = 1/2 and the second for t = sqrt(1/3). (A ridge makes it strongly convex and changes nothing.) Holds: the
    Hessian's mean over the way between, and the norm of a mean is at most the largest norm.
    """
    t = torch.linspace(0, 1, 1001, dtype=EXACT)
    off = torch.maximum((t - 1 / 2).abs(), (t.square() - 1 / 3).abs())
    assert off.min() > 0.03
    problem = LogCosh.of(5)
    one, other = noise(1, OUT, IN), noise(2, OUT, IN)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    mean = sum(
        weight / 2 * problem.hessian_times(other + (node + 1) / 2 * (one - other), one - other)
        for node, weight in zip(nodes, weights, strict=True)
    )
    assert isinstance(mean, Tensor)
    assert_close(mean, problem.gradient(one) - problem.gradient(other), EXACT, 1e3, 60)


# Theorem 3: rounds reach the optimum


def vanishing_steps(rounds: int) -> tuple[float, float, float, float]:
    """``(L(W_T) - L*, L(W_0) - L*, mu, G)`` of boosters of full rank, whole batches, and steps near zero.

    ``L = mu / 2 ||W - c e e^T||^2`` on a 4 x 4 weight: one entry is wrong. ``A = I`` and one step on ``B``.
    """
    mu, c, eta = 0.4, 1.0, 1e-9
    target = torch.zeros(4, 4, dtype=EXACT)
    target[0, 0] = c
    W = torch.zeros(4, 4, dtype=EXACT)
    for _ in range(rounds):
        W = W - eta * mu * (W - target)
    return (mu / 2 * squares(W - target)).item(), mu / 2 * c**2, mu, mu * c


def test_theorem_3_as_printed_fails() -> None:
    """Printed: ``E L(W_T) - L* <= C3 / sqrt(T) + C4 / (N T) + C5 / r``; proven is ``C4 / (M sqrt(T))`` and, a line
    before, ``C1 / sqrt(r)``. The constants (``alpha = 1 - (L + beta / 2) eta^2 M^2 G^2``, ``C3 = (L_0 - L*) / 2 mu
    alpha``, ``C5 = G C1 / 2 mu alpha``) stay finite as the step goes to zero, where nothing is learned: the step size
    is lost with Lemma 4. Here there is no noise (C2 = 0), the rank is full, and both forms lie below the loss.
    """
    T, r = 400, 4
    excess, start, mu, G = vanishing_steps(T)
    alpha = 1 - 1.5 * mu * (1e-9 * G) ** 2
    assert 0 < 2 * mu * alpha < 1
    # The gradient has rank one: its nuclear norm is G.
    statement = start / (2 * mu * alpha) / math.sqrt(T) + G * G / (2 * mu * alpha) / r
    derivation = (1 - 2 * mu * alpha) ** T * start + G / (2 * mu * alpha) * G / math.sqrt(r)
    assert excess > 0.999 * start
    assert excess > 1.9 * derivation
    assert excess > 3 * statement


def test_theorem_3_has_the_wrong_sign() -> None:
    """Printed (steps 1 and 3): ``W + A B^T`` with ``A B^T`` close to the gradient. That climbs."""
    problem = LeastSquares.of(0)
    step = 1 / problem.bounds[0]
    down, up = (problem.loss(sign * step * best(problem.gradient(ZERO), 1)) for sign in (-1, 1))
    assert down < problem.loss(ZERO) < up


@pytest.mark.parametrize("r", [1, 2, 3])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_theorem_3_corrected_without_noise(kind: type[LeastSquares] | type[LogCosh], r: int) -> None:
    """Holds: with ``D = -[G]_r / beta`` each round gives ``L(W + D) <= L(W) - ||[G]_r||_F^2 / 2 beta`` (smoothness, and
    ``<G, [G]_r> = ||[G]_r||^2``), ``||[G]_r||_F^2 >= (r / k) ||G||_F^2`` and ``||G||_F^2 >= 2 mu (L - L*)``, so::

        L(W_T) - L* <= (1 - mu r / (beta k))^T (L(W_0) - L*)

    Geometric in T, and no floor: the rank sets the speed and not, as the printed ``C5 / r`` says, the place of arrival.
    """
    problem = kind.of(6)
    beta, mu = problem.bounds
    least = problem.loss(problem.optimum())
    W, start = ZERO, problem.loss(ZERO) - least
    rate = 1 - mu * r / (beta * min(OUT, IN))
    for T in range(1, 40):
        before, step = problem.loss(W), best(problem.gradient(W), r)
        W = W - step / beta
        assert problem.loss(W) <= before - squares(step) / (2 * beta) + EPS
        assert problem.loss(W) - least <= rate**T * start + EPS
    for _ in range(1500):
        W = W - best(problem.gradient(W), r) / beta
    assert problem.loss(W) - least < 1e-10 * start


@pytest.mark.parametrize(("r", "M"), [(1, 1), (2, 1), (1, 2)])
def test_theorem_3_corrected_with_noise(r: int, M: int) -> None:
    """Holds: with ``D = -eta [G_M]_r``, ``eta <= 1 / beta``, minibatches drawn anew each round and gradient variance at
    most ``v`` on the way::

        E L(W_T) - L* <= (1 - eta mu r / 2k)^T (L(W_0) - L*) + 2 k v / (mu r M)

    (``<G, D>`` splits into ``-eta ||[G_M]_r||^2 + eta <noise, [G_M]_r>``, and the latter is at most a quarter of the
    former plus ``eta ||noise||^2``.) The floor falls with M and not with T, against the printed ``C4 / (N T)``.
    """
    # Three minibatches of the same inputs, whose targets differ a little from what a weight can do: v is constant.
    X = torch.cat([2 * torch.eye(IN, dtype=EXACT), noise(8, IN, 1)], 1).repeat(1, 3)
    problem = LeastSquares(X, noise(18, OUT, IN) @ X + 0.1 * noise(9, OUT, ROWS))
    beta, mu = problem.bounds
    eta, k = 1 / beta, min(OUT, IN)
    least = problem.loss(problem.optimum())
    start = problem.loss(ZERO) - least
    batches = minibatches(problem, 4)
    draws = list(itertools.product(range(len(batches)), repeat=M))
    # All sequences of draws at once: a stack of weights that grows by the number of draws each round.
    W, v = ZERO[None], 0.0
    for T in range(1, 7 if M == 1 else 4):
        each = torch.stack([batch.gradient(W) for batch in batches])
        v = max(v, squares(each - problem.gradient(W)).mean(0).max().item())
        means = torch.stack([each[list(drawn)].mean(0) for drawn in draws])
        W = (W - eta * best(means, r)).flatten(0, 1)
        assert len(W) == len(draws) ** T
        bound = (1 - eta * mu * r / (2 * k)) ** T * start + 2 * k * v / (mu * r * M)
        assert problem.loss(W).mean() - least <= bound
        assert bound < start


def test_theorem_3_noise_leaves_a_floor_that_rounds_do_not_lower() -> None:
    """One weight, ``L = w^2 / 2``, gradients ``w +- s``: the mean of ``w^2`` over all sequences follows ``(1 - eta)^2
    w^2 + eta^2 s^2 / M`` and stays at ``eta s^2 / (M (2 - eta))``, however many rounds; four times the minibatches
    quarter it.
    """
    eta, s, floors = 0.5, 1.0, {}
    for M in (1, 4):
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=M)), dtype=EXACT).mean(1)
        w, seen = torch.zeros(1, dtype=EXACT), []
        for _ in range(12 // M):
            w = (w[:, None] - eta * (w[:, None] + s * signs)).flatten()
            seen.append(w.square().mean().item())
        floors[M] = eta * s**2 / (M * (2 - eta))
        decay = (1 - eta) ** 2
        assert seen == pytest.approx([floors[M] * (1 - decay**t) for t in range(1, len(seen) + 1)], rel=1e-9)
    assert floors[1] == 4 * floors[4] > 0.3


@pytest.mark.parametrize("r", [1, 2])
def test_theorem_3_corrected_for_random_boosters(r: int) -> None:
    """Holds: a booster of random orthonormal ``A`` and one step on ``B``, ``D = -G A^T A / beta``, keeps ``r / in`` of
    the squared gradient on average, so ``E L(W_T) - L* <= (1 - mu r / (beta in))^T (L(W_0) - L*)``: the SVD's rate with
    ``in`` for ``k``. Taken over all sequences of coordinate frames.
    """
    problem = LeastSquares.of(10)
    beta, mu = problem.bounds
    least = problem.loss(problem.optimum())
    start = problem.loss(ZERO) - least
    frames = [torch.eye(IN, dtype=EXACT)[list(kept)] for kept in itertools.combinations(range(IN), r)]
    projections = torch.stack([frame.T @ frame for frame in frames])
    assert torch.equal(projections.mean(0), torch.eye(IN, dtype=EXACT) * projections.mean(0)[0, 0])
    W = ZERO[None]
    for T in range(1, 7):
        G = problem.gradient(W)
        W = (W[:, None] - G[:, None] @ projections / beta).flatten(0, 1)
        excess = problem.loss(W).mean() - least
        assert excess <= (1 - mu * r / (beta * IN)) ** T * start
    assert excess < 0.9 * start


# Boosting: the booster as a weak learner of the negative gradient


def line_searched(problem: LeastSquares, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(B, A, decrease)`` of the rank-1 SVD of ``-G`` with the best step: ``B A = -t u v^T``."""
    G = problem.gradient(W)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    direction = torch.outer(U[:, 0], Vh[0])
    curvature = torch.trace(direction @ problem.hessian @ direction.T)
    t = S[0] / curvature
    return -t * U[:, :1], Vh[:1], S[0].square() / (2 * curvature)


def test_a_booster_takes_the_top_singular_value_off_the_loss() -> None:
    """The rank-1 SVD of ``-G`` with exact line search lowers a least-squares loss by ``s_1^2 / (2 v^T H v)``: at least
    ``||G||_2^2 / 2 beta``, and so at least ``||G||_F^2 / (2 beta k)``. No other rank-1 direction has a larger slope.
    """
    problem = LeastSquares.of(11)
    beta = problem.bounds[0]
    for seed in range(5):
        W = noise(seed, OUT, IN)
        B, A, decrease = line_searched(problem, W)
        G = problem.gradient(W)
        assert_close(problem.loss(W) - problem.loss(W + B @ A), decrease, EXACT, 64, 64)
        assert decrease >= torch.linalg.matrix_norm(G, 2) ** 2 / (2 * beta) >= squares(G) / (2 * beta * min(OUT, IN))
        other = torch.outer(noise(seed + 20, OUT), noise(seed + 30, IN))
        assert (G * other).sum().abs() / other.norm() < torch.linalg.matrix_norm(G, 2)


@pytest.mark.parametrize("shrinkage", [0.1, 0.5, 1.0, 1.5])
def test_shrinkage_keeps_its_share_of_the_decrease(shrinkage: float) -> None:
    """A booster scaled by ``n`` keeps exactly ``n (2 - n)`` of the best decrease of a quadratic loss: 19% at 0.1."""
    problem, W = LeastSquares.of(12), noise(13, OUT, IN)
    B, A, decrease = line_searched(problem, W)
    got = problem.loss(W) - problem.loss(W + shrinkage * B @ A)
    assert_close(got, shrinkage * (2 - shrinkage) * decrease, EXACT, 64, 64)


def test_the_sum_of_boosters_is_the_staged_model_and_reaches_the_optimum() -> None:
    """``f_T(x) = W0 x + sum_t B_t A_t x``, and ``L(W_T) - L* <= (1 - mu / (beta k))^T (L(W_0) - L*)``."""
    problem = LeastSquares.of(14)
    beta, mu = problem.bounds
    least, start = problem.loss(problem.optimum()), problem.loss(ZERO)
    W, staged, pairs = ZERO, ZERO @ problem.X, []
    for T in range(1, 200):
        B, A, _ = line_searched(problem, W)
        pairs.append((B, A))
        W, staged = W + B @ A, staged + B @ (A @ problem.X)
        assert problem.loss(W) - least <= (1 - mu / (beta * min(OUT, IN))) ** T * (start - least) + EPS
    joined_B, joined_A = torch.cat([B for B, _ in pairs], 1), torch.cat([A for _, A in pairs])
    assert_close(staged, (joined_B @ joined_A) @ problem.X, EXACT, 64, 200)
    assert_close(staged, problem.optimum() @ problem.X, EXACT, 1e6, 200)


# Theorem 4: what boosters can express


def test_theorem_4_as_printed_fails() -> None:
    """Printed: ``E (f_T(x) - f*(x))^2 <= C6 (1 / r + 1 / (M sqrt(T)) + 1 / sqrt(T))`` with ``C6 = max(2 K1, 2 L_f^2
    ||dW||_*^2)``. It stands on Theorem 3, whose ``C5 / r`` it drops, and falls with it: no step, no fit. With M = T,
    both large, and inputs of covariance ``mu I``, the error is ``mu ||W_T - W*||_F^2``.
    """
    T, r, c = 400, 4, 1.0
    excess, start, mu, _ = vanishing_steps(T)
    K1, L_f_squared = start / (2 * mu), mu
    C6 = max(2 * K1, 2 * L_f_squared * c**2)
    assert 2 * L_f_squared * c**2 == C6
    assert 2 * excess > 0.999 * mu * c**2
    # Steps 4 and 8 as they stand; the last step then only says that 1 / (r T) <= 1 / r.
    derivation = 2 * K1 * (1 / math.sqrt(T) + 1 / (T * math.sqrt(T))) + 2 * L_f_squared * c**2 / (r * T)
    assert 2 * excess > 10 * derivation


@pytest.mark.parametrize(("r", "rounds"), [(1, 3), (2, 2), (3, 1)])
def test_theorem_4_corrected_boosters_express_any_change_of_their_summed_rank(r: int, rounds: int) -> None:
    """Holds: a change of rank k is a sum of ``ceil(k / r)`` boosters, and no fewer; the printed (step 7) ``||dW||_* /
    sqrt(r T)`` is a bound where zero is true. With inputs of covariance I the greedy boosters are that very sum.
    """
    wanted = noise(15, OUT, IN)
    # f*(x) = W* x on orthonormal inputs: L = ||W - W*||^2 / 2, beta = mu = 1.
    X = math.sqrt(IN) * torch.eye(IN, dtype=EXACT)
    problem = LeastSquares(X, wanted @ X)
    W = ZERO
    for T in range(1, rounds + 1):
        W = W - best(problem.gradient(W), r)
        nuclear = torch.linalg.matrix_norm(wanted, "nuc")
        assert (W - wanted).norm() <= nuclear / (2 * math.sqrt(r * T)) + EPS
        assert ((W - wanted).norm() < EPS) == (rounds == T)


@pytest.mark.parametrize("r", [1, 2])
def test_theorem_4_corrected_on_any_inputs(r: int) -> None:
    """Holds: for ``f*(x) = W* x`` the error over the rows is ``2 (L(W_T) - L*)``, hence at most ``2 (1 - mu r / (beta
    k))^T (L(W_0) - L*)``: it goes to zero with T at any rank, without the printed ``1 / r``.
    """
    problem = LeastSquares.of(16)
    true = noise(17, OUT, IN)
    problem = LeastSquares(problem.X, true @ problem.X)
    beta, mu = problem.bounds
    W, start = ZERO, problem.loss(ZERO)
    for T in range(1, 60):
        W = W - best(problem.gradient(W), r) / beta
        error = squares((W - true) @ problem.X) / ROWS
        # Both are sums of squares of small differences of numbers around one.
        assert abs(error - 2 * problem.loss(W)) <= EPS * error.sqrt()
        assert error <= 2 * (1 - mu * r / (beta * min(OUT, IN))) ** T * start
    for _ in range(1000):
        W = W - best(problem.gradient(W), r) / beta
    assert squares((W - true) @ problem.X) / ROWS < 1e-10 * start
