"""What the LoRA-SB paper (arXiv 2411.19557) proves, in float64: Lemma 1 and Theorems 2 to 5 of its appendices B and C.

Each with its premises, and with an example where a premise fails. The loss is a smooth function of a weight that is
neither linear nor quadratic, so that nothing holds by accident. Notation of the paper: ``W = W0 + s B R A``,
``g = dL/dW``, ``g_R = dL/dR`` (the paper's ``g^R_LoRA-XS``), equivalent gradient ``s B x A`` of a step ``x`` in ``R``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import leantune
from leantune import LoraXSConfig
from leantune.methods._core_factor import CoreFactors
from leantune.testing.closeness import assert_close, assert_differs

OUT, IN, RANK = 11, 7, 3
EXACT = torch.float64


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=EXACT)


def loss_of(weight: Tensor) -> Tensor:
    """Cross-entropy of a softmax classifier on fixed rows, as a function of its weight ``(OUT, IN)``."""
    rows, labels = noise(1, 40, IN), torch.arange(40) % OUT
    return torch.nn.functional.cross_entropy(rows @ weight.T, labels)


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    (found,) = torch.autograd.grad(function(at), at)
    return found


@dataclass(frozen=True)
class Point:
    """A weight ``W0 + s B R A``, and what the paper derives at it."""

    B: Tensor
    R: Tensor
    A: Tensor
    s: float = 1.0

    def weight(self, R: Tensor) -> Tensor:
        return noise(2, OUT, IN) + self.s * self.B @ R @ self.A

    def loss(self, R: Tensor) -> Tensor:
        return loss_of(self.weight(R))

    @cached_property
    def g(self) -> Tensor:
        return gradient(loss_of, self.weight(self.R))

    @cached_property
    def g_R(self) -> Tensor:
        return gradient(self.loss, self.R)

    @cached_property
    def best(self) -> Tensor:
        """Theorem 2: ``1/s^2 (B^T B)^-1 g_R (A A^T)^-1``."""
        left, right = self.B.T @ self.B, self.A @ self.A.T
        return torch.linalg.solve(left, torch.linalg.solve(right, self.g_R.T).T) / self.s**2

    def equivalent(self, step: Tensor) -> Tensor:
        return self.s * self.B @ step @ self.A

    def error(self, step: Tensor) -> float:
        return float(torch.linalg.matrix_norm(self.equivalent(step) - self.g))


def skewed(s: float = 1.7) -> Point:
    """Factors of full rank that are far from orthonormal."""
    scale = torch.tensor([3.0, 1.0, 0.2], dtype=EXACT)
    return Point(noise(3, OUT, RANK) * scale, noise(4, RANK, RANK), noise(5, RANK, IN), s)


def orthonormal(s: float = 1.0, R: Tensor | None = None) -> Point:
    B = torch.linalg.qr(noise(3, OUT, RANK)).Q
    A = torch.linalg.qr(noise(5, IN, RANK)).Q.T
    return Point(B, noise(4, RANK, RANK) if R is None else R, A, s)


def started(target: Tensor, s: float = 1.0) -> Point:
    """LoRA-SB's start (equations 1 and 2) from the first step of full fine-tuning."""
    U, S, Vh = torch.linalg.svd(target, full_matrices=False)
    return Point(U[:, :RANK], torch.diag(S[:RANK]) / s, Vh[:RANK], s)


def truncated(matrix: Tensor) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :RANK] * S[:RANK] @ Vh[:RANK]


class TestLemma1:
    """The gradient of ``R`` is ``s B^T g A^T``."""

    @pytest.mark.parametrize("point", [skewed(), skewed(0.3), orthonormal(), orthonormal(2.0)])
    def test_the_gradient_of_r(self, point: Point) -> None:
        formula = point.s * point.B.T @ point.g @ point.A.T
        at_base = point.s * point.B.T @ gradient(loss_of, noise(2, OUT, IN)) @ point.A.T
        wrong = [at_base, formula.T, point.s * formula if point.s != 1 else 2 * formula]
        assert_close(point.g_R, formula, EXACT, k=50, depth=OUT * IN, wrong=wrong)

    def test_nothing_moves_where_a_factor_is_zero(self) -> None:
        point = replace(skewed(), B=torch.zeros(OUT, RANK, dtype=EXACT))
        assert float(point.g.abs().max()) > 1e-3
        assert not point.g_R.any()


