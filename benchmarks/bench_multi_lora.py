"""Multi-LoRA against separate LoRAs: four GLUE tasks on one encoder, by start of the shared A.

    python benchmarks/bench_multi_lora.py run [--data ../shared/data] [--arms kaiming,lora]   # resumable, shareable
    python benchmarks/bench_multi_lora.py run --quick                                         # a trial of minutes
    python benchmarks/bench_multi_lora.py report                                              # JSON and table

CoLA (MCC), MRPC (accuracy), SST-2 (accuracy), STS-B (Pearson) with 512 training rows each, seen twice, on MiniLM-L6. An
arm is one joint run of all four tasks with a start of the shared ``A`` (Kaiming, N(0, 1) with ``alpha`` divided by
``sqrt(3 in)``, orthonormal, principal directions of the inputs), or ``lora``: four runs of stock LoRA. Rank 8, alpha
16, query and value, as in the paper. A joint step has 64 rows, 16 of each task; a separate one 16: so both take 64
steps over the same rows. The base's own dropout is off in all arms (tasks that share batches cannot have it), and no
arm has any other. Scores of STS-B are written as ``(score - 2.5) / 1.5``: from 0 to 5 as they are, the mean alone would
take a head's bias longer than a run lasts, and the held-out loss would choose the rate by that. Pearson is the same.

1. Tune: 200 other rows of the train split, half the steps, seed 0, four rates a factor of 2.5 apart. Given ``A`` the
   tasks are independent, so one joint run tries a rate on all four, and each task takes its own best, as each separate
   LoRA does. A grid whose edge wins is widened, for both kinds by the same rule. N(0, 1) takes the rates of Kaiming:
   with that ``alpha`` the entries of ``s A`` have the same mean and variance.
2. Measure: the first 600 rows of the validation split, three seeds, the same for all arms; every task at its own rate.

These sizes are chosen for about an hour on one core: a step of 64 rows takes some two seconds. Three seeds give wide
intervals, and they say nothing about other test rows.

Each cell is a fresh process on one thread and stays in a file. Training times are those of the measured cells: let one
process measure alone on an idle machine for them (``--stage tune`` may be shared out before). A joint run sorts the
rows of a step by length before it cuts them into passes of 16, a separate one draws its 16: the padding shares of both
stand beside the times.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from cell import Cells, mean_interval
from machine import machine_facts

ROOT = Path(__file__).resolve().parent.parent
TASKS = {
    "cola": ("classification", "mcc"),
    "mrpc": ("classification", "accuracy"),
    "sst2": ("classification", "accuracy"),
    "stsb": ("regression", "pearson"),
}
STARTS = ("kaiming", "gaussian", "orthonormal", "activation_pca")
SHARED = {"r": 8, "target_modules": ["query", "value"]}
# What a start is tuned as, where that is not itself.
TUNED_AS = {"gaussian": "kaiming"}
FACTOR = 2.5
RATES = (1e-3, 2.5e-3, 6.25e-3, 1.5625e-2)
WIDENINGS = 3
FULL = {"rows": 512, "tune_rows": 200, "test_rows": 600, "steps": 64, "seeds": 3}
QUICK = {"rows": 48, "tune_rows": 24, "test_rows": 48, "steps": 4, "seeds": 1}
MAX_LENGTH = 96
BATCH = 16


def glue_rows(task: str, split: str, folder: Path) -> list[dict[str, Any]]:
    """The rows of a split, as text, or two, and label; scores centred."""
    import pyarrow.parquet as parquet

    rows = parquet.read_table(folder / f"glue_{task}" / f"{split}.parquet").to_pylist()
    texts = ("sentence", "sentence1", "sentence2")
    labels = [row["label"] if "label" in row else (row["score"] - 2.5) / 1.5 for row in rows]
    return [
        {**{key: row[key] for key in texts if key in row}, "label": label}
        for row, label in zip(rows, labels, strict=True)
    ]


def write_rows(folder: Path, cell: dict[str, Any], data: Path) -> dict[str, dict[str, Path]]:
    """Files of each task: ``train``, and ``eval``, which is held-out training rows while tuning."""
    import numpy as np

    size = QUICK if cell["quick"] else FULL
    files: dict[str, dict[str, Path]] = {}
    for task in cell["tasks"].split("+"):
        train = glue_rows(task, "train", data)
        order = np.random.default_rng(0).permutation(len(train)).tolist()
        drawn = [train[number] for number in order[: size["rows"] + size["tune_rows"]]]
        held_out = drawn[size["rows"] :] if cell["stage"] == "tune" else glue_rows(task, "validation", data)
        parts = {
            "train": drawn[: size["rows"]],
            "eval": held_out[: size["tune_rows" if cell["stage"] == "tune" else "test_rows"]],
        }
        files[task] = {}
        for name, rows in parts.items():
            files[task][name] = folder / f"{task}-{name}.jsonl"
            files[task][name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def encoder_without_dropout(name: str, folder: Path) -> Path:
    """A copy of a base model whose config has no dropout, so that all arms train without it."""
    from leantune.models.location import locate

    found = locate(name).path
    if found is None:
        raise SystemExit(f"--model {name}: give minilm-l6 or a local folder")
    target = folder / "encoder"
    shutil.copytree(found, target)
    config = json.loads((target / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (target / "config.json").write_text(json.dumps(config))
    return target


def settings_of(cell: dict[str, Any], files: dict[str, dict[str, Path]], rates: dict[str, float]) -> dict[str, Any]:
    """The settings of a cell's run that decide what trains."""
    if cell["arm"] == "lora":
        task = cell["tasks"]
        options = {**SHARED, "lora_alpha": 16, "lora_dropout": 0.0}
        kind, own = TASKS[task][0], files[task]
        return {"method": "lora", "method_options": options, "task": kind, "data": own["train"], "lr": rates[task]}
    # N(0, 1) is sqrt(3 in) times as large as Kaiming's start; MiniLM's layers have 384 inputs.
    alpha = 16 / math.sqrt(3 * 384) if cell["arm"] == "gaussian" else 16.0
    tasks = {task: {"data": own["train"], "kind": TASKS[task][0], "lr": rates[task]} for task, own in files.items()}
    options = {**SHARED, "alpha": alpha, "shared_init": cell["arm"]}
    return {"method": "multi-lora", "method_options": options, "tasks": tasks}


