"""XGBLoRA's rounds in TRL's trainers, and a run of transformers' own Trainer resumed in the middle of a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from host_model import base, frozen
from transformers import TrainerCallback
from trl_case import STEPS, TRAINERS, from_folder

import leantune
from boosting_fixture import layers, trainer, wrap
from leantune import XGBLoraConfig
from leantune.testing.closeness import assert_same_state

# 2026-11-23: TRL 1.16.0 sets transformers' old name of activation checkpointing.
# 2026-11-25: PEFT says that a second adapter was loaded, which TRL's reference adapter is.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]


class Changes(TrainerCallback):
    """Which parameters each step changes."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.steps: list[set[str]] = []

    def _values(self) -> dict[str, torch.Tensor]:
        return {name: each.detach().clone() for name, each in self.model.named_parameters()}

    def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
        self.before = self._values()

    def on_optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        now = self._values()
        self.steps.append({name for name, value in now.items() if not torch.equal(value, self.before[name])})


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_rounds_in_trl(name: str, base_folder: Path, tmp_path: Path) -> None:
    config = XGBLoraConfig(task_type="CAUSAL_LM", r=2, blocks_per_round=1, steps_per_round=2, block_sampling="balanced")
    made = TRAINERS[name](from_folder(base_folder), tmp_path, peft_config=config)
    changes = Changes(made.model)
    for each in (*leantune.callbacks(made.model), changes):
        made.add_callback(each)
    made.train()
    blocks = [{path.split(".layers.")[1][0] for path in step} for step in changes.steps]
    assert len(blocks) == STEPS
    assert all(len(each) == 1 for each in blocks)
    assert blocks[0] == blocks[1] != blocks[2] == blocks[3]
    assert all("booster.default" in path for step in changes.steps for path in step)
    assert made.model.num_boosted_rounds() == 2
    assert_same_state(frozen(made.model), base().state_dict(), "the base after training")
    made.save_model(str(tmp_path / "adapter"))
    assert leantune.load(from_folder(base_folder), tmp_path / "adapter").num_boosted_rounds() == 2


class _Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        control.should_training_stop |= state.global_step == 4


def test_the_stock_trainer_resumes_in_a_round_to_the_same_bits(tmp_path: Path) -> None:
    saving = {"steps_per_round": 3}, {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}
    whole = trainer(wrap(**saving[0]), tmp_path / "whole", **saving[1])
    whole.train()
    trainer(wrap(**saving[0]), tmp_path / "part", [_Stop()], **saving[1]).train()
    resumed = trainer(wrap(**saving[0]), tmp_path / "resumed", **saving[1])
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"))
    assert_same_state(resumed.model.state_dict(), whole.model.state_dict())  # type: ignore[union-attr]
    ranks = {layer.booster("default").rank for layer in layers(whole.model).values()}
    assert ranks == {0, 1}
