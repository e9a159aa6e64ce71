"""One run, killed at random moments and resumed until it is complete, against the run that nobody killed.

Run by test_kill.py. Every attempt is a fork of this process, so that the seconds of importing are spent once.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from leantune.core.errors import RunError
from leantune.train import RunConfig, fit
from train.resume_fixture import assert_same_run

ROUNDS = 60


def attempt(settings: dict[str, Any]) -> None:
    """Go on where the last attempt was killed, or begin."""
    config = RunConfig(**settings)
    try:
        fit(config, progress=False, resume=True)
    except RunError as error:
        if "complete: " in str(error):
            return
        fit(config, progress=False)


def kill_after(seconds: float, settings: dict[str, Any]) -> bool:
    """Start an attempt in a fork and kill it without warning; False when it had ended, well, before that."""
    victim = os.fork()
    if victim == 0:
        code = 1
        try:
            attempt(settings)
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(victim, os.WNOHANG)
        if found:
            if os.waitstatus_to_exitcode(status) != 0:
                raise SystemExit("an attempt failed by itself")
            return False
        time.sleep(0.01)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    return True


def main(model: str, data: str, home: str, seed: int) -> None:
    """Kill and resume until the run is complete, then compare."""
    torch.set_num_threads(1)
    dice = random.Random(seed)
    settings: dict[str, Any] = {
        "model": model,
        "data": data,
        "method": "lora",
        "method_options": {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.2},
        "max_steps": 12,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "save_steps": 1,
        "overwrite": True,
        "device": "cpu",
    }
    began = time.monotonic()
    fit(RunConfig(**{**settings, "out": Path(home) / "whole"}), progress=False)
    whole = time.monotonic() - began
    kills = 0
    for number in range(ROUNDS):
        # Ever later, so that every stage of a run is met and the last attempt can end.
        if not kill_after(dice.uniform(0.2, 0.6 + 0.15 * number) * whole, {**settings, "out": Path(home) / "run"}):
            break
        kills += 1
    else:
        raise SystemExit(f"not complete after {ROUNDS} kills")
    assert_same_run(Path(home) / "run", Path(home) / "whole")
    print(f"killed {kills} times, the same bits")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
