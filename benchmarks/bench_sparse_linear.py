"""Time and memory of one layer with trained entries: by CSR products, by dense stretches, beside S2FT's slice.

python benchmarks/bench_sparse_linear.py [--json benchmarks/results/bench_sparse_linear.json]

A step is a forward and a backward of one layer in float32 on one core of a CPU, the gradient of its input included, in
CPU time, the best of several. The base is the frozen layer alone (two products), full is its dense gradient too
(three). Allocated bytes are the most that the step held at one time, beside weight, input and gradient of the output,
as torch's profiler counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from leantune.kernels import sparse_linear as kernel
from leantune.kernels.partial_linear import partial_linear
from leantune.methods._entries import random_entries
from machine import machine_facts

RESULT = Path(__file__).resolve().parent / "results" / "bench_sparse_linear.json"
SHAPES = ((2048, 2048), (576, 1536))
TOKENS = (64, 512)
SHARES = (0.001, 0.01, 0.03, 0.1)
REPEATS = 15


def best_ms(step: Callable[[], None]) -> float:
    """The fastest of several steps, after one that warms up."""
    step()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return round(min(times) * 1e3, 2)


def peak_bytes(step: Callable[[], None]) -> int:
    """The most that a step held at one time beyond what was there before it."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def cell(out: int, width: int, tokens: int, share: float) -> dict[str, object]:
    """One layer at one share, each way."""
    torch.manual_seed(0)
    weight, x = torch.randn(out, width), torch.randn(tokens, width, requires_grad=True)
    grad_y = torch.randn(tokens, out)
    count = round(share * out * width)
    index = random_entries(out * width, count, 0).to(kernel.index_dtype(out, width))
    values = torch.zeros(count, requires_grad=True)
    columns = max(1, round(share * width))
    slice_values = torch.zeros(out, columns, requires_grad=True)
    chosen = torch.randperm(width)[:columns]
    dense = weight.clone().requires_grad_()

    def run(forward: Callable[[], Tensor], *wanted: Tensor) -> Callable[[], None]:
        return lambda: (torch.autograd.grad(forward(), (x, *wanted), grad_y), None)[1]

    entries = run(lambda: kernel.sparse_linear(x, weight, None, values, index), values)
    ways = {
        "base": run(lambda: F.linear(x, weight)),
        "full": run(lambda: F.linear(x, dense), dense),
        "s2ft": run(lambda: partial_linear(x, weight, None, slice_values, chosen, "in"), slice_values),
        "csr": entries,
        "stretches": entries,
    }
    row: dict[str, object] = {"out": out, "in": width, "tokens": tokens, "share": share, "entries": count}
    for name, step in ways.items():
        kernel.MOST_ENTRIES = 1.0 if name == "csr" else 0.0
        row[name] = {"ms": best_ms(step), "peak_bytes": peak_bytes(step)}
    return row


def main() -> None:
    """Measure every cell, print it, write all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for out, width in SHAPES:
        for tokens in TOKENS:
            for share in SHARES:
                rows.append(cell(out, width, tokens, share))
                print(json.dumps(rows[-1]), flush=True)
    state = {"machine": machine_facts(threads=1), "dtype": "float32", "clock": "CPU time", "rows": rows}
    arguments.json.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
