"""The family side by side: score, forgetting, parameters, bytes, time and memory of every method on the same rows.

    python benchmarks/bench_methods.py run [--bench e2e] [--arms s2ft,lora] [--stage tune]   # resumable, shareable
    python benchmarks/bench_methods.py report                                                # JSON, table and plot

Three benches, 800 training rows each. ``e2e``: the embedded SmolLM2-135M-Instruct (dequantised from a 4-bit copy) on
E2E NLG, 100 steps of 8 rows, sacrebleu BLEU on the 200 distinct test inputs with all references (greedy, 48 new tokens,
whatever the model writes is scored); forgetting is the change of the loss on WikiText-2 (``--text``), if it is there.
``mrpc`` and ``cola``: the encoder MiniLM-L6 on GLUE (``--glue``), 100 and 400 steps of 16 rows (after 100 every method
answers CoLA by the majority), a head that trains whole beside every method; accuracy and MCC on the validation split.

1. Tune: every arm runs half the steps at five log-spaced rates or more, seed 0; the lowest loss on held-out rows wins,
   and a winner at the edge of its grid widens the grid until it is not.
2. Measure: every arm at its rate, with paired seeds.

Matrix products of training run in bfloat16 (autocast) unless ``--precision float32``; what trains is float32, and
scores are computed in float32.
Each cell is a fresh process on one thread and stays in a file: start as many of these at once as there are cores.
Times and memory are of ``bench_family_step.py``, which interleaves the steps of all methods on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cell import Cells, mean_interval, tune
from machine import machine_facts

ROOT = Path(__file__).resolve().parent.parent
E2E = ROOT / "examples" / "data" / "e2e_nlg"
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ROOT.parent / "shared" / "data"
ROWS = 800
SEEDS = 5
BASE_NOTE = {
    "e2e": "SmolLM2-135M-Instruct, dequantised from a 4-bit (Q4_1/Q8_0) GGUF copy",
    "mrpc": "all-MiniLM-L6-v2, float32",
    "cola": "all-MiniLM-L6-v2, float32",
}


@dataclass(frozen=True)
class Arm:
    """A method with its options, and the learning rates to try first.

    Attributes:
        method: as `leantune methods` lists it.
        rates: on e2e; five or more, log-spaced.
        options: on e2e.
        encoder_rates: on the encoder; None takes ``rates``.
        encoder_options: on the encoder; None takes ``options``.
        seeds: paired seeds to measure with.
        benches: where it runs.
    """

    method: str
    rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    encoder_rates: tuple[float, ...] | None = None
    encoder_options: dict[str, Any] | None = None
    seeds: int = SEEDS
    benches: tuple[str, ...] = ("e2e", "mrpc", "cola")


def around(middle: float) -> tuple[float, ...]:
    """Five rates a factor of two apart."""
    return tuple(middle * 2.0**power for power in (-2, -1, 0, 1, 2))


ALL_LINEAR = {"target_modules": "all-linear"}
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, **ALL_LINEAR}
SLICES = {"target_modules": ["o_proj", "down_proj"], "heads": 1, "channels": 77}
# On the encoder as many as LoRA of rank 8 on all linear layers trains (338 k with the head).
ENCODER_SLICES = {"match_lora_rank": 21, "target_modules": ["attention.output.dense", "output.dense"]}
ARMS: dict[str, Arm] = {
    # Equal trained parameters on e2e: 2,436,480 (S2FT) against 2,442,240 (LoRA).
    "s2ft": Arm("s2ft", around(8e-3), SLICES, around(4e-3), ENCODER_SLICES),
    "lora": Arm("lora", around(2e-3), LORA, around(2e-3)),
    "rslora": Arm("rslora", around(1e-3), LORA, around(1e-3)),
    "pissa": Arm("pissa", around(1e-3), LORA, around(1e-3)),
    "full": Arm("full", around(1e-4), {}, around(1e-4)),
    "lora-xs": Arm("lora-xs", around(4e-3), {"r": 64, **ALL_LINEAR}),
    "lora-sb": Arm("lora-sb", around(4e-3), {"r": 64, **ALL_LINEAR}),
    "xgblora": Arm("xgblora", around(8e-3), {"r": 1, "steps_per_round": 10, **ALL_LINEAR}),
    # LoRA-SB against LoRA-XS at other ranks.
    "lora-xs-r16": Arm("lora-xs", around(8e-3), {"r": 16, **ALL_LINEAR}, seeds=3, benches=("e2e",)),
    "lora-sb-r16": Arm("lora-sb", around(8e-3), {"r": 16, **ALL_LINEAR}, seeds=3, benches=("e2e",)),
    "lora-xs-r32": Arm("lora-xs", around(4e-3), {"r": 32, **ALL_LINEAR}, seeds=3, benches=("e2e",)),
    "lora-sb-r32": Arm("lora-sb", around(4e-3), {"r": 32, **ALL_LINEAR}, seeds=3, benches=("e2e",)),
    # One seed each: no interval, and no claim.
    **{
        name: Arm(name, around(middle), options, seeds=1, benches=("e2e",))
        for name, middle, options in (
            ("dora", 2e-3, LORA),
            ("lora-ga", 1e-3, LORA),
            ("vera", 3e-2, {"r": 256, **ALL_LINEAR}),
            ("spft", 4e-3, {"match_lora_rank": 8, **ALL_LINEAR}),
            ("loreft", 4e-3, {"r": 16}),
            ("series-adapter", 1e-3, {"bottleneck_size": 32}),
            ("parallel-adapter", 1e-3, {"bottleneck_size": 16}),
            ("prefix", 1e-2, {"num_virtual_tokens": 20}),
            ("lisa", 1e-4, {"active_blocks": 8, "period": 10}),
            ("galore", 4e-4, {"rank": 64, "update_proj_gap": 50}),
            ("multi-lora", 4e-3, {"r": 8, **ALL_LINEAR}),
            ("relora", 2e-3, {"r": 8, "alpha": 16, "steps_per_round": 50, **ALL_LINEAR}),
            ("cola", 2e-3, {"r": 8, "alpha": 16, "steps_per_round": 33, **ALL_LINEAR}),
        )
    },
}


@dataclass(frozen=True)
class Bench:
    """One task: its run settings and what counts."""

    model: str
    settings: dict[str, Any]
    steps: int
    score: str


ENCODER = {"task": "classification", "batch_size": 16, "group_by_length": True}
BENCHES = {
    "e2e": Bench("smollm2-135m", {"batch_size": 8, "max_length": 128, "group_by_length": True}, 100, "bleu"),
    "mrpc": Bench("minilm-l6", ENCODER | {"max_length": 128}, 100, "accuracy"),
    "cola": Bench("minilm-l6", ENCODER | {"max_length": 64}, 400, "mcc"),
}


def glue_rows(name: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """800 training rows and 400 to tune on, drawn from the train split by a fixed seed; and the validation split."""
    import numpy as np
    import pyarrow.parquet as parquet

    def read(split: str) -> list[dict[str, Any]]:
        rows = parquet.read_table(folder / f"glue_{name}" / f"{split}.parquet").to_pylist()
        texts = ("sentence", "sentence1", "sentence2")
        return [{key: row[key] for key in (*texts, "label") if key in row} for row in rows]

    train = read("train")
    order = np.random.default_rng(0).permutation(len(train)).tolist()
    drawn = [train[number] for number in order[: ROWS + 400]]
    return {"train": drawn[:ROWS], "tune": drawn[ROWS:], "test": read("validation")}


def write_rows(folder: Path, cell: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Path]:
    """The files of a bench: ``train``, ``tune``, ``test``."""
    if cell["bench"] == "e2e":
        return {"train": E2E / "train.jsonl", "tune": E2E / "validation.jsonl", "test": E2E / "test.jsonl"}
    files = {}
    for split, rows in glue_rows(cell["bench"], arguments.glue).items():
        files[split] = folder / f"{split}.jsonl"
        files[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def plain_text_loss(model: Any, tokenizer: Any, file: Path) -> float | None:
    """Mean nats per token on 32 windows of 256 tokens of running text; None where the file is not there."""
    import pyarrow.parquet as parquet
    import torch

    if not file.is_file():
        return None
    lines = parquet.read_table(file).column("text").to_pylist()
    ids = tokenizer("".join(lines)[:200_000]).input_ids[: 32 * 256]
    windows = torch.tensor(ids).view(32, 256)
    with torch.no_grad():
        losses = [model(input_ids=some, labels=some).loss.item() for some in windows.split(8)]
    return sum(losses) / len(losses)


def run_cell(cell: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and score one cell in this process."""
    from leantune.core.errors import RunError
    from leantune.data import read_rows
    from leantune.evaluate import evaluate
    from leantune.train import RunConfig, fit

    arm, bench = ARMS[cell["arm"]], BENCHES[cell["bench"]]
    encoder = cell["bench"] != "e2e"
    options = arm.encoder_options if encoder and arm.encoder_options is not None else arm.options
    with tempfile.TemporaryDirectory() as scratch:
        files = write_rows(Path(scratch), cell, arguments)
        config = RunConfig(
            model=bench.model,
            data=files["train"],
            limit=ROWS,
            method=arm.method,
            method_options=options,
            out=Path(scratch) / "run",
            max_steps=cell["steps"],
            lr=cell["lr"],
            seed=cell["seed"],
            save_steps=0,
            precision=cell["precision"],
            **bench.settings,
        )
        try:
            run = fit(config, progress=False)
        except RunError as error:
            # Training that diverges is an answer too, to the search for a rate.
            if cell["stage"] != "tune" or "finite" not in str(error):
                raise
            return {"loss": math.inf, "diverged": str(error)}
        weights = [path for path in run.folder.rglob("*.safetensors") if "checkpoint" not in str(path)]
        facts = {name: run.summary[name] for name in ("trainable_parameters", "train_time_s", "peak_memory_bytes")}
        facts |= {"steps": run.summary["steps"], "file_bytes": sum(path.stat().st_size for path in weights)}
        rows = read_rows(files["tune" if cell["stage"] == "tune" else "test"])
        if cell["bench"] == "e2e":
            # One answer of each input: all inputs count, at an eighth of the time.
            held_out = list({row.prompt: row for row in reversed(read_rows(files["tune"]))}.values())
            facts["loss"] = value_of(evaluate(run.model, run.tokenizer, held_out, metrics=["loss"], resamples=10))
            facts["text_loss"] = plain_text_loss(run.model, run.tokenizer, arguments.text)
            if cell["stage"] == "tune":
                return facts
        metrics = ["bleu"] if cell["bench"] == "e2e" else ["cross_entropy", "accuracy", "f1", "mcc"]
        names = (run.summary.get("data") or {}).get("label_names")
        extra = {"task": "classification", "label_names": names} if encoder else {}
        scores = evaluate(run.model, run.tokenizer, rows, metrics=metrics, resamples=1000, **extra)
    facts["scores"] = scores.to_dict()["metrics"]
    if encoder:
        facts["loss"] = facts["scores"]["cross_entropy"]["value"]
    return facts


