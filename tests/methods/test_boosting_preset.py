"""ReLoRA and Chain of LoRA as settings of boosting: the papers' values, and what a reset really resets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from boosting_fixture import BLOCKS, answer, layers, llama, state, trainer
from leantune import methods
from leantune.testing.closeness import assert_close, assert_differs, assert_same, assert_same_state


@pytest.mark.parametrize("name", ["relora", "cola"])
def test_a_preset_is_a_method_of_its_own(name: str) -> None:
    method = methods.get(name)
    config = method.make_config()
    assert method.config is methods.get("xgblora").config
    assert methods.of_config(config).name == name
    assert config.blocks_per_round == 0
    assert methods.of_config(method.make_config(r=3)).name == "xgblora"
    assert methods.of_config(method.config()).name == "xgblora"


def test_the_values_are_those_of_the_papers() -> None:
    relora, cola = (methods.get(name).make_config() for name in ("relora", "cola"))
    assert (relora.r, relora.alpha, relora.steps_per_round, relora.warmup_steps) == (128, 32, 5320, 100)
    assert relora.scaling == 0.25
    assert (cola.r, cola.alpha, cola.warmup_steps) == (8, 16, 0)


class Watch(TrainerCallback):
    """What stands before the first step of each round and what that step did."""

    def __init__(self, model: Any, every: int) -> None:
        self.model, self.every = model, every
        self.logits: list[torch.Tensor] = []
        self.starts: list[dict[str, torch.Tensor]] = []
        self.moves: list[dict[str, torch.Tensor]] = []
        self.rates: list[float] = []
        self.trained: list[int] = []

    def on_step_begin(self, args: Any, state_: Any, control: Any, **keywords: Any) -> None:
        self.first = state_.global_step % self.every == 0
        if self.first:
            self.logits.append(answer(self.model))
            self.held = len(keywords["optimizer"].state)
            assert self.held == 0, "moments of the round before"

    def on_pre_optimizer_step(self, args: Any, state_: Any, control: Any, **keywords: Any) -> None:
        owns = {path: layer.booster("default") for path, layer in layers(self.model).items()}
        self.rates.append(keywords["optimizer"].param_groups[0]["lr"])
        if self.first:
            self.starts.append({path: own.A.detach().clone() for path, own in owns.items()})
            self.trained.append(sum(not own.resting for own in owns.values()))
            assert not any(own.B.any() for own in owns.values())

    def on_optimizer_step(self, args: Any, state_: Any, control: Any, **keywords: Any) -> None:
        owns = {path: layer.booster("default") for path, layer in layers(self.model).items()}
        if self.first:
            self.moves.append({path: own.B.detach().clone() for path, own in owns.items()})

    def on_step_end(self, args: Any, state_: Any, control: Any, **keywords: Any) -> None:
        if state_.global_step % self.every == 0:
            self.logits.append(answer(self.model))


@pytest.mark.parametrize(("name", "warmup"), [("relora", 1), ("cola", 0)])
def test_a_round_resets_factors_optimizer_and_rate_and_keeps_what_was_learned(
    name: str, warmup: int, tmp_path: Path
) -> None:
    """As the authors' code of ReLoRA: keep, start A and B anew, reset the optimizer, warm the rate up. Here r = 4."""
    method = methods.get(name)
    config = method.make_config(r=4, alpha=8, steps_per_round=3, warmup_steps=warmup, task_type="CAUSAL_LM")
    model: Any = method.apply(llama(), config)
    before = state(model)
    watch = Watch(model, 3)
    options: dict[str, Any] = {"weight_decay": 0.0, "max_grad_norm": 0, "adam_epsilon": 1e-30}
    run = trainer(model, tmp_path, max_steps=9, **options)
    run.add_callback(watch)
    run.train()
    assert watch.trained == [7 * BLOCKS] * 3, "all blocks in every round"
    after = state(model)
    base = {key for key in before if "base_layer" in key or "embed" in key or "norm" in key}
    assert_same_state({key: after[key] for key in base}, {key: before[key] for key in base}, "the base")
    # The end of a round and the beginning of the next are one model.
    assert_differs(watch.logits[1], watch.logits[0])
    for end, begin in zip(watch.logits[1:-1:2], watch.logits[2::2], strict=True):
        assert_same(begin, end)
    warm = [(step + 1) / (warmup + 1) if step < warmup else 1.0 for step in range(3)]
    assert watch.rates == pytest.approx([2e-2 * factor for factor in warm] * 3)
    for path, layer in layers(model).items():
        first, second = watch.starts[0][path], watch.starts[1][path]
        assert_differs(first, second, "A of the second round")
        assert second.abs().max() <= 1 / second.shape[1] ** 0.5
        for move in watch.moves:
            # Adam's very first step is the rate times the sign, in each round; kept moments would make it another.
            size = move[path].abs()
            size = size[size > 0]
            wanted = torch.full_like(size, 2e-2 * warm[0], dtype=torch.float64)
            assert_close(size, wanted, torch.float32, 64, 4, what=path)
        assert layer.booster("default").rank == 3 * 4
