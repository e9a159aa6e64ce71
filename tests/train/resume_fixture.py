"""Tiny runs to stop, resume and compare."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from leantune.train import LeanTrainer
from leantune.train.checkpoint import SEAL, last_checkpoint
from leantune.train.record import read_metrics

# Figures of time and memory: no two runs share them.
_MEASURED = {"time_s", "peak_memory_bytes"}
# The files of a checkpoint in which such figures or paths stand.
_UNLIKE = {"trainer_state.json", "training_args.bin", "README.md", "leantune.json"}
TOTALS = ("status", "steps", "planned_steps", "epochs", "rows_seen", "tokens_seen", "loss_tokens_seen", "padding_share")
LOSSES = ("first_loss", "last_loss", "last_loss_over_steps", "evaluation")


class Killed(BaseException):
    """Ends a run as SIGKILL does: nobody catches it."""


def act_at(step: int, monkeypatch: pytest.MonkeyPatch, act: Any, micro: int = 1) -> None:
    """Call ``act`` in a forward pass of an optimizer step, before anything of the step is done with."""
    genuine, passes = LeanTrainer.training_step, {"count": 0}

    def acting(trainer: LeanTrainer, *arguments: Any, **keywords: Any) -> Any:
        loss = genuine(trainer, *arguments, **keywords)
        if trainer.state.global_step + 1 == step:
            passes["count"] += 1
            if passes["count"] == micro:
                act()
        return loss

    monkeypatch.setattr(LeanTrainer, "training_step", acting)


def kill() -> None:
    """The end of a process, at once."""
    raise Killed


def interrupt() -> None:
    """Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times and memory."""
    timing = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in {*_MEASURED, *timing}} for line in lines]


def record_of(folder: Path) -> dict[str, Any]:
    """Totals and losses of run.json."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    found = {name: record[name] for name in (*TOTALS, *LOSSES)}
    if found["evaluation"]:
        found["evaluation"] = {key: value for key, value in found["evaluation"].items() if not key.endswith("_s")}
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The trained tensors of a run's result."""
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        if (folder / name).exists():
            return load_file(folder / name)
    raise AssertionError(f"{folder} holds no result")


def state_of(folder: Path) -> dict[str, str]:
    """Hashes of the newest checkpoint's files: weights, optimizer, scheduler, random state; and its trained values."""
    path = last_checkpoint(folder / "checkpoints")
    assert path is not None
    seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
    files = {name: digest for name, digest in seal["files"].items() if Path(name).name not in _UNLIKE}
    return {**files, "trained": seal["trained"], "at": path.name}


def assert_same_run(resumed: Path, whole: Path) -> None:
    """Everything that a run leaves is the same, bit for bit, but times."""
    wanted, found = tensors_of(whole), tensors_of(resumed)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert tensor.dtype == found[name].dtype, name
        assert tensor.equal(found[name]), name
    assert state_of(resumed) == state_of(whole)
    assert metrics_of(resumed) == metrics_of(whole)
    assert record_of(resumed) == record_of(whole)