def value_of(scores: Any) -> float:
    """The loss among scores."""
    return float(scores.to_dict()["metrics"]["loss"]["value"])


def base_cell(arguments: argparse.Namespace) -> dict[str, Any]:
    """The untrained base on e2e: its BLEU and its loss on running text."""
    from leantune.data import read_rows
    from leantune.evaluate import evaluate
    from leantune.models import load_base

    base = load_base("smollm2-135m")
    text_loss = plain_text_loss(base.model, base.tokenizer, arguments.text)
    rows = read_rows(E2E / "test.jsonl")
    scores = evaluate(base.model, base.tokenizer, rows, metrics=["bleu"], resamples=1000)
    return {"text_loss": text_loss, "scores": scores.to_dict()["metrics"]}


def arm_cells(cells: Cells, name: str, bench_name: str, arguments: argparse.Namespace) -> None:
    """Tune one arm on one bench and, unless only that is wanted, measure it."""
    arm, bench = ARMS[name], BENCHES[bench_name]
    shared = {"bench": bench_name, "arm": name, "precision": arguments.precision}

    def loss_at(rate: float) -> float:
        cell = {"stage": "tune", **shared, "lr": rate, "seed": 0, "steps": bench.steps // 2}
        return float(cells.result(cell)["loss"])

    rates = arm.encoder_rates if bench_name != "e2e" and arm.encoder_rates is not None else arm.rates
    rate, _ = tune(loss_at, rates)
    if arguments.stage == "tune":
        return
    for seed in range(arm.seeds):
        cells.result({"stage": "measure", **shared, "lr": rate, "seed": seed, "steps": bench.steps})


def summary_of(found: list[dict[str, Any]], base: dict[str, Any] | None) -> dict[str, Any]:
    """Per bench and arm: rate, grid, scores over seeds, difference to LoRA seed by seed, forgetting, parameters."""
    table: dict[str, dict[str, Any]] = {}
    for bench_name, bench in BENCHES.items():
        arms: dict[str, Any] = {}
        for name in ARMS:
            mine = [each for each in found if each["cell"]["bench"] == bench_name and each["cell"]["arm"] == name]
            measured = sorted(
                (each for each in mine if each["cell"]["stage"] == "measure"), key=lambda each: each["cell"]["seed"]
            )
            if not measured:
                continue
            results = [each["result"] for each in measured]
            scores = [result["scores"][bench.score]["value"] for result in results]
            arms[name] = {
                "method": ARMS[name].method,
                "lr": measured[0]["cell"]["lr"],
                "loss_by_lr": {
                    f"{each['cell']['lr']:g}": each["result"]["loss"]
                    for each in sorted(mine, key=lambda each: each["cell"]["lr"])
                    if each["cell"]["stage"] == "tune"
                },
                "score": bench.score,
                "by_seed": {str(each["cell"]["seed"]): value for each, value in zip(measured, scores, strict=True)},
                **mean_interval(scores),
                "held_out_loss": mean_interval([result["loss"] for result in results]),
                "trainable_parameters": results[0]["trainable_parameters"],
                "file_bytes": results[0]["file_bytes"],
            }
            if base is not None and base["text_loss"] is not None and results[0].get("text_loss") is not None:
                changes = [result["text_loss"] - base["text_loss"] for result in results]
                arms[name]["forgetting_nats"] = mean_interval(changes)
        for arm in arms.values():
            if "lora" in arms:
                shared = sorted(set(arm["by_seed"]) & set(arms["lora"]["by_seed"]))
                differences = [arm["by_seed"][seed] - arms["lora"]["by_seed"][seed] for seed in shared]
                arm["minus_lora"] = mean_interval(differences)
        table[bench_name] = arms
    return table


def print_table(summary: dict[str, Any]) -> None:
    """The summary as Markdown."""
    for bench_name, arms in summary.items():
        if not arms:
            continue
        print(f"\n### {bench_name} ({BENCHES[bench_name].score}; {BASE_NOTE[bench_name]})\n")
        print("| arm | lr | seeds | score | minus LoRA | forgetting (nats) | trained | file |")
        print("|---|---|---|---|---|---|---|---|")
        for name, arm in sorted(arms.items(), key=lambda item: -item[1]["mean"]):
            forgetting = arm.get("forgetting_nats")
            print(
                f"| {name} | {arm['lr']:g} | {arm['n']} | {span(arm)} | {span(arm.get('minus_lora'))} | "
                f"{span(forgetting, 3)} | {arm['trainable_parameters']:,} | {arm['file_bytes'] / 1e6:.1f} MB |"
            )


def span(found: dict[str, Any] | None, digits: int = 1) -> str:
    """``mean [low, high]``."""
    if found is None:
        return "-"
    if found["interval_95"] is None:
        return f"{found['mean']:.{digits}f} (one seed)"
    low, high = found["interval_95"]
    return f"{found['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def draw(summary: dict[str, Any], path: Path) -> None:
    """The scores with their intervals, a panel a bench."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = {name: arms for name, arms in summary.items() if arms}
    figure, axes = plt.subplots(1, len(shown), figsize=(4.6 * len(shown), 4.2), squeeze=False, layout="constrained")
    for axis, (bench_name, arms) in zip(axes[0], shown.items(), strict=True):
        order = sorted(arms, key=lambda name: arms[name]["mean"])
        for height, name in enumerate(order):
            arm = arms[name]
            color = "tab:blue" if name != "lora" else "tab:orange"
            axis.plot(list(arm["by_seed"].values()), [height] * arm["n"], ".", color=color, alpha=0.4)
            if arm["interval_95"]:
                axis.plot(arm["interval_95"], [height, height], color=color, linewidth=2)
            axis.plot(arm["mean"], height, "o", color=color)
        axis.set_yticks(range(len(order)), order)
        axis.set_xlabel(f"{BENCHES[bench_name].score} (mean, 95% interval over seeds)")
        axis.set_title(bench_name)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)


def report(cells: Cells, arguments: argparse.Namespace) -> None:
    """Write JSON and plot, print the table."""
    found = [each for each in cells.all() if each["cell"]["stage"] != "base"]
    base = next((each["result"] for each in cells.all() if each["cell"]["stage"] == "base"), None)
    summary = summary_of(found, base)
    state = {
        "machine": machine_facts(threads=1),
        "bases": BASE_NOTE,
        "rows": ROWS,
        "base": base,
        "summary": summary,
        "cells": cells.all(),
    }
    arguments.json.write_text(json.dumps(state, indent=1) + "\n")
    draw(summary, arguments.json.with_suffix(".png"))
    print_table(summary)


def commit() -> str:
    """The commit that a cell runs at."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Run cells, one cell, or the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["run", "report"], default="report")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated; default all")
    parser.add_argument("--bench", default=",".join(BENCHES), help="comma-separated; default all")
    parser.add_argument("--stage", choices=["tune", "measure"], default="measure", help="tune stops before measuring")
    parser.add_argument("--precision", choices=["bf16", "float32"], default="bf16")
    parser.add_argument(
        "--text", type=Path, default=SHARED / "wikitext2" / "test.parquet", help="running text, parquet"
    )
    parser.add_argument("--glue", type=Path, default=SHARED, help="folder with glue_mrpc and glue_cola, parquet")
    parser.add_argument("--json", type=Path, default=RESULTS / "bench_methods.json")
    parser.add_argument("--cells", type=Path, default=ROOT / "build" / "bench_methods", help="folder of finished cells")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        cell = json.loads(arguments.cell)
        result = base_cell(arguments) if cell["stage"] == "base" else run_cell(cell, arguments)
        print(json.dumps(result | {"commit": commit()}))
        return
    cells = Cells(arguments.cells, __file__)
    if arguments.json.is_file():
        cells.restore(json.loads(arguments.json.read_text())["cells"])
    if arguments.action == "report":
        report(cells, arguments)
        return
    names = arguments.arms.split(",")
    unknown = set(names) - set(ARMS)
    if unknown:
        sys.exit(f"--arms: {', '.join(sorted(unknown))}; known: {', '.join(ARMS)}")
    for bench_name in arguments.bench.split(","):
        if bench_name == "e2e" and arguments.stage == "measure":
            cells.result({"stage": "base"})
        for name in names:
            if bench_name in ARMS[name].benches:
                arm_cells(cells, name, bench_name, arguments)


if __name__ == "__main__":
    main()