class TestTheorem2:
    """``1/s^2 (B^T B)^-1 g_R (A A^T)^-1`` is the step whose equivalent gradient is nearest to ``g``."""

    @pytest.mark.parametrize("point", [skewed(), skewed(0.3), orthonormal(), orthonormal(2.0)])
    def test_it_solves_the_least_squares_problem(self, point: Point) -> None:
        # vec(s B X A) = s (B kron A^T) vec(X), with rows one after the other.
        columns = point.s * torch.kron(point.B.contiguous(), point.A.T.contiguous())
        solved = torch.linalg.lstsq(columns, point.g.reshape(-1, 1)).solution.reshape(RANK, RANK)
        assert_close(point.best, solved, EXACT, k=1e4, depth=OUT * IN)

    def test_every_other_step_is_further_from_the_full_gradient(self) -> None:
        point = skewed()
        for seed in range(20):
            for size in (1e-3, 1.0):
                assert point.error(point.best + size * noise(100 + seed, RANK, RANK)) > point.error(point.best)

    def test_what_it_leaves_is_orthogonal_to_all_that_the_factors_reach(self) -> None:
        point = skewed()
        left = point.B.T @ (point.equivalent(point.best) - point.g) @ point.A.T
        assert float(left.abs().max()) < 1e-12 * float((point.B.T @ point.g @ point.A.T).abs().max())

    def test_the_plain_gradient_is_the_best_step_when_both_factors_are_orthonormal_and_s_is_1(self) -> None:
        point = orthonormal()
        assert_close(point.g_R, point.best, EXACT, k=50, depth=OUT * IN)

    def test_it_is_not_when_they_are_not_whatever_its_length(self) -> None:
        """LoRA-XS: ``B = U S`` is not orthonormal. No learning rate makes up for it."""
        U, S, Vh = torch.linalg.svd(noise(2, OUT, IN), full_matrices=False)
        point = Point(U[:, :RANK] * S[:RANK], torch.zeros(RANK, RANK, dtype=EXACT), Vh[:RANK])
        plain = point.equivalent(point.g_R)
        length = float((plain * point.g).sum() / plain.square().sum())
        assert point.error(length * point.g_R) > 1.01 * point.error(point.best)

    def test_nor_when_s_is_not_1(self) -> None:
        point = orthonormal(2.0)
        assert_close(point.best, point.g_R / 4, EXACT, k=50, depth=OUT * IN)
        assert point.error(point.g_R) > 1.01 * point.error(point.best)

    def test_without_full_rank_there_is_no_such_step(self) -> None:
        B = noise(3, OUT, RANK)
        B[:, 2] = B[:, 0]
        point = replace(skewed(), B=B)
        assert int(torch.linalg.matrix_rank(B.T @ B)) == RANK - 1
        # The nearest gradient is still there, but many steps give it: no inverse can pick one.
        direction = torch.tensor([[1.0], [0.0], [-1.0]], dtype=EXACT) @ noise(6, 1, RANK)
        assert float(direction.norm()) > 1
        assert float(point.equivalent(direction).norm()) < 1e-12