def run_cell(cell: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and score one cell in this process."""
    from leantune.core.errors import RunError
    from leantune.data import read_rows
    from leantune.evaluate import evaluate
    from leantune.train import Run, RunConfig, fit

    names = cell["tasks"].split("+")
    rates = dict(zip(names, map(float, str(cell["rates"]).split("+")), strict=True))
    steps = (QUICK if cell["quick"] else FULL)["steps"]
    with tempfile.TemporaryDirectory() as scratch:
        files = write_rows(Path(scratch), cell, arguments.data)
        config = RunConfig(
            model=str(encoder_without_dropout(arguments.model, Path(scratch))),
            out=Path(scratch) / "run",
            max_steps=steps // 2 if cell["stage"] == "tune" else steps,
            batch_size=BATCH,
            gradient_accumulation=len(names),
            max_length=MAX_LENGTH,
            seed=cell["seed"],
            save_steps=0,
            **settings_of(cell, files, rates),
        )
        try:
            run = fit(config, progress=False)
        except RunError as error:
            # Training that diverges is an answer too, to the search for a rate.
            if cell["stage"] != "tune" or "finite" not in str(error):
                raise
            return {"scores": {name: {"loss": math.inf} for name in names}, "diverged": str(error)}
        facts = {name: run.summary[name] for name in ("trainable_parameters", "train_time_s", "padding_share", "steps")}
        facts["task_parameters"] = run.summary.get("task_parameters")
        facts["scores"] = {}
        for name in names:
            one = Run.open(run.folder, name if config.tasks else None)
            one.load()
            labels = (one.summary.get("data") or {}).get("label_names")
            rows = read_rows(files[name]["eval"])
            found = evaluate(one.model, one.tokenizer, rows, task=one.config.task, label_names=labels, resamples=0)
            values = {metric: score.value for metric, score in found.metrics.items()}
            loss = values["mse" if TASKS[name][0] == "regression" else "cross_entropy"]
            facts["scores"][name] = {"loss": loss, **values}
    return facts


def tuned_rates(cells: Cells, arm: str, names: list[str], quick: bool) -> dict[str, float]:
    """The rate with the lowest held-out loss of each task; cells with several tasks try a rate on all of them."""
    losses: dict[float, dict[str, float]] = {}

    def attempt(rate: float) -> None:
        rates = "+".join([f"{rate:g}"] * len(names))
        cell = {"stage": "tune", "arm": arm, "tasks": "+".join(names), "rates": rates, "seed": 0, "quick": quick}
        scores = cells.result(cell)["scores"]
        losses[rate] = {name: scores[name]["loss"] for name in names}

    for rate in RATES[1:3] if quick else RATES:
        attempt(rate)
    for _ in range(0 if quick else WIDENINGS):
        best = {name: min(losses, key=lambda rate: losses[rate][name]) for name in names}
        low, high = min(losses), max(losses)
        if low in best.values():
            attempt(low / FACTOR)
        if high in best.values():
            attempt(high * FACTOR)
        if not {low, high} & set(best.values()):
            break
    return {name: min(losses, key=lambda rate: losses[rate][name]) for name in names}


def run_arm(cells: Cells, arm: str, arguments: argparse.Namespace) -> None:
    """Tune one arm and, unless only that is wanted, measure it."""
    groups = [[name] for name in TASKS] if arm == "lora" else [list(TASKS)]
    for names in groups:
        rates = tuned_rates(cells, TUNED_AS.get(arm, arm), names, arguments.quick)
        if arguments.stage == "tune":
            continue
        for seed in range((QUICK if arguments.quick else FULL)["seeds"]):
            text = "+".join(f"{rates[name]:g}" for name in names)
            cells.result(
                {
                    "stage": "measure",
                    "arm": arm,
                    "tasks": "+".join(names),
                    "rates": text,
                    "seed": seed,
                    "quick": arguments.quick,
                }
            )


def summary_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Per arm: each task's metric over seeds and its difference to LoRA, parameters, training time of all tasks."""
    arms: dict[str, Any] = {}
    for arm in ("lora", *STARTS):
        measured = [each for each in found if each["cell"]["arm"] == arm and each["cell"]["stage"] == "measure"]
        if not measured:
            continue
        tasks: dict[str, Any] = {}
        for name, (_, metric) in TASKS.items():
            own = [each for each in measured if name in each["cell"]["tasks"].split("+")]
            by_seed = {str(each["cell"]["seed"]): each["result"]["scores"][name][metric] for each in own}
            if by_seed:
                place = own[0]["cell"]["tasks"].split("+").index(name)
                rate = float(str(own[0]["cell"]["rates"]).split("+")[place])
                tasks[name] = {
                    "metric": metric,
                    "lr": rate,
                    "by_seed": by_seed,
                    **mean_interval(list(by_seed.values())),
                }
        seconds: dict[int, float] = {}
        for each in measured:
            seed = each["cell"]["seed"]
            seconds[seed] = seconds.get(seed, 0.0) + each["result"]["train_time_s"]
        first = [each["result"] for each in measured if each["cell"]["seed"] == 0]
        arms[arm] = {
            "tasks": tasks,
            "trained_parameters": sum(each["trainable_parameters"] for each in first),
            "task_parameters": first[0]["task_parameters"],
            "train_time_s": mean_interval(list(seconds.values())),
            "padding_share": [each["padding_share"] for each in first],
        }
    for arm in arms.values():
        for name, task in arm["tasks"].items():
            base = (arms.get("lora") or {"tasks": {}})["tasks"].get(name)
            shared = sorted(set(task["by_seed"]) & set(base["by_seed"])) if base else []
            if shared:
                task["minus_lora"] = mean_interval([task["by_seed"][seed] - base["by_seed"][seed] for seed in shared])
    return arms


def print_table(arms: dict[str, Any]) -> None:
    """The summary as Markdown."""
    heads = " | ".join(f"{name} ({metric})" for name, (_, metric) in TASKS.items())
    print(f"| arm | {heads} | trained parameters | training time, all tasks |")
    print("|---" * (len(TASKS) + 3) + "|")
    for name, arm in arms.items():
        scores = " | ".join(_span(arm["tasks"].get(task)) for task in TASKS)
        print(f"| {name} | {scores} | {arm['trained_parameters']:,} | {arm['train_time_s']['mean']:.0f} s |")


def _span(task: dict[str, Any] | None) -> str:
    if task is None:
        return "-"
    difference = task.get("minus_lora")
    return f"{task['mean']:.3f}" + ("" if difference is None else f" ({difference['mean']:+.3f})")


def report(cells: Cells, arguments: argparse.Namespace) -> None:
    """Write the JSON, print the table."""
    found = [each for each in cells.all() if each["cell"]["quick"] == arguments.quick]
    arms = summary_of(found)
    state = {
        "machine": machine_facts(threads=1),
        "base": "all-MiniLM-L6-v2, float32, dropout off",
        "setup": QUICK if arguments.quick else FULL,
        "summary": arms,
        "cells": found,
    }
    if not arguments.quick:
        arguments.json.write_text(json.dumps(state, indent=1) + "\n")
    print_table(arms)


def main() -> None:
    """Run cells, one cell, or the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["run", "report"], default="report")
    parser.add_argument("--arms", default=",".join([*STARTS, "lora"]), help="comma-separated; default all")
    parser.add_argument("--stage", choices=["tune", "measure"], default="measure", help="tune stops before measuring")
    parser.add_argument("--quick", action="store_true", help="few rows, two rates, one seed")
    # A cell's process gets these two by the environment: they say where things stand, not what a cell is.
    model, data = os.environ.get("BENCH_MODEL", "minilm-l6"), os.environ.get("BENCH_DATA", ROOT.parent / "shared/data")
    parser.add_argument("--model", default=model, help="minilm-l6, or a folder with an encoder of 384 inputs")
    parser.add_argument("--data", type=Path, default=Path(data), help="folder with glue_*, parquet")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "bench_multi_lora.json")
    parser.add_argument(
        "--cells", type=Path, default=ROOT / "build" / "bench_multi_lora", help="folder of finished cells"
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(run_cell(json.loads(arguments.cell), arguments)))
        return
    os.environ |= {"BENCH_MODEL": arguments.model, "BENCH_DATA": str(arguments.data.resolve())}
    cells = Cells(arguments.cells, __file__)
    if arguments.json.is_file():
        cells.restore(json.loads(arguments.json.read_text())["cells"])
    if arguments.action == "report":
        report(cells, arguments)
        return
    names = arguments.arms.split(",")
    unknown = set(names) - {*STARTS, "lora"}
    if unknown:
        sys.exit(f"--arms: {', '.join(sorted(unknown))}; known: {', '.join([*STARTS, 'lora'])}")
    for name in names:
        run_arm(cells, name, arguments)


if __name__ == "__main__":
    main()
