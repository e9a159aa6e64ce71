"""Trains over and over into one folder, is killed at random moments, and looks at what is left. Run by test_kill.py.

The killed process is a fork of this one, so that the seconds of importing are spent once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from leantune.core.errors import RunError
from leantune.train import Run, RunConfig, fit
from leantune.train.checkpoint import checkpoints


def train_for_ever(settings: dict[str, object]) -> None:
    """Whole runs, one after the other, each with other numbers: every stage of a run comes by."""
    for seed in range(10_000):
        fit(RunConfig(**{**settings, "seed": seed}), progress=False)


def kill_after(seconds: float, settings: dict[str, object]) -> None:
    """Start training in a fork and kill it without warning."""
    victim = os.fork()
    if victim == 0:
        train_for_ever(settings)
        os._exit(0)
    time.sleep(seconds)
    os.kill(victim, signal.SIGKILL)
    _, status = os.waitpid(victim, 0)
    if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        raise SystemExit(f"the victim ended by itself: {status}")


def look(folder: Path) -> str:
    """Whatever claims to be complete must load; returns what was there."""
    for path in checkpoints(folder / "checkpoints"):
        load_file(path / "adapter_model.safetensors")
        torch.load(path / "optimizer.pt", weights_only=True)
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    if not (folder / "config.yaml").exists():
        return "nothing yet"
    run = Run.open(folder)
    try:
        _, model = run.load()
    except RunError as error:
        if (folder / "adapter").exists() or checkpoints(folder / "checkpoints"):
            raise
        return str(error).split("; ")[0].rpartition(": ")[2]
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 11)[None]).logits
    if not bool(torch.isfinite(logits).all()):
        raise SystemExit(f"{run.result} does not hold a model")
    return f"{run.result.name} ({run.summary.get('status')})"


def main(model: str, data: str, out: str, rounds: int, seed: int) -> None:
    """Kill, look, and again; once there is an adapter there must always be one."""
    torch.set_num_threads(1)
    dice = random.Random(seed)
    folder = Path(out)
    settings: dict[str, object] = {
        "model": model,
        "data": data,
        "out": folder,
        "method": "lora",
        "method_options": {"r": 2, "target_modules": ["q_proj"]},
        "max_steps": 3,
        "batch_size": 2,
        "save_steps": 1,
        "overwrite": True,
        "device": "cpu",
    }
    # How long a run takes on this machine now: kills are to fall into all of it, and some behind its end.
    began = time.monotonic()
    fit(RunConfig(**{**settings, "out": folder.with_name("measured")}), progress=False)
    whole = time.monotonic() - began
    had_adapter = False
    for _ in range(rounds):
        kill_after(dice.uniform(0.05, 2.5) * whole, settings)
        found = look(folder)
        print(found, flush=True)
        if had_adapter and not found.startswith("adapter"):
            raise SystemExit(f"there was an adapter before the kill, now: {found}")
        had_adapter = found.startswith("adapter")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
