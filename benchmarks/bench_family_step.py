"""Step time and peak memory of every method beside stock PEFT LoRA's, in the run that a user would start.

    python benchmarks/bench_family_step.py [--arms s2ft,lora,lora-sb] [--rounds 12] [--precision float32]

The arms are those of ``bench_methods.py``: the embedded model on E2E NLG, 8 rows a step, loss on the completions. Each
is a fresh process on one thread with the trainer that `leantune train` uses; the steps of all arms are interleaved
(A B C A B C ...), so that a machine that slows down slows all of them, and every arm sees the same batches.

Columns: CPU seconds of a step (median of the ratios to LoRA round by round), the same in seconds, and peak resident
bytes above those of the loaded model, whose weights have all been read before (each arm alone, over four steps).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_methods import ARMS, BENCHES, E2E, RESULTS, ROWS
from machine import machine_facts, status_bytes

PEER = "lora"
MEMORY_STEPS = 4


def work(arm_name: str, rounds: int, precision: str) -> None:
    """Train one arm, a step for each line on standard input; answer each with its CPU seconds."""
    import torch
    from transformers import TrainerCallback
    from typing_extensions import override

    from leantune.train import RunConfig
    from leantune.train.calibration import calibrate
    from leantune.train.setup import prepare

    class Gate(TrainerCallback):
        """Waits before each step; tells of it afterwards."""

        began = 0.0

        @override
        def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
            if not sys.stdin.readline():
                raise SystemExit
            self.began = time.process_time()

        @override
        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            tell({"cpu_s": time.process_time() - self.began, "peak_bytes": status_bytes("VmHWM") - base_bytes})

    arm, bench = ARMS[arm_name], BENCHES["e2e"]
    with tempfile.TemporaryDirectory() as scratch:
        config = RunConfig(
            model=bench.model,
            data=E2E / "train.jsonl",
            limit=ROWS,
            method=arm.method,
            method_options=arm.options,
            out=Path(scratch) / "run",
            max_steps=rounds,
            lr=arm.rates[len(arm.rates) // 2],
            save_steps=0,
            precision=precision,
            **bench.settings,
        ).resolved()
        prepared = prepare(config)
        with torch.no_grad():
            # Weights are mapped lazily from the file: read them all before the model's own memory is measured.
            for parameter in prepared.model.parameters():
                parameter.sum()
        base_bytes = status_bytes("VmRSS")
        calibrate(config, prepared.trainer, prepared.trainer.train_dataset, [].append)
        start_bytes = status_bytes("VmHWM") - base_bytes
        Path("/proc/self/clear_refs").write_text("5")
        prepared.trainer.add_callback(Gate())
        trained = sum(each.numel() for each in prepared.model.parameters() if each.requires_grad)
        tell({"ready": True, "trained_parameters": trained, "start_bytes": max(start_bytes, 0)})
        prepared.trainer.train()


def tell(answer: dict[str, Any]) -> None:
    """One JSON line to the process that asked."""
    print("@" + json.dumps(answer), flush=True)


class Remote:
    """An arm in a process of its own."""

    def __init__(self, arm: str, arguments: argparse.Namespace, *, frugal: bool = False) -> None:
        self.arm = arm
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if frugal:
            # Freed blocks go back at once. What glibc keeps otherwise differs by a gigabyte from run to run.
            environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
        words = ["--worker", arm, "--rounds", str(arguments.rounds + 1), "--precision", arguments.precision]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.steps: list[dict[str, float]] = []
        self.facts = self.read()

    def read(self) -> dict[str, Any]:
        """The worker's next answer."""
        assert self.process.stdout is not None, "the worker's output is not a pipe"
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])  # type: ignore[no-any-return]
        assert self.process.stderr is not None, "the worker's errors are not a pipe"
        raise SystemExit(f"{self.arm} ended early:\n{self.process.stderr.read()[-3000:]}")

    def step(self) -> dict[str, Any]:
        """Let it take one step."""
        assert self.process.stdin is not None, "the worker's input is not a pipe"
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.read()


def measure(names: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row an arm."""
    remotes = {}
    for name in names:
        remotes[name] = Remote(name, arguments)
        print(f"{name} is ready", file=sys.stderr, flush=True)
    for number in range(arguments.rounds + 1):
        for remote in remotes.values():
            answer = remote.step()
            # The first round warms up: allocator, optimizer state.
            if number:
                remote.steps.append(answer)
    peer = remotes[PEER].steps
    rows: list[dict[str, Any]] = []
    for name, remote in remotes.items():
        remote.process.kill()
        seconds = [step["cpu_s"] for step in remote.steps]
        ratios = [own["cpu_s"] / other["cpu_s"] for own, other in zip(remote.steps, peer, strict=True)]
        rows.append(
            {
                "arm": name,
                "method": ARMS[name].method,
                "trained_parameters": remote.facts["trained_parameters"],
                "step_s": statistics.median(seconds),
                "step_s_min": min(seconds),
                "step_s_max": max(seconds),
                "step_over_lora": statistics.median(ratios),
                "step_over_lora_min": min(ratios),
                "step_over_lora_max": max(ratios),
            }
        )
    return rows


def add_memory(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Peaks of a few steps, each arm alone, under an allocator that keeps nothing back."""
    for row in rows:
        remote = Remote(row["arm"], arguments, frugal=True)
        row["peak_bytes"] = [remote.step()["peak_bytes"] for _ in range(MEMORY_STEPS)][-1]
        row["start_bytes"] = remote.facts["start_bytes"]
        remote.process.kill()
        print(f"{row['arm']}: {row['peak_bytes'] / 2**20:.0f} MiB", file=sys.stderr, flush=True)
    for row in rows:
        row["peak_over_lora"] = row["peak_bytes"] / next(each["peak_bytes"] for each in rows if each["arm"] == PEER)


def main() -> None:
    """Run the benchmark, or be one of its workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name, arm in ARMS.items() if "e2e" in arm.benches]
    parser.add_argument("--arms", default=",".join(known), help="comma-separated; default all")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--at-once", type=int, default=5, help="processes in memory at the same time, LoRA among them")
    parser.add_argument("--json", type=Path, default=RESULTS / "bench_family_step.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.rounds, arguments.precision)
        return
    others = [name for name in arguments.arms.split(",") if name != PEER]
    size = arguments.at_once - 1
    rows: list[dict[str, Any]] = []
    for first in range(0, len(others), size):
        found = measure([PEER, *others[first : first + size]], arguments)
        rows += found if not rows else found[1:]
    add_memory(rows, arguments)
    state = {
        "machine": machine_facts(threads=1),
        "precision": arguments.precision,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    arguments.json.write_text(json.dumps(state, indent=1) + "\n")
    for row in sorted(rows, key=lambda each: each["step_over_lora"]):
        print(
            f"{row['arm']:18} step {row['step_s']:5.2f} s ({row['step_over_lora']:.2f} x LoRA)  "
            f"peak {row['peak_bytes'] / 2**20:6.0f} MiB ({row['peak_over_lora']:.2f} x)  "
            f"trained {row['trained_parameters']:,}"
        )


if __name__ == "__main__":
    main()
