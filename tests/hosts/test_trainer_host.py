"""S2FT inside transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from host_model import OPTIONS, base, values
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import tiny
from leantune import S2FTConfig
from leantune.testing.closeness import assert_differs, assert_same, assert_same_state
from leantune.testing.subject import no_grad_logits


class _Stop(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            control.should_training_stop = True


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in tiny.ids(rows=16, length=6)]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-2,
        weight_decay=0.1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
        **more,
    )


def make_trainer(folder: Path, callbacks: list[Any] | None = None, **more: Any) -> Trainer:
    model = get_peft_model(base(), S2FTConfig(**OPTIONS))
    return Trainer(
        model=model,
        args=arguments(folder, **more),
        train_dataset=rows(),  # type: ignore[arg-type]
        eval_dataset=rows(),  # type: ignore[arg-type]
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


def loss_of(model: Any) -> float:
    ids = tiny.ids(rows=16, length=6)
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def test_trainer_trains_saves_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole")
    frozen = {name: value.clone() for name, value in whole.model.state_dict().items() if "s2ft" not in name}  # type: ignore[union-attr]
    before = loss_of(whole.model)
    whole.train()
    assert loss_of(whole.model) < before - 0.1
    after = {name: value for name, value in whole.model.state_dict().items() if "s2ft" not in name}  # type: ignore[union-attr]
    assert_same_state(after, frozen, "the base after training")

    make_trainer(tmp_path / "part", callbacks=[_Stop(3)]).train()
    checkpoint = tmp_path / "part" / "checkpoint-3"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= files
    assert "model.safetensors" not in files
    resumed = make_trainer(tmp_path / "part")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 6
    assert_same_state(values(resumed.model), values(whole.model), "trained parameters, resumed and uninterrupted")
    again = make_trainer(tmp_path / "again")
    assert_differs(
        torch.cat([value.flatten() for value in values(again.model).values()]),
        torch.cat([value.flatten() for value in values(whole.model).values()]),
        "trained parameters",
    )


def test_trainer_with_checkpointing_and_the_best_model_at_the_end(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        activation_checkpointing=True,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    best = PeftModel.from_pretrained(base(), trainer.state.best_model_checkpoint).eval()
    model = trainer.model.eval()  # type: ignore[union-attr]
    assert_same(no_grad_logits(model, tiny.ids()), no_grad_logits(best, tiny.ids()), "logits of the best checkpoint")
