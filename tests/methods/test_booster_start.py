"""A booster's start along the gradient: where it points, what it costs, and that it is the better first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from boosting_fixture import answer, layers, llama, state, tokens, trainer, wrap
from leantune import XGBLoraConfig
from leantune.core.errors import ConfigError
from leantune.methods._booster import Booster
from leantune.methods._booster_start import aligned, aligned_share
from leantune.methods._boosting_option import STARTS
from leantune.testing.closeness import assert_close, assert_differs, assert_same, assert_same_state

# The loops here are plain ones, which XGBLoRA says are no rounds.
pytestmark = pytest.mark.filterwarnings("ignore:XGBLoRA trains without rounds:UserWarning")

EXACT = torch.float64


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=EXACT)


def decaying(out: int, into: int, power: float = 1.0, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall as those of a gradient do."""
    U, _ = torch.linalg.qr(noise(out, min(out, into), seed=seed))
    V, _ = torch.linalg.qr(noise(into, min(out, into), seed=seed + 1))
    return (U * torch.arange(1, min(out, into) + 1, dtype=EXACT) ** -power) @ V.T


@pytest.mark.parametrize(("out", "into"), [(9, 7), (5, 12)])
@pytest.mark.parametrize("r", [1, 3])
def test_rows_lie_along_the_top_right_singular_vectors(out: int, into: int, r: int) -> None:
    A, G = noise(r, into), decaying(out, into)
    start = aligned(A, G)
    Vh = torch.linalg.svd(G, full_matrices=False).Vh[:r]
    lengths = A.norm(dim=1).sort(descending=True).values
    assert_close((start @ Vh.T).abs(), torch.diag(lengths), EXACT, 1e3, 64)
    assert_close(start.norm(dim=1), lengths, EXACT, 64, 16)


def test_no_other_rows_of_those_lengths_lower_the_loss_more() -> None:
    """To first order the loss falls by ``||G A^T||_F^2``, as the module says."""
    A, G = noise(3, 8), decaying(6, 8)
    best = (G @ aligned(A, G).T).square().sum()
    lengths = A.norm(dim=1).sort(descending=True).values
    singular = torch.linalg.svdvals(G)[:3]
    assert_close(best, (lengths * singular).square().sum(), EXACT, 1e3, 64)
    for seed in range(50):
        frame = torch.linalg.qr(noise(8, 3, seed=seed)).Q.T
        assert (G @ (lengths[:, None] * frame).T).square().sum() < best
    # The shortest row along the strongest direction is worse.
    assert (G @ (lengths.flip(0)[:, None] * torch.linalg.svd(G).Vh[:3]).T).square().sum() < best


def test_a_large_gradient_needs_no_whole_svd() -> None:
    G = decaying(520, 640, 0.6).float()
    start = aligned(torch.ones(4, 640), G)
    kept = (G.double() @ (start / start.norm(dim=1, keepdim=True)).double().T).square().sum()
    assert kept > 0.98 * torch.linalg.svdvals(G.double())[:4].square().sum()
    assert_same(aligned(torch.ones(4, 640), G), start, "the same gradient, the same start")


def test_where_there_is_no_direction_the_random_start_stays() -> None:
    A = noise(2, 6)
    assert_same(aligned(A, torch.zeros(4, 6, dtype=EXACT)), A)
    assert_same(aligned(A, torch.full((4, 6), torch.inf, dtype=EXACT)), A)
    wide = noise(5, 6)
    assert_same(aligned(wide, decaying(3, 6))[3:], wide[3:], "rows beyond the gradient's rank")


class Layer(nn.Module):
    """A weight with one booster beside it, and a loss."""

    def __init__(self, aligns: bool, r: int = 2) -> None:
        super().__init__()
        self.W = nn.Parameter(noise(5, 7, seed=1))
        self.booster = Booster(5, 7, r, 1.5).double()
        self.booster.aligns = aligns
        self.booster.start(0, "layer", 0)
        self.booster.train_in(0)

    def forward(self, x: Tensor) -> Tensor:
        share = self.booster.share(x)
        assert share is not None
        return (torch.tanh(x @ self.W.T + share) - 0.3).square().sum()


def test_the_first_gradient_is_that_of_the_start_it_chose() -> None:
    layer, plain = Layer(True), Layer(False)
    x, other = noise(2, 4, 7, seed=2).requires_grad_(), noise(2, 4, 7, seed=2).requires_grad_()
    random = layer.booster.A.detach().clone()
    loss, expected = layer(x), plain(other)
    assert_same(loss.detach(), expected.detach(), "the loss before the first step")
    loss.backward()
    G = torch.autograd.grad(expected, plain.W, retain_graph=True)[0]
    expected.backward()
    A = layer.booster.A
    assert_differs(A.detach(), random)
    assert_close(A.detach(), aligned(random, G), EXACT, 1e3, 64)
    assert_close(layer.booster.B.grad, 1.5 * G @ A.detach().T, EXACT, 64, 64)
    assert layer.booster.A.grad is not None
    assert not layer.booster.A.grad.any()
    assert x.grad is not None
    assert other.grad is not None
    assert_close(x.grad, other.grad, EXACT, 64, 64)


