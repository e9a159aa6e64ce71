"""How much of a finished booster is kept: the search, on losses whose optimum is known, and in a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from boosting_problem import EXACT, OUT, LeastSquares, noise
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments, default_data_collator

from boosting_fixture import layers, llama, rows, state, tokens, trainer, wrap
from leantune.core.errors import MethodError
from leantune.methods._booster import Booster
from leantune.methods._line_search import EVALUATIONS, LARGEST, line_search, scaled, search_boosters
from leantune.testing.closeness import assert_differs, assert_same, assert_same_state
from leantune.train import LeanTrainer


@given(lowest=st.floats(-3, 8), curvature=st.floats(0.01, 100), floor=st.floats(-5, 5))
def test_a_parabola_is_solved_exactly(lowest: float, curvature: float, floor: float) -> None:
    """Within [0, 4]; beyond, the end is taken."""
    found = line_search(lambda s: curvature * (s - lowest) ** 2 + floor)
    assert found.evaluations <= EVALUATIONS
    wanted = min(max(lowest, 0.0), LARGEST)
    # The loss is flat to rounding this near to its optimum.
    assert found.scale == pytest.approx(wanted, abs=2e-3)


def table(values: list[float]) -> Callable[[float], float]:
    """A loss of any shape: straight between values a quarter apart."""

    def loss(scale: float) -> float:
        place = min(int(scale * 4), len(values) - 2)
        share = scale * 4 - place
        return (1 - share) * values[place] + share * values[place + 1]

    return loss


@given(values=st.lists(st.floats(-10, 10), min_size=17, max_size=17))
def test_it_is_never_worse_than_what_was_trained(values: list[float]) -> None:
    asked: list[float] = []
    loss = table(values)

    def seen(scale: float) -> float:
        asked.append(scale)
        return loss(scale)

    found = line_search(seen)
    assert found.loss <= found.loss_at_one == loss(1.0)
    assert found.loss == loss(found.scale) == min(map(loss, asked))
    assert found.evaluations == len(asked) == len(set(asked)) <= EVALUATIONS
    assert all(0 <= scale <= LARGEST for scale in asked)


def test_a_loss_that_is_no_number_is_no_choice() -> None:
    found = line_search(lambda s: math.nan if s > 1.2 else (s - 0.7) ** 2)
    assert 0 < found.scale < 1
    assert found.loss < found.loss_at_one
    assert line_search(lambda s: math.inf).scale == 1


def test_where_nothing_changes_the_booster_is_kept_as_it_was() -> None:
    assert line_search(lambda s: 3.0).scale == 1


@pytest.mark.parametrize("seed", range(4))
def test_least_squares_boosters_get_their_analytic_scale(seed: int) -> None:
    """``s* = -<G, D> / <D H, D>`` for the change ``D`` of the boosters, one scale for two layers that are summed."""
    problem = LeastSquares.of(seed)
    own = Booster(OUT, problem.X.shape[0], 2, 0.5).double()
    own.start(seed, "layer", 0)
    W = noise(seed + 40, OUT, problem.X.shape[0])
    with torch.no_grad():
        # A step that is too long or too short.
        own.B.copy_(-[0.3, 1.5, 4.0, 0.1][seed] * problem.gradient(W) @ own.A.T)

    def weight(scale: float = 1.0) -> Tensor:
        return W + scale * own.scaling * (own.B @ own.A).detach()

    D = weight() - W
    wanted = -(problem.gradient(W) * D).sum() / torch.trace(D @ problem.hessian @ D.T)
    found = search_boosters([own], lambda: problem.loss(weight()).item())
    assert own.scaling == 0.5
    assert found.scale == pytest.approx(min(wanted.item(), LARGEST), abs=2e-3)
    assert found.loss == pytest.approx(problem.loss(weight(found.scale)).item())
    assert found.loss <= problem.loss(weight()).item()
    if wanted < LARGEST:
        # The decrease that no other scale exceeds.
        best = problem.loss(W) - (problem.gradient(W) * D).sum() ** 2 / (2 * torch.trace(D @ problem.hessian @ D.T))
        assert found.loss == pytest.approx(best.item(), rel=1e-5)
    assert wanted.dtype == EXACT


def test_boosters_are_put_back_also_when_the_loss_fails() -> None:
    own = Booster(3, 4, 1, 2.0)
    with pytest.raises(ZeroDivisionError), scaled([own], 3.0):
        assert own.scaling == 6.0
        raise ZeroDivisionError
    assert own.scaling == 2.0


class Watch(TrainerCallback):
    """Writes down, round by round, what was trained and the loss of the step's batch at some scales."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.scales: list[float] = []
        self.trained: list[dict[str, Tensor]] = []

    def on_optimizer_step(self, args: Any, state_: Any, control: Any, **keywords: Any) -> None:
        if (state_.global_step + 1) % 2 == 0:
            owns = {path: layer.booster("default") for path, layer in layers(self.model).items()}
            self.trained.append({path: own.B.detach().clone() for path, own in owns.items() if int(own.round) >= 0})

    def on_log(self, args: Any, state_: Any, control: Any, logs: Any = None, **keywords: Any) -> None:
        self.scales += [logs["step_scale"]] if "step_scale" in logs else []


