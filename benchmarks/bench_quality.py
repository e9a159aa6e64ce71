"""S2FT against LoRA on E2E NLG: BLEU at equal steps and equal trained parameters, each at its own tuned rate.

    python benchmarks/bench_quality.py [--seeds 3] [--steps 120] [--json benchmarks/results/bench_quality.json]
    python benchmarks/bench_quality.py --only lora      # its cells alone, e.g. beside another process for s2ft

1. Tune: every method runs two thirds of the steps with log-spaced learning rates (factor 2), seed 0; the lowest loss
   on the 100 distinct validation inputs wins. A winner at the edge of its grid widens the grid until it is not.
2. Measure: every method at its rate, paired seeds, sacrebleu BLEU on 100 distinct test inputs with all references
   (greedy, 48 new tokens, whatever the model writes is scored).

Every cell runs in a fresh process on one thread and is kept in the JSON file, so that a stopped benchmark goes on
where it was. The base is SmolLM2-135M-Instruct dequantised from a 4-bit copy; absolute numbers are of that copy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import machine_facts

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples" / "data" / "e2e_nlg"
BATCH = 8
TEST_INPUTS = 100
# Equal trained parameters: 30 x (576 x 64 + 576 x 77) = 2,436,480 against 30 x 81,408 = 2,442,240 (0.24% apart).
METHODS: dict[str, dict[str, Any]] = {
    "s2ft": {
        "options": {"target_modules": ["o_proj", "down_proj"], "heads": 1, "channels": 77},
        "rates": [2e-3, 4e-3, 8e-3],
    },
    "lora": {
        "options": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"},
        "rates": [1e-3, 2e-3, 4e-3],
    },
}


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Train and score one cell in this process."""
    from leantune.data import read_rows
    from leantune.evaluate import evaluate
    from leantune.train import RunConfig, fit

    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            model="smollm2-135m",
            data=DATA / "train.jsonl",
            limit=cell["steps"] * BATCH,
            method=cell["method"],
            method_options=METHODS[cell["method"]]["options"],
            out=Path(folder) / "run",
            batch_size=BATCH,
            max_steps=cell["steps"],
            max_length=128,
            group_by_length=True,
            lr=cell["lr"],
            seed=cell["seed"],
            save_steps=0,
        )
        run = fit(config, progress=False)
    rows = read_rows(DATA / ("validation.jsonl" if cell["stage"] == "tune" else "test.jsonl"))
    if cell["stage"] == "tune":
        # One answer of each input: all inputs count, at an eighth of the time.
        rows = list({row.prompt: row for row in reversed(rows)}.values())
    else:
        first = set(list(dict.fromkeys(row.prompt for row in rows))[:TEST_INPUTS])
        rows = [row for row in rows if row.prompt in first]
    metrics = ["loss"] if cell["stage"] == "tune" else ["exact_match", "bleu"]
    scores = evaluate(run.model, run.tokenizer, rows, metrics=metrics, resamples=1000)
    result = {name: run.summary[name] for name in ("trainable_parameters", "train_time_s", "peak_memory_bytes")}
    result["scores"] = scores.to_dict() | {"generations": None}
    if cell["stage"] == "measure" and cell["method"] == "s2ft" and cell["seed"] == 0:
        with run.model.disable_adapter():
            base = evaluate(run.model, run.tokenizer, rows, metrics=metrics, resamples=1000)
        result["base_scores"] = base.to_dict() | {"generations": None}
    return result


class Cells:
    """The cells done so far, one file each, so that two processes can share the work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def result(self, cell: dict[str, Any]) -> dict[str, Any]:
        """The result of a cell: from its file, or from a fresh process."""
        path = self.folder / (
            "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in cell.values()) + ".json"
        )
        if path.exists():
            return json.loads(path.read_text())["result"]  # type: ignore[no-any-return]
        print("running", cell, flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--cell", json.dumps(cell)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"cell {cell} failed:\n{done.stderr[-4000:]}")
        result = json.loads(done.stdout.splitlines()[-1])
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"cell": cell, "result": result}, indent=1))
        temporary.replace(path)
        return result  # type: ignore[no-any-return]

    def all(self) -> list[Any]:
        """Every cell done, with its result."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]


def tune(cells: Cells, method: str, steps: int) -> tuple[float, dict[float, float]]:
    """The rate with the lowest validation loss, never at the edge of its grid; and the whole grid."""
    losses: dict[float, float] = {}

    def try_rate(rate: float) -> None:
        cell = {"stage": "tune", "method": method, "lr": rate, "seed": 0, "steps": steps * 2 // 3}
        losses[rate] = cells.result(cell)["scores"]["metrics"]["loss"]["value"]

    for rate in METHODS[method]["rates"]:
        try_rate(rate)
    while True:
        best = min(losses, key=losses.__getitem__)
        if best == min(losses):
            try_rate(best / 2)
        elif best == max(losses):
            try_rate(best * 2)
        else:
            return best, dict(sorted(losses.items()))


def measure(cells: Cells, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tune one method, then run it with every seed."""
    import numpy as np

    rate, grid = tune(cells, method, arguments.steps)
    measured = [
        cells.result({"stage": "measure", "method": method, "lr": rate, "seed": seed, "steps": arguments.steps})
        for seed in range(arguments.seeds)
    ]
    bleu = [each["scores"]["metrics"]["bleu"]["value"] for each in measured]
    return {
        "lr": rate,
        "validation_loss_by_lr": {f"{key:g}": value for key, value in grid.items()},
        "trained_parameters": measured[0]["trainable_parameters"],
        "bleu_by_seed": bleu,
        "bleu_mean": float(np.mean(bleu)),
        "exact_match_by_seed": [each["scores"]["metrics"]["exact_match"]["value"] for each in measured],
        "train_time_s_by_seed": [each["train_time_s"] for each in measured],
        "bleu_signature": measured[0]["scores"]["settings"]["bleu_signature"],
        "base_bleu": measured[0].get("base_scores", {}).get("metrics", {}).get("bleu", {}).get("value"),
    }


def compare(summary: dict[str, Any]) -> dict[str, Any]:
    """The paired difference S2FT - LoRA over seeds, with its 95% interval (Student's t)."""
    import numpy as np
    from scipy import stats

    difference = np.subtract(summary["s2ft"]["bleu_by_seed"], summary["lora"]["bleu_by_seed"])
    half = float(stats.t.ppf(0.975, len(difference) - 1) * stats.sem(difference)) if len(difference) > 1 else None
    mean = float(difference.mean())
    return {
        "by_seed": difference.tolist(),
        "mean": mean,
        "interval_95_over_seeds": None if half is None else [mean - half, mean + half],
    }


def main() -> None:
    """Run the benchmark, or one cell of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of 8 rows")
    parser.add_argument("--only", choices=sorted(METHODS), help="run the cells of one method and stop")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "bench_quality.json")
    parser.add_argument("--cells", type=Path, default=ROOT / "build" / "bench_quality", help="folder of finished cells")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(run_cell(json.loads(arguments.cell))))
        return
    cells = Cells(arguments.cells)
    if arguments.only:
        print(json.dumps(measure(cells, arguments.only, arguments), indent=2))
        return
    summary: dict[str, Any] = {method: measure(cells, method, arguments) for method in METHODS}
    summary["s2ft_minus_lora"] = compare(summary)
    state = {
        "machine": machine_facts(threads=1),
        "base": "SmolLM2-135M-Instruct, dequantised from a 4-bit (Q4_1/Q8_0) GGUF copy",
        "summary": summary,
        "cells": cells.all(),
    }
    arguments.json.write_text(json.dumps(state, indent=1) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
