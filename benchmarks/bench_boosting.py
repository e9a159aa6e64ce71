"""How long a round, how many blocks: XGBLoRA at equal budget against LoRA, ReLoRA and a chain of LoRAs.

    python benchmarks/bench_boosting.py run [--arms k8,b30] [--stage tune]   # resumable; several may share the work
    python benchmarks/bench_boosting.py report                               # JSON, table and plot from finished cells
    python benchmarks/bench_boosting.py --quick                              # two steps of three arms, to see it run

Every arm sees the same 384 rows of E2E NLG in the same order: 48 steps of 8 rows, so equal steps and equal tokens. (48
is what a sweep of this size affords on one core. A round of 48 steps is then no boosting any more, but one booster.)
The measure is the loss per token on the 100 distinct validation inputs. Every arm is tuned alike: three learning
rates a factor of two apart, seed 0, and the grid is widened until the best is not at its edge. The finals, the best
round length and the best number of blocks among them, are then run with three paired seeds and scored by sacrebleu
BLEU on 100 distinct test inputs with all references (greedy, 48 new tokens, whatever the model writes is scored).

The base is SmolLM2-135M-Instruct dequantised from a 4-bit copy; 30 blocks, all linear layers of a block adapted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cell import Cells, mean_interval, tune
from machine import machine_facts

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples" / "data" / "e2e_nlg"
RESULTS = ROOT / "benchmarks" / "results"
STEPS, BATCH, TEST_INPUTS, SEEDS = 48, 8, 100, 3
QUICK = {"steps": 2, "validation": 4, "test": 2}


@dataclass(frozen=True)
class Arm:
    """A setting to compare.

    Attributes:
        method: as `leantune methods` lists it.
        options: of the method.
        middle: the rate that the search begins around.
        title: in words.
        final: scored by BLEU whatever its loss.
    """

    method: str
    options: dict[str, Any]
    middle: float
    title: str
    final: bool = False
    place: dict[str, int] = field(default_factory=dict)


def boosted(steps: int, blocks: int, title: str, **options: Any) -> Arm:
    """XGBLoRA of rank 1, scale 2."""
    settings = {"r": 1, "steps_per_round": steps, "blocks_per_round": blocks, "target_modules": "all-linear", **options}
    # The warm-up of a round is two steps where it has as many to spare.
    settings.setdefault("warmup_steps", min(2, steps // 4))
    return Arm("xgblora", settings, 8e-3, title, place={"steps_per_round": steps, "blocks_per_round": blocks})


def lora(r: int, middle: float, final: bool) -> Arm:
    """Stock LoRA at the same scale."""
    options = {"r": r, "lora_alpha": 2 * r, "lora_dropout": 0.0, "target_modules": "all-linear"}
    return Arm("lora", options, middle, f"LoRA, r = {r}", final)


def chain(method: str, steps: int, warmup: int, title: str) -> Arm:
    """Boosters of rank 8 in all blocks."""
    options = {"r": 8, "alpha": 16, "steps_per_round": steps, "warmup_steps": warmup, "target_modules": "all-linear"}
    return Arm(method, options, 2e-3, title, final=True)


ROUND_LENGTHS = (2, 4, 8, 16, 48)
BLOCK_COUNTS = (3, 10, 20, 30)
CENTRE = (8, 10)
ARMS: dict[str, Arm] = {
    **{f"k{steps}": boosted(steps, CENTRE[1], f"{steps} steps a round") for steps in ROUND_LENGTHS},
    **{f"b{blocks}": boosted(CENTRE[0], blocks, f"{blocks} blocks a round") for blocks in BLOCK_COUNTS if blocks != 10},
    "gradient-start": boosted(*CENTRE, "8 steps, 10 blocks, start along the gradient", start="gradient"),
    "line-search": boosted(*CENTRE, "8 steps, 10 blocks, line search", line_search=True),
    "lora-r1": lora(1, 4e-3, True),
    "lora-r8": lora(8, 2e-3, False),
    "relora": chain("relora", 16, 4, "ReLoRA, r = 8, a reset every 16 steps"),
    "cola": chain("cola", 16, 0, "chain of three LoRAs, r = 8"),
}
QUICK_ARMS = ("k2", "lora-r1", "relora")


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Train and score one cell in this process."""
    from leantune.core.errors import RunError
    from leantune.data import read_rows
    from leantune.evaluate import evaluate
    from leantune.train import RunConfig, fit

    arm = ARMS[cell["arm"]]
    with tempfile.TemporaryDirectory() as scratch:
        config = RunConfig(
            model="smollm2-135m",
            data=DATA / "train.jsonl",
            limit=STEPS * BATCH,
            method=arm.method,
            method_options=arm.options,
            out=Path(scratch) / "run",
            batch_size=BATCH,
            max_steps=cell["steps"],
            max_length=128,
            group_by_length=True,
            schedule="constant",
            warmup_ratio=0.0,
            lr=cell["lr"],
            seed=cell["seed"],
            save_steps=0,
            precision=cell["precision"],
        )
        try:
            run = fit(config, progress=False)
        except RunError as error:
            # Training that diverges is an answer too, to the search for a rate.
            if cell["stage"] != "tune" or "finite" not in str(error):
                raise
            return {"loss": math.inf, "diverged": str(error)}
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        facts = {name: run.summary[name] for name in ("trainable_parameters", "train_time_s", "peak_memory_bytes")}
        weights = run.folder / "adapter" / "adapter_model.safetensors"
        facts |= {"steps": run.summary["steps"], "file_bytes": weights.stat().st_size}
        facts["step_scales"] = [line["step_scale"] for line in map(json.loads, lines) if "step_scale" in line]
        quick = cell["steps"] == QUICK["steps"]
        # One answer of each input: all inputs count, at an eighth of the time.
        held_out = list({row.prompt: row for row in reversed(read_rows(DATA / "validation.jsonl"))}.values())
        held_out = held_out[: QUICK["validation"]] if quick else held_out
        scores = evaluate(run.model, run.tokenizer, held_out, metrics=["loss"], resamples=10).to_dict()
        facts["loss"] = scores["metrics"]["loss"]["value"]
        if cell["stage"] == "final":
            rows = read_rows(DATA / "test.jsonl")
            count = QUICK["test"] if quick else TEST_INPUTS
            inputs = set(list(dict.fromkeys(row.prompt for row in rows))[:count])
            rows = [row for row in rows if row.prompt in inputs]
            facts["scores"] = evaluate(run.model, run.tokenizer, rows, metrics=["bleu"], resamples=100).to_dict()[
                "metrics"
            ]
    return facts


