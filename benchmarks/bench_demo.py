"""The demo as a user meets it: seconds to the first loss, to the prompts before and after, and in all; BLEU; memory.

    python benchmarks/bench_demo.py [--json benchmarks/results/demo.json]

Runs `leantune demo` in a process of its own on all cores and reads its lines as they come. The model must be in the
cache (`make demo` fetches it once). The base is SmolLM2-135M-Instruct dequantised from a 4-bit copy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from machine import machine_facts

ROOT = Path(__file__).resolve().parent.parent
# What a line begins with when its moment has come.
MOMENTS = {"first_loss_s": "step", "before_and_after_s": "The same prompts", "scores_s": "What it bought"}


def watch(folder: Path) -> dict[str, float]:
    """Run the demo; seconds from its start to each moment, and to its end."""
    command = [sys.executable, "-m", "leantune", "demo", "--out", str(folder)]
    began = time.perf_counter()
    seen: dict[str, float] = {}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            for name, start in MOMENTS.items():
                if line.startswith(start):
                    seen.setdefault(name, round(time.perf_counter() - began, 1))
    if process.returncode != 0:
        raise SystemExit(f"leantune demo ended with {process.returncode}")
    return {**seen, "all_s": round(time.perf_counter() - began, 1)}


def main() -> None:
    """Run the demo once and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "demo.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        moments = watch(Path(scratch) / "run")
        run: dict[str, Any] = json.loads((Path(scratch) / "run" / "run.json").read_text(encoding="utf-8"))
    wanted = ("status", "base", "method", "trainable_parameters", "total_parameters", "steps", "train_time_s")
    wanted += ("tokens_per_s", "padding_share", "peak_memory_bytes", "first_loss", "last_loss", "evaluation", "config")
    config = {**run["config"], "out": "runs/demo"}
    state = {
        "machine": machine_facts(threads=torch.get_num_threads()),
        "seconds": moments,
        "run": {name: run[name] for name in wanted} | {"config": config},
    }
    arguments.json.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(moments))


if __name__ == "__main__":
    main()
