"""Checkpoints are whole or not there, and a run resumed from one is the run that was never stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from leantune.core import atomic
from leantune.data import Collator
from leantune.train import LeanTrainer
from leantune.train.checkpoint import WRITING, checkpoints, last_checkpoint, prune, publish, remove, sweep


def make_model() -> Any:
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    )
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", lora_dropout=0.2)
    return get_peft_model(model, config)


def make_trainer(folder: Path, rows: list[dict[str, Any]], **options: Any) -> LeanTrainer:
    settings = {
        "per_device_train_batch_size": 3,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    own = {name: options.pop(name) for name in ("group_by_length", "eval_dataset") if name in options}
    arguments = TrainingArguments(output_dir=str(folder), **{**settings, **options})
    return LeanTrainer(make_model(), args=arguments, train_dataset=rows, data_collator=Collator(0), **own)


def adapter_of(trainer: LeanTrainer) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in trainer.model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("grouped", [False, True], ids=["shuffled", "by-length"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, examples: list[dict[str, Any]], grouped: bool, accumulation: int
) -> None:
    # Four batches an epoch, so that step 4 lies inside or at the end of one; dropout, so that random state counts.
    options = {"group_by_length": grouped, "gradient_accumulation_steps": accumulation}
    whole = make_trainer(tmp_path / "whole", examples, **options)
    whole.train()
    for step in (2, 4):
        resumed = make_trainer(tmp_path / "resumed", examples, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == 6
        wanted = adapter_of(whole)
        for name, each in adapter_of(resumed).items():
            assert torch.equal(each, wanted[name]), f"resumed at {step}: {name}"


def test_a_checkpoint_holds_the_adapter_alone(tmp_path: Path, examples: list[dict[str, Any]]) -> None:
    trainer = make_trainer(tmp_path, examples, max_steps=2)
    trainer.train()
    tensors = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert sum(each.numel() for each in tensors.values()) == sum(each.numel() for each in adapter_of(trainer).values())
    optimizer = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == len(adapter_of(trainer))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("fault", ["_save_optimizer_and_scheduler", "_save_rng_state", "save_model", "publish"])
def test_a_write_that_fails_half_way_leaves_the_last_good_checkpoint(
    tmp_path: Path, examples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    trainer = make_trainer(tmp_path, examples)
    target, name = (trainer, fault) if fault != "publish" else (__import__("os"), "replace")
    genuine = getattr(target, name)

    def failing(*arguments: Any, **keywords: Any) -> Any:
        if trainer.state.global_step == 4:
            if fault != "publish":
                genuine(*arguments, **keywords)
            raise OSError("planted: the disk is full")
        return genuine(*arguments, **keywords)

    monkeypatch.setattr(target, name, failing)
    with pytest.raises(OSError, match="planted"):
        trainer.train()
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    # What transformers itself would resume from.
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    resumed = make_trainer(tmp_path, examples)
    resumed.train(resume_from_checkpoint=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_the_stock_trainer_would_leave_half_a_checkpoint(
    tmp_path: Path, examples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault above is a real one: without our writing it is taken for a checkpoint."""
    trainer = make_trainer(tmp_path, examples)
    monkeypatch.setattr(LeanTrainer, "_save_checkpoint", Trainer._save_checkpoint)

    def failing(folder: str) -> None:
        raise OSError("planted")

    monkeypatch.setattr(trainer, "_save_rng_state", failing)
    with pytest.raises(OSError, match="planted"):
        trainer.train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_old_checkpoints_go_and_the_best_stays(
    tmp_path: Path, examples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(
        tmp_path,
        examples,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=examples,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        save_total_limit=2,
    )
    scores = iter([5.0, 1.0, 4.0, 3.0, 2.0, 2.5])
    monkeypatch.setattr("leantune.train.trainer.validate", lambda *_: ({"loss": next(scores)}, 12))
    trainer.train()
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]
    for name in names:
        state = json.loads((tmp_path / name / "trainer_state.json").read_text(encoding="utf-8"))
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2"), name
    best = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    now = {name.replace(".default", ""): each for name, each in adapter_of(trainer).items()}
    assert now.keys() == best.keys()
    assert all(torch.equal(each, best[name]) for name, each in now.items()), "the best one was loaded at the end"


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text("x", encoding="utf-8")
    return path


def test_only_complete_names_count(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "absent") == []
    assert last_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", ".checkpoint-11.tmp-3", "checkpoint-12.tmp", "checkpoint-x", WRITING):
        make_folder(tmp_path / name)
    (tmp_path / "checkpoint-99").write_text("a file", encoding="utf-8")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_publish_moves_everything_and_replaces_an_old_one(tmp_path: Path) -> None:
    old = make_folder(tmp_path / "checkpoint-3")
    (old / "stale").write_text("old", encoding="utf-8")
    written = make_folder(tmp_path / WRITING / "checkpoint-3")
    publish(written, old)
    assert [path.name for path in old.iterdir()] == ["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_prune_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for number in (2, 10, 1, 30):
        make_folder(tmp_path / f"checkpoint-{number}")
    prune(tmp_path, 2, str(tmp_path / "checkpoint-1"))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-10", "checkpoint-30"]


def test_a_removal_that_stops_half_way_leaves_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_folder(tmp_path / "checkpoint-5")
    genuine = shutil.rmtree

    def failing(path: Any, **keywords: Any) -> None:
        if Path(path).exists():
            raise OSError("planted")

    monkeypatch.setattr(shutil, "rmtree", failing)
    with pytest.raises(OSError, match="planted"):
        remove(target)
    assert checkpoints(tmp_path) == []
    monkeypatch.setattr(shutil, "rmtree", genuine)
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def dead_process() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_sweep_leaves_strangers_alone(tmp_path: Path) -> None:
    for name in (".git", "checkpoint-1", ".adapter.previous", "notes"):
        make_folder(tmp_path / name)
    gone, place = dead_process(), atomic._place()
    (tmp_path / f".run.json.tmp-{gone}-{place}").write_text("half", encoding="utf-8")
    make_folder(tmp_path / f".adapter.tmp-{gone}-{place}")
    make_folder(tmp_path / ".checkpoint-3.removed")
    make_folder(tmp_path / WRITING)
    sweep(tmp_path)
    sweep(tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".adapter.previous", ".git", "checkpoint-1", "notes"]