def test_of_several_forward_passes_the_first_decides() -> None:
    layer, plain = Layer(True), Layer(False)
    first, second = noise(3, 7, seed=3), noise(3, 7, seed=4)
    layer(first).backward()
    A = layer.booster.A.detach().clone()
    layer(second).backward()
    assert_same(layer.booster.A.detach(), A, "A in the second pass of a step")
    G = torch.autograd.grad(plain(first) + plain(second), plain.W)[0]
    assert_close(layer.booster.B.grad, 1.5 * G @ A.T, EXACT, 64, 64)


def test_two_forwards_before_one_backward_are_of_one_start() -> None:
    layer, plain = Layer(True), Layer(False)
    first, second = noise(3, 7, seed=3), noise(3, 7, seed=4)
    (layer(first) + layer(second)).backward()
    G = torch.autograd.grad(plain(first) + plain(second), plain.W)[0]
    assert_close(layer.booster.B.grad, 1.5 * G @ layer.booster.A.detach().T, EXACT, 64, 64)


def test_only_a_fresh_booster_in_training_is_turned() -> None:
    def turns(layer: Layer) -> bool:
        before = layer.booster.A.detach().clone()
        layer.zero_grad()
        layer(noise(3, 7, seed=5)).backward()
        return not torch.equal(layer.booster.A.detach(), before)

    layer = Layer(True)
    assert not turns(layer.eval())
    assert turns(layer.train())
    with torch.no_grad():
        layer.booster.B.add_(0.1)
    assert not turns(layer)
    layer.booster.start(0, "layer", 1)
    assert turns(layer)
    layer.load_state_dict(layer.state_dict())
    assert turns(layer), "B is zero in what was loaded"
    assert not turns(Layer(False))


def test_a_step_along_it_beats_one_along_any_random_start() -> None:
    """On a whole model: one small step of plain descent on every B; the loss falls as the derivation says."""

    def loss_of(model: Any) -> Tensor:
        # Not the model's own loss, which is formed in float32.
        return nn.functional.cross_entropy(model(tokens()).logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())

    step = 1e-4
    falls = {}
    for start in STARTS:
        for seed in range(6):
            model = wrap(llama(EXACT), start=start, seed=seed).train()
            before = loss_of(model)
            before.backward()
            slope = 0.0
            for layer in layers(model).values():
                own = layer.booster("default")
                slope += own.B.grad.square().sum().item()
                with torch.no_grad():
                    own.B.sub_(step * own.B.grad)
            fall = (before - loss_of(model)).item()
            assert fall == pytest.approx(step * slope, rel=0.02)
            falls[start, seed] = fall
    turned, random = ([fall for (start, _), fall in falls.items() if start == wanted] for wanted in STARTS[::-1])
    assert min(turned) > max(random)
    assert sum(turned) > 3 * sum(random)


@pytest.mark.parametrize("options", [{}, {"fold": True}])
def test_rounds_of_a_run_start_along_their_own_gradient(tmp_path: Path, options: dict[str, Any]) -> None:
    """With a rate of next to nothing A stays where it began: each round's row is the gradient's at that round."""
    model = wrap(llama(), start="gradient", steps_per_round=2, blocks_per_round=0, alpha=1.0, **options)
    trainer(model, tmp_path, max_steps=4, learning_rate=1e-8, weight_decay=0.0).train()
    random = wrap(llama(), blocks_per_round=0)
    for path, layer in layers(model).items():
        own = layer.booster("default")
        assert len(own.kept_A) == 2
        for number, row in enumerate(own.kept_A):
            fresh = layers(random)[path].booster("default")
            fresh.start(0, path, number)
            assert row.norm() == pytest.approx(fresh.A.norm().item(), rel=1e-4)
            assert torch.cosine_similarity(row, fresh.A.detach()[0], dim=0).abs() < 0.9
        assert own.working is None


def test_checkpointed_layers_start_the_same() -> None:
    starts = []
    for checkpointed in (False, True):
        model = wrap(llama(EXACT), start="gradient", blocks_per_round=0).train()
        if checkpointed:
            model.get_base_model().activation_checkpointing_enable()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        starts.append({path: layer.booster("default").A.detach() for path, layer in layers(model).items()})
    for path, A in starts[0].items():
        assert_close(starts[1][path], A, EXACT, 1e3, 64, what=path)


def test_a_resumed_run_has_the_same_starts(tmp_path: Path) -> None:
    """Stopped within a round and between rounds; the rate of the very first step is zero, so that B is still zero."""
    settings: dict[str, Any] = {"max_steps": 6, "lr_scheduler_type": "linear", "warmup_steps": 2}
    whole = wrap(llama(), start="gradient", steps_per_round=2)
    trainer(whole, tmp_path / "whole", save_strategy="steps", save_steps=1, **settings).train()
    for at in (1, 2, 3):
        again = wrap(llama(), start="gradient", steps_per_round=2)
        resumed = trainer(again, tmp_path / "again", save_strategy="steps", save_steps=1, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{at}"))
        assert_same_state(state(again), state(whole), f"resumed at step {at}")
        assert_same(answer(again), answer(whole))


def test_an_unknown_start_is_named_beside_the_other_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        XGBLoraConfig(start="gradiant", r=0)
    assert "did you mean 'gradient'?" in str(caught.value)
    assert "2 problems" in str(caught.value)


def test_a_share_of_nothing_is_nothing() -> None:
    own = Layer(True).booster
    assert not aligned_share(noise(2, 3, 7), own).any()
