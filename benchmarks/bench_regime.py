"""Time and memory of a training step in each regime: S2FT against stock PEFT LoRA of equal trained parameters.

    python benchmarks/bench_regime.py [--rounds 5] [--batch 4] [--length 128] [--json FILE]

Checkpointing off and on, each with float32 weights, bfloat16 autocast over float32 weights, and bfloat16 weights. All
rows are workers of bench_step.py: one process and one thread each, the same loss and plain loop, steps interleaved.
Ratios are to PEFT LoRA in float32 without checkpointing; a processor without bfloat16 units emulates them, so `machine`
in the result belongs to every figure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from itertools import product
from pathlib import Path
from typing import Any

import bench_step
from bench_step import ROOT, ROWS, Remote, Worker
from machine import machine_facts

METHODS = ("s2ft", "lora")
PRECISIONS = ("float32", "bf16 autocast", "bf16 weights")
SEED = 0
BASELINE = {"method": "lora", "checkpointing": False, "precision": "float32"}


class RegimeWorker(Worker):
    """A worker of bench_step in one of the precisions."""

    def __init__(self, method: str, checkpointing: bool, batch: int, length: int, precision: str) -> None:
        self.precision = precision
        dtype = "bfloat16" if precision == "bf16 weights" else "float32"
        super().__init__(method, checkpointing, batch, length, dtype=dtype)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """What the forward pass runs in."""
        import torch

        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16 autocast")


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows, interleaved."""
    names = [
        {"method": method, "checkpointing": checkpointing, "precision": precision}
        for checkpointing, precision, method in product((False, True), PRECISIONS, METHODS)
    ]
    remotes = [
        Remote(name, [name["method"], str(int(name["checkpointing"])), name["precision"]], arguments, script=__file__)
        for name in names
    ]
    for round_number in range(arguments.rounds + 1):
        for remote in remotes:
            answer = remote.ask("step")
            # The first round warms up: allocator, optimizer state.
            if round_number:
                remote.steps.append(answer)
        print(f"round {round_number} of {arguments.rounds}", file=sys.stderr, flush=True)
    rows = [bench_step.row_of(remote) for remote in remotes]
    base = names.index(BASELINE)
    for row, remote in zip(rows, remotes, strict=True):
        pairs = zip(remote.steps, remotes[base].steps, strict=True)
        row["step_over_baseline"] = statistics.median(own["cpu_s"] / other["cpu_s"] for own, other in pairs)
        row["peak_over_baseline"] = row["peak_bytes"] / rows[base]["peak_bytes"]
    return rows


def main() -> None:
    """Run the benchmark, or be one of its workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "bench_regime.json")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        method, checkpointing, precision, batch, length = arguments.worker
        RegimeWorker(method, bool(int(checkpointing)), int(batch), int(length), precision).serve()
        return
    rows = measure(arguments)
    state = {
        "machine": machine_facts(threads=1),
        "model": "SmolLM2-135M",
        "options": {method: ROWS[method] for method in METHODS},
        "baseline": BASELINE,
        "seed": SEED,
        "batch": arguments.batch,
        "length": arguments.length,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    arguments.json.write_text(json.dumps(state, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['method']:5} {row['precision']:14} checkpointing {'on ' if row['checkpointing'] else 'off'}  "
            f"{row['step_s']:6.2f} s ({row['step_over_baseline']:.2f} x)  "
            f"peak {row['peak_bytes'] / 2**20:6.0f} MiB ({row['peak_over_baseline']:.2f} x)  "
            f"saved {row['saved_bytes'] / 2**20:6.0f} MiB  trained {row['trained_parameters']:,}"
        )


if __name__ == "__main__":
    main()