class TestTheorem3:
    """The step of Theorem 2 changes the loss by ``-eta <g_R, step> + o(eta)``, which is never above zero."""

    @pytest.mark.parametrize("point", [skewed(), skewed(0.3), orthonormal()])
    def test_the_loss_falls_by_the_first_order_amount(self, point: Point) -> None:
        slope = float((point.g_R * point.best).sum())
        assert slope > 0
        rest = []
        for rate in (1e-2, 5e-3, 2.5e-3):
            change = float(point.loss(point.R - rate * point.best) - point.loss(point.R))
            assert change < 0
            rest.append(abs(change + rate * slope) / rate)
        # What is left over is o(rate): here of second order, so that halving the rate halves its share.
        assert rest[1] == pytest.approx(rest[0] / 2, rel=0.05)
        assert rest[2] == pytest.approx(rest[1] / 2, rel=0.05)

    def test_the_slope_is_a_square_whatever_the_factors(self) -> None:
        """``<g_R, step> = |V^T g_R U|^2 / s^2`` with Cholesky factors of the two inverses."""
        point = skewed()
        V = torch.linalg.cholesky(torch.linalg.inv(point.B.T @ point.B))
        U = torch.linalg.cholesky(torch.linalg.inv(point.A @ point.A.T))
        square = (V.T @ point.g_R @ U).square().sum() / point.s**2
        assert float((point.g_R * point.best).sum()) == pytest.approx(float(square), rel=1e-10)

    def test_it_needs_a_small_step(self) -> None:
        point = orthonormal(R=torch.zeros(RANK, RANK, dtype=EXACT))
        assert float(point.loss(point.R - 1e-2 * point.best)) < float(point.loss(point.R))
        assert float(point.loss(point.R - 1e4 * point.best)) > float(point.loss(point.R))

    def test_zero_is_reached_where_the_factors_see_nothing_of_the_gradient(self) -> None:
        """The printed guarantee is ``<= 0``, not ``< 0``: a subspace orthogonal to the gradient learns nothing."""
        g = gradient(loss_of, noise(2, OUT, IN))
        U, _, Vh = torch.linalg.svd(g, full_matrices=True)
        # The last left vectors belong to no singular value: they are orthogonal to every column of g.
        point = Point(U[:, -RANK:], torch.zeros(RANK, RANK, dtype=EXACT), Vh[:RANK])
        assert float(point.g.norm()) > 1e-2
        assert float(point.best.norm()) < 1e-12
        assert float(point.loss(point.R - 1e-2 * point.best)) == pytest.approx(float(point.loss(point.R)), abs=1e-14)


class TestTheorem4:
    """The equivalent gradient does not depend on ``s`` with the step of Theorem 2; with the plain gradient it does."""

    @pytest.mark.parametrize("make", [skewed, orthonormal])
    def test_the_equivalent_gradient(self, make: Callable[[float], Point]) -> None:
        first = make(1.0)
        for s in (0.25, 4.0):
            # The same weight: what changes is how it is written down.
            other = replace(first, s=s, R=first.R / s)
            formula = first.B @ torch.linalg.pinv(first.B) @ first.g @ torch.linalg.pinv(first.A) @ first.A
            assert_close(other.equivalent(other.best), formula, EXACT, k=1e4, depth=OUT * IN)
            plain = first.equivalent(first.g_R)
            assert_close(other.equivalent(other.g_R), s**2 * plain, EXACT, k=1e3, depth=OUT * IN, wrong=[plain])

    def _trained(self, s: float, step: Callable[[Point], Tensor]) -> Tensor:
        point = orthonormal()
        point = replace(point, s=s, R=point.R / s)
        for _ in range(10):
            point = replace(point, R=point.R - 0.5 * step(point))
        return point.weight(point.R)

    def test_a_whole_training_by_gradient_descent_is_the_same_for_every_alpha(self) -> None:
        first = self._trained(1.0, lambda point: point.best)
        assert_differs(first, orthonormal().weight(orthonormal().R))
        for s in (0.25, 4.0):
            assert_close(self._trained(s, lambda point: point.best), first, EXACT, k=1e4, depth=OUT * IN)

    def test_one_by_the_plain_gradient_is_not(self) -> None:
        trained = [self._trained(s, lambda point: point.g_R) for s in (1.0, 0.25)]
        assert float((trained[0] - trained[1]).norm()) > 1e-2

    def test_nor_is_one_by_adam_which_forgets_the_length_of_a_gradient(self) -> None:
        """The theorem is about gradients. Adam's step in ``R`` is the same for every ``s``, so that in ``W`` is not."""
        moved = {}
        for s in (1.0, 4.0):
            point = orthonormal(s)
            point = replace(point, R=point.R / s)
            R = point.R.clone().requires_grad_()
            adam = torch.optim.AdamW([R], lr=1e-3, weight_decay=0.0)
            R.grad = point.best
            adam.step()
            moved[s] = point.weight(R.detach()) - point.weight(point.R)
        # Up to Adam's epsilon, which is no longer small beside the shorter gradient.
        assert float((moved[4.0] - 4 * moved[1.0]).norm()) < 1e-2 * float(moved[4.0].norm())