def tuned(cells: Cells, name: str, arguments: argparse.Namespace) -> tuple[float, dict[float, float]]:
    """The rate of an arm, and the loss at each rate."""

    def loss_at(rate: float) -> float:
        return float(cells.result(cell_of("tune", name, rate, 0, arguments))["loss"])

    middle = ARMS[name].middle
    if arguments.quick:
        return middle, {middle: loss_at(middle)}
    return tune(loss_at, (middle / 2, middle, middle * 2))


def cell_of(stage: str, name: str, rate: float, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides the numbers of a cell."""
    steps = QUICK["steps"] if arguments.quick else STEPS
    return {"stage": stage, "arm": name, "lr": rate, "seed": seed, "steps": steps, "precision": arguments.precision}


def finals(best: dict[str, float]) -> list[str]:
    """The arms to be scored by BLEU: the baselines, and of the two sweeps the one with the lowest loss each."""
    chosen = [name for name in best if ARMS[name].final]
    for axis, other in (("steps_per_round", "blocks_per_round"), ("blocks_per_round", "steps_per_round")):
        centre = dict(zip(("steps_per_round", "blocks_per_round"), CENTRE, strict=True))[other]
        swept = [name for name in sweep(best, axis) if ARMS[name].place[other] == centre]
        chosen += [min(swept, key=best.__getitem__)] if swept else []
    return list(dict.fromkeys(chosen))


def sweep(best: dict[str, Any], axis: str) -> list[str]:
    """The arms of one sweep, in the order of its axis."""
    centre = dict(zip(("steps_per_round", "blocks_per_round"), CENTRE, strict=True))
    plain = {name for name in best if ARMS[name].place and not {"start", "line_search"} & ARMS[name].options.keys()}
    on_axis = [
        name
        for name in plain
        if all(value == centre[other] for other, value in ARMS[name].place.items() if other != axis)
    ]
    return sorted(on_axis, key=lambda name: ARMS[name].place[axis])


def run(cells: Cells, arguments: argparse.Namespace) -> None:
    """Tune the arms asked for and, when all are tuned, score the finals."""
    rates = {name: tuned(cells, name, arguments) for name in arguments.arms}
    if arguments.stage == "tune" or set(arguments.arms) != set(QUICK_ARMS if arguments.quick else ARMS):
        return
    best = {name: min(losses.values()) for name, (_, losses) in rates.items()}
    for name in finals(best):
        for seed in range(1 if arguments.quick else SEEDS):
            cells.result(cell_of("final", name, rates[name][0], seed, arguments))


def summary_of(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every arm: its best rate and loss, what it trains and leaves, and the finals' BLEU over seeds."""
    table = {}
    for name, arm in ARMS.items():
        mine = [each for each in found if each["cell"]["arm"] == name]
        tunes = sorted((each for each in mine if each["cell"]["stage"] == "tune"), key=lambda each: each["cell"]["lr"])
        if not tunes:
            continue
        best = min(tunes, key=lambda each: each["result"]["loss"])
        scored = sorted((each for each in mine if each["cell"]["stage"] == "final"), key=lambda e: e["cell"]["seed"])
        table[name] = {
            "title": arm.title,
            "options": arm.options,
            "lr": best["cell"]["lr"],
            "loss": best["result"]["loss"],
            "loss_by_lr": {f"{each['cell']['lr']:g}": each["result"]["loss"] for each in tunes},
            **{key: best["result"][key] for key in ("trainable_parameters", "train_time_s", "file_bytes")},
            "step_scales": best["result"]["step_scales"],
        }
        if scored:
            bleu = [each["result"]["scores"]["bleu"]["value"] for each in scored]
            table[name] |= {"bleu_by_seed": bleu, "bleu": mean_interval(bleu)}
            table[name]["loss_over_seeds"] = mean_interval([each["result"]["loss"] for each in scored])
    return table


def draw(summary: dict[str, Any], path: Path) -> None:
    """The validation loss along both sweeps, with the baselines as lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"steps_per_round": "optimizer steps a round (10 blocks)", "blocks_per_round": "blocks a round (8 steps)"}
    for axis, panel in zip(titles, panels, strict=True):
        names = sweep(summary, axis)
        panel.set_xlabel(titles[axis])
        panel.grid(alpha=0.3)
        if not names:
            continue
        panel.plot(
            [ARMS[name].place[axis] for name in names], [summary[name]["loss"] for name in names], "o-", label="XGBLoRA"
        )
        centre = CENTRE[0] if axis == "steps_per_round" else CENTRE[1]
        for name, mark in (("gradient-start", "^"), ("line-search", "s")):
            if name in summary:
                panel.plot([centre], [summary[name]["loss"]], mark, label=name)
        for name, color in (("lora-r1", "C3"), ("lora-r8", "C4"), ("relora", "C5"), ("cola", "C6")):
            if name in summary:
                panel.axhline(summary[name]["loss"], color=color, linewidth=1, linestyle="--", label=ARMS[name].title)
        panel.set_xscale("log", base=2)
        ticks = [ARMS[name].place[axis] for name in names]
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.legend(fontsize=7)
    panels[0].set_ylabel("validation loss (nats per token)")
    figure.suptitle(f"E2E NLG, SmolLM2-135M, {STEPS} steps of {BATCH} rows, each arm at its own best rate", fontsize=9)
    figure.savefig(path)


def report(cells: Cells, arguments: argparse.Namespace) -> None:
    """Write JSON and plot, print the table."""
    found = cells.all()
    summary = summary_of(found)
    state = {
        "machine": machine_facts(threads=1),
        "base": "SmolLM2-135M-Instruct, dequantised from a 4-bit (Q4_1/Q8_0) GGUF copy",
        "budget": {"steps": STEPS, "rows_per_step": BATCH, "rows": STEPS * BATCH},
        "summary": summary,
        "cells": found,
    }
    arguments.json.write_text(json.dumps(state, indent=1) + "\n")
    draw(summary, arguments.json.with_suffix(".png"))
    print("| arm | lr | validation loss | BLEU | trained at a time | file |")
    print("|---|---|---|---|---|---|")
    for name, arm in sorted(summary.items(), key=lambda item: item[1]["loss"]):
        bleu = f"{arm['bleu']['mean']:.1f} ({arm['bleu']['n']} seeds)" if "bleu" in arm else "-"
        size, trained = arm["file_bytes"] / 1e6, arm["trainable_parameters"]
        print(f"| {name}: {arm['title']} | {arm['lr']:g} | {arm['loss']:.4f} | {bleu} | {trained:,} | {size:.2f} MB |")


def main() -> None:
    """Run cells, one cell, or the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["run", "report"], default="run")
    parser.add_argument("--arms", help="comma-separated; default all, and only then are the finals scored")
    parser.add_argument("--stage", choices=["tune", "final"], default="final", help="tune stops before the finals")
    parser.add_argument("--precision", choices=["bf16", "float32"], default="float32")
    parser.add_argument("--quick", action="store_true", help="a few steps of a few arms; results go to build/")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/bench_boosting.json")
    parser.add_argument("--cells", type=Path, help="folder of finished cells; default: build/bench_boosting")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(run_cell(json.loads(arguments.cell))))
        return
    name = "bench_boosting_quick" if arguments.quick else "bench_boosting"
    folder = ROOT / "build" if arguments.quick else RESULTS
    arguments.cells = arguments.cells or ROOT / "build" / name
    arguments.json = arguments.json or folder / f"{name}.json"
    known = QUICK_ARMS if arguments.quick else tuple(ARMS)
    arguments.arms = arguments.arms.split(",") if arguments.arms else list(known)
    if unknown := set(arguments.arms) - set(ARMS):
        sys.exit(f"no such arm: {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    cells = Cells(arguments.cells, __file__)
    if arguments.action == "run":
        run(cells, arguments)
    report(cells, arguments)


if __name__ == "__main__":
    main()
