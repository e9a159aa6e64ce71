"""What a run leaves behind in figures: metrics.jsonl line by line, run.json at its end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from leantune.core import atomic
from leantune.models.quantisation import parameter_count
from leantune.train.meter import Meter, peak_memory

METRICS = "metrics.jsonl"
RECORD = "run.json"
LAST_LOSSES = 10
_PACKAGES = ("leantune", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy")


class MetricsFile(TrainerCallback):
    """Appends one JSON line for every step and every evaluation, each on the disk's side before the next begins.

    Args:
        path: the file; it is begun anew when training begins at step 0.
        meter: the counts of the trainer.
    """

    def __init__(self, path: Path, meter: Meter) -> None:
        self.path = path
        self.meter = meter

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Training begins."""
        if state.is_world_process_zero and state.global_step == 0:
            self.path.write_text("", encoding="utf-8")

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **keywords: Any,
    ) -> None:
        """Something was logged."""
        if not state.is_world_process_zero or logs is None or not ({"loss", "eval_loss"} & set(logs)):
            return
        line: dict[str, Any] = {"step": state.global_step, "epoch": state.epoch, **logs}
        line |= {
            "time_s": round(self.meter.seconds, 3),
            "tokens": self.meter.tokens,
            "loss_tokens": self.meter.loss_tokens,
            "peak_memory_bytes": peak_memory(args.device),
        }
        with atomic.naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(plain(line)) + "\n")


def rewind_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """Bring a metrics file back to what it held at a checkpoint.

    Args:
        path: the file; lines after the checkpoint go, lines that it lost are taken from the history.
        history: everything that had been logged when the checkpoint was written.
    """
    logged = [line for line in history if {"loss", "eval_loss"} & set(line)]
    lines = read_metrics(path)
    kept = [
        lines[place] if place < len(lines) and _agree(lines[place], line) else plain(line)
        for place, line in enumerate(logged)
    ]
    atomic.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def _agree(line: dict[str, Any], logged: dict[str, Any]) -> bool:
    return all(line.get(name) == plain(logged.get(name)) for name in ("step", "loss", "eval_loss"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that a kill cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they decide numbers and times."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "byte_order": sys.byteorder,
    }


def loss_facts(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """First and last training loss; the last is the mean over the last ten steps, one step alone being noise."""
    losses = [line["loss"] for line in metrics if line.get("loss") is not None]
    if not losses:
        return {"first_loss": None, "last_loss": None, "last_loss_over_steps": 0}
    last = losses[-LAST_LOSSES:]
    return {"first_loss": losses[0], "last_loss": sum(last) / len(last), "last_loss_over_steps": len(last)}


def parameter_counts(model: torch.nn.Module) -> dict[str, int]:
    """Trained parameters, and all of the model's; tied ones count once, packed ones as the numbers they stand for."""
    return {
        "trainable_parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "total_parameters": parameter_count(model),
    }


def file_hash(path: Path) -> str:
    """``sha256:...`` of a file."""
    with atomic.naming(path), open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """Any value as JSON can hold it: numbers that are not finite become null, what has no JSON form its text."""
    if isinstance(value, dict):
        return {str(getattr(key, "value", key)): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, int, bool, type(None))):
        return getattr(value, "value", value)
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if hasattr(value, "item"):
        return plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    return str(value)