class TestTheorem5:
    """With ``B, A`` from the SVD of the full gradient, the first SGD step in ``R`` is the best copy of full's."""

    rate = 0.1

    def _first_step(self, B: Tensor, A: Tensor, s: float = 1.0) -> Tensor:
        """What one SGD step in ``R`` does to the weight, from ``W0`` itself (the premise of the proof: R = 0)."""
        point = Point(B, torch.zeros(RANK, RANK, dtype=EXACT), A, s)
        return -self.rate * point.equivalent(point.g_R)

    @property
    def full(self) -> Tensor:
        return -self.rate * gradient(loss_of, noise(2, OUT, IN))

    def test_it_is_the_truncated_svd_of_the_full_step(self) -> None:
        start = started(self.full)
        step = self._first_step(start.B, start.A)
        assert_close(step, truncated(self.full), EXACT, k=1e3, depth=OUT * IN)
        left = torch.linalg.svdvals(self.full)[RANK:].square().sum().sqrt()
        assert float((step - self.full).norm()) == pytest.approx(float(left), rel=1e-10)

    def test_no_other_factors_do_better(self) -> None:
        start = started(self.full)
        best = float((self._first_step(start.B, start.A) - self.full).norm())
        weight = started(noise(2, OUT, IN))
        others = [(weight.B, weight.A)]
        for seed in range(10):
            others.append(
                (torch.linalg.qr(noise(seed, OUT, RANK)).Q, torch.linalg.qr(noise(50 + seed, IN, RANK)).Q.T),
            )
        for B, A in others:
            assert float((self._first_step(B, A) - self.full).norm()) > 1.01 * best

    def test_factors_that_are_not_orthonormal_or_another_s_miss_it(self) -> None:
        start = started(self.full)
        best = float((self._first_step(start.B, start.A) - self.full).norm())
        # Ablation D.2: B = U S, R = I.
        spectrum = torch.linalg.svdvals(self.full)[:RANK]
        for B, s in ((start.B * spectrum, 1.0), (start.B, 2.0)):
            assert float((self._first_step(B, start.A, s) - self.full).norm()) > 1.01 * best

    def test_it_is_about_a_step_from_the_base_which_the_start_has_left(self) -> None:
        """LoRA-SB begins at ``R = S``: its gradient is taken one step further on, where it is another one."""
        start = started(30 * self.full)
        step = -self.rate * start.equivalent(start.g_R)
        assert float((step - truncated(self.full)).norm()) > 1e-2 * float(self.full.norm())

    def test_nor_does_it_hold_for_the_sign_that_adamw_steps_by(self) -> None:
        """The span of ``sign(g)`` is not that of ``g``; the start itself is then the best copy of AdamW's step."""
        signs = -self.rate * torch.sign(gradient(loss_of, noise(2, OUT, IN)))
        start = started(signs)
        assert_close(start.equivalent(start.R), truncated(signs), EXACT, k=1e3, depth=OUT * IN)
        best = float((truncated(self.full) - self.full).norm())
        assert float((self._first_step(start.B, start.A) - self.full).norm()) > 1.01 * best


