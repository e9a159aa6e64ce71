"""What every process of the tests of several processes runs: some fits, what each one saw, and a command line."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from leantune import cli
from leantune.train import RunConfig, distributed, fit
from leantune.train.trainer import LeanTrainer


def interrupt_at(step: int, rank: int) -> Any:
    """Ctrl-C reaches one process alone, in the middle of a step; returns what puts things back."""
    genuine = LeanTrainer.training_step

    def interrupted(trainer: LeanTrainer, *arguments: Any, **keywords: Any) -> Any:
        if trainer.state.global_step + 1 == step and trainer.args.process_index == rank:
            os.kill(os.getpid(), signal.SIGINT)
        return genuine(trainer, *arguments, **keywords)

    LeanTrainer.training_step = interrupted  # type: ignore[method-assign]

    def restore() -> None:
        LeanTrainer.training_step = genuine  # type: ignore[method-assign]

    return restore


def main(path: Path) -> None:
    """Run the cases of a file; each leaves ``NAME.RANK.json`` beside it."""
    torch.set_num_threads(1)
    for name, case in json.loads(path.read_text()).items():
        restore = interrupt_at(**case["interrupt"]) if "interrupt" in case else None
        run = fit(RunConfig(**case["config"]), progress=False, resume=case.get("resume", False))
        if restore is not None:
            restore()
        facts = {key: run.summary.get(key) for key in ("status", "signal", "steps", "tokens_seen", "evaluation")}
        facts["kinds"] = sorted({type(each).__name__ for each in run.model.parameters()})
        facts["processes"] = distributed.processes()
        (path.parent / f"{name}.{os.environ['RANK']}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    cli.main(sys.argv[2:])