def lean(model: Any, folder: Path, callbacks: list[Any], **options: Any) -> LeanTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        **options,
    }
    return LeanTrainer(
        model,
        args=TrainingArguments(**settings),
        train_dataset=rows(),
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


def test_a_run_keeps_each_round_at_its_scale(tmp_path: Path) -> None:
    model = wrap(llama(), line_search=True, blocks_per_round=2, shrinkage=0.5)
    watch = Watch(model)
    found = lean(model, tmp_path, [], learning_rate=0.4)
    # After the method's own callback, which tells of the scale.
    found.add_callback(watch)
    found.train()
    assert len(watch.scales) == len(watch.trained) == 3
    assert len(set(watch.scales)) > 1
    for number, (trained, scale) in enumerate(zip(watch.trained, watch.scales, strict=True)):
        assert abs(scale - 1) > 0.05
        assert len(trained) == 2 * 7
        for path, B in trained.items():
            own = layers(model)[path].booster("default")
            (place,) = (own.kept_round == number).nonzero()[0].tolist()
            torch.testing.assert_close(own.kept_B[:, place], B[:, 0] * (own.scaling * 0.5 * scale))


def test_the_loss_of_the_newest_step_is_measured_anew(tmp_path: Path) -> None:
    """Over both batches of an accumulated step, as training weighs them, without a trace of having been asked."""
    seen: list[tuple[float, float]] = []

    class Ask(TrainerCallback):
        def on_step_end(self, args: Any, state_: Any, control: Any, **keywords: Any) -> None:
            before = torch.get_rng_state()
            model.train()
            with torch.no_grad():
                found = trainer_._loss_of_newest_step()
                batches, _ = trainer_._newest
                ids = torch.cat([batch["input_ids"] for batch in batches])
                model.eval()
                logits = model(input_ids=ids).logits[:, :-1]
                model.train()
            exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
            seen.append((found, exact))
            assert model.training
            assert_same(torch.get_rng_state(), before)

    model = wrap(llama(), line_search=True)
    trainer_ = lean(model, tmp_path, [Ask()], max_steps=3)
    trainer_.train()
    assert len(seen) == 3
    for found, exact in seen:
        assert found == pytest.approx(exact, rel=1e-5)
    assert len(tokens()) == 16


def test_it_is_off_unless_asked_for(tmp_path: Path) -> None:
    plain, searched = wrap(llama()), wrap(llama(), line_search=True)
    for model in (plain, searched):
        found = lean(model, tmp_path, [])
        assert (found._newest == ([], None)) is True
        found.train()
        assert bool(found._newest[0]) == (model is searched)
    ours, theirs = (
        torch.cat([layer.booster("default").kept_B.flatten() for layer in layers(model).values()])
        for model in (plain, searched)
    )
    assert_differs(ours, theirs)


def test_a_resumed_run_finds_the_same_scales(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole = wrap(llama(), line_search=True, start="gradient")
    lean(whole, tmp_path / "whole", [], **options).train()
    for at in (1, 2):
        again = wrap(llama(), line_search=True, start="gradient")
        resumed = lean(again, tmp_path / "again", [], **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{at}"))
        assert_same_state(state(again), state(whole), f"resumed at step {at}")


def test_a_trainer_that_gives_no_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="line_search in a Trainer that does not give"):
        trainer(wrap(line_search=True), tmp_path).train()