class Net(nn.Module):
    """A base of one linear layer in float64 whose output is that of the classifier above."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=False, dtype=EXACT)
        self.layer.weight.data.copy_(noise(2, OUT, IN))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(self.layer(rows), torch.arange(40) % OUT)


ROWS = noise(1, 40, IN)


class TestTheLayer:
    """The same on Leantune's own layer, start and optimizer step, float64 over a float64 base."""

    def _layer(self, **options: object) -> tuple[nn.Module, CoreFactors]:
        model = get_peft_model(Net(), LoraXSConfig(**{"r": RANK, "target_modules": ["layer"], **options}))
        (own,) = (module for module in model.modules() if isinstance(module, CoreFactors))
        return model, own

    def _started(self, optimizer: str, eta: float, **options: object) -> tuple[nn.Module, CoreFactors]:
        model, own = self._layer(init_weights="update_svd", **options)

        def loss(model: nn.Module, batch: object) -> Tensor:
            return model(batch["rows"])

        leantune.initialize(model, [{"rows": ROWS}], step_size=eta, loss=loss, optimizer=optimizer)
        return model, own

    def _at(self, own: CoreFactors) -> Point:
        return Point(own.B, own.weight.detach().clone(), own.A, own.scaling)

    def _moved(self, own: CoreFactors, seed: int = 9) -> None:
        own.weight.data.copy_(noise(seed, RANK, RANK))

    @pytest.mark.parametrize("alpha", [None, 1.0, 12.0])
    def test_lemma_1(self, alpha: float | None) -> None:
        model, own = self._layer(alpha=alpha)
        self._moved(own)
        model(ROWS).backward()
        point = self._at(own)
        formula = point.s * point.B.T @ point.g @ point.A.T
        assert_close(own.weight.grad, formula, EXACT, k=50, depth=OUT * IN, wrong=[formula.T])

    @pytest.mark.parametrize("alpha", [None, 1.0, 12.0])
    def test_theorem_2_as_the_option_precondition_and_without_it_where_the_factors_are_orthonormal(
        self, alpha: float | None
    ) -> None:
        model, own = self._layer(alpha=alpha, precondition=True)
        self._moved(own)
        model(ROWS).backward()
        point = self._at(own)
        assert_close(own.weight.grad, point.best, EXACT, k=1e3, depth=OUT * IN, wrong=[point.g_R])
        model, own = self._layer(split="core")
        self._moved(own)
        model(ROWS).backward()
        assert_close(own.weight.grad, self._at(own).best, EXACT, k=1e3, depth=OUT * IN)

    def test_theorem_3_a_small_sgd_step_lowers_the_loss_by_the_first_order_amount(self) -> None:
        model, own = self._layer(precondition=True)
        self._moved(own)
        before = model(ROWS)
        before.backward()
        point = self._at(own)
        slope, rate = float((point.g_R * own.weight.grad).sum()), 1e-4
        torch.optim.SGD([own.weight], lr=rate).step()
        change = float(model(ROWS).detach() - before.detach())
        assert change == pytest.approx(-rate * slope, rel=1e-2)
        assert change < 0

    def test_theorem_4_training_by_sgd_is_the_same_for_every_alpha(self) -> None:
        trained = {}
        for precondition in (True, False):
            for alpha in (float(RANK), 1.0, 12.0):
                model, own = self._layer(alpha=alpha, precondition=precondition)
                optimizer = torch.optim.SGD([own.weight], lr=0.5)
                for _ in range(10):
                    optimizer.zero_grad()
                    model(ROWS).backward()
                    optimizer.step()
                trained[precondition, alpha] = own.delta()
        for alpha in (1.0, 12.0):
            assert_close(trained[True, alpha], trained[True, float(RANK)], EXACT, k=1e5, depth=OUT * IN)
            plain = trained[False, float(RANK)]
            assert float((trained[False, alpha] - plain).norm()) > 0.1 * float(plain.norm())

    def test_theorem_5_the_first_sgd_step_from_the_base_is_the_best_copy_of_the_full_one(self) -> None:
        eta = 0.1
        full = -eta * gradient(loss_of, noise(2, OUT, IN))
        model, own = self._started("sgd", eta)
        # The start itself is that copy ...
        assert_close(own.delta(), truncated(full), EXACT, k=1e4, depth=OUT * IN)
        # ... and so is a step from the base along its factors.
        own.weight.data.zero_()
        model(ROWS).backward()
        torch.optim.SGD([own.weight], lr=eta).step()
        assert_close(own.delta(), truncated(full), EXACT, k=1e4, depth=OUT * IN)

    @pytest.mark.parametrize("split", ["core", "left", "right"])
    def test_equations_1_and_2_the_start_is_the_truncated_svd_of_the_first_step(self, split: str) -> None:
        eta = 0.1
        signs = -eta * torch.sign(gradient(loss_of, noise(2, OUT, IN)))
        _, own = self._started("adamw_torch", eta, split=split, alpha=6.0)
        assert_close(own.delta(), truncated(signs), EXACT, k=1e4, depth=OUT * IN, wrong=[truncated(-signs)])
        # Only "core" is LoRA-SB; the others are appendix D.2, whose plain gradient is not the best one.
        assert own.is_orthonormal() == (split == "core")
