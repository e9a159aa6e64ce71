"""What LoRA-SB's start costs: memory against depth, time against an epoch, and what a sketch of the gradients changes.

    python benchmarks/bench_start.py [--part memory,epoch,sketch,cost] [--quick] [--json FILE]

memory  Peak resident bytes of the start at several depths, each in a fresh process, minus those of the same forward and
        backward without any weight's gradient. Gradients are held for as many layers as fit into a budget, so the
        difference is flat; beside it stands what all gradients together would take.
epoch   CPU seconds of the start, over a thousandth of the rows as a run draws them, as a share of a training epoch
        (its steps timed, then counted).
sketch  The same start by a sketch of each gradient: CPU seconds, passes over the rows, and how far the factors span
        the exact ones' subspaces (1: the same; about r / n by chance), of the step and over all modules.
cost    Multiply-accumulates for each token of LoRA and LoRA-SB (appendix D.4 of the paper), by formula.

One thread. Cells that are done are kept, so a stopped benchmark goes on. Memory is right on a busy machine; times want
an idle one. ``--quick`` takes a tiny model everywhere, in seconds; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

from cell import Cells
from machine import machine_facts, status_bytes

ROOT = Path(__file__).resolve().parent.parent
DEPTHS = (4, 8, 16, 32)
BUDGET = 16 * 2**20
RANK = 32
WIDTHS = (64, 128, 256)
ROWS = (800, 50_000)
BATCH, LENGTH = 8, 128


def _llama(layers: int, width: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=width,
            intermediate_size=8 * width // 3 // 8 * 8,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            use_cache=False,
        )
    )


def _adapted(base: Any, **options: Any) -> Any:
    from peft import get_peft_model

    from leantune import LoraXSConfig

    return get_peft_model(base, LoraXSConfig(r=RANK, init_weights="update_svd", **options))


def _batches(rows: int, batch: int, vocabulary: int, length: int = LENGTH) -> list[dict[str, Any]]:
    import torch

    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "labels": part} for part in ids.split(batch)]


def memory_cell(kind: str, layers: int, width: int) -> dict[str, Any]:
    """Peak bytes above the model with its adapter, of the start or of the same backward alone."""
    import torch

    import leantune

    model = _adapted(_llama(layers, width))
    batches = _batches(2, 2, 1000, 64)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(module.weight.numel() for module in linear if module.out_features != 1000)
    # Every page of weights and factors is there before anything is measured.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.mul_(1)
    gc.collect()
    base_bytes = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    told: dict[str, Any] = {}
    if kind == "start":
        found = leantune.initialize(model, batches, step_size=1e-3, gradient_bytes=BUDGET)
        told = {"passes": found["passes"]}
    else:
        embed = model.get_input_embeddings()
        with model.disable_adapter():
            for batch in batches:
                inputs = embed(batch["input_ids"]).detach().requires_grad_()
                loss = model(inputs_embeds=inputs, labels=batch["labels"]).loss
                torch.autograd.grad(loss, inputs)
    return {"peak_bytes": status_bytes("VmHWM") - base_bytes, "all_gradients_bytes": 4 * weights, **told}


def _base(quick: bool) -> tuple[Any, int]:
    if quick:
        return _llama(2, 64), 1000
    from leantune.models import load_base

    return load_base("smollm2-135m").model, 49_000


def epoch_cell(rows: int, quick: bool) -> dict[str, Any]:
    """CPU seconds of the start and of a training step; the epoch is so many steps."""
    import torch

    import leantune
    from leantune.methods import get
    from leantune.train.calibration import draw_rows

    base, vocabulary = _base(quick)
    drawn = len(draw_rows([{}] * rows, get("lora-sb").calibration_share, 0))
    model = _adapted(base)
    began = time.process_time()
    told = leantune.initialize(model, _batches(drawn, BATCH, vocabulary), step_size=1e-3)
    start_s = time.process_time() - began
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    steps = []
    for batch in _batches(6 * BATCH, BATCH, vocabulary):
        began = time.process_time()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.process_time() - began)
    step_s = statistics.median(steps[1:])
    epoch_s = step_s * rows / BATCH
    counts = {"rows": rows, "rows_drawn": drawn, "passes": told["passes"]}
    return {**counts, "start_s": start_s, "step_s": step_s, "epoch_s": epoch_s, "share_of_epoch": start_s / epoch_s}


def sketch_cell(width: int, quick: bool) -> dict[str, Any]:
    """The exact start and a sketched one of the same rows, and the overlap of what their factors span."""
    import leantune
    from leantune.core.linalg import subspace_overlap

    base, vocabulary = _base(quick)
    batches = _batches(32, BATCH, vocabulary)
    result: dict[str, Any] = {"width": width}
    spans: dict[str, list[Any]] = {}
    for name, option in (("exact", None), ("sketch", width)):
        model = _adapted(base, sketch=option)
        began = time.process_time()
        told = leantune.initialize(model, batches, step_size=1e-3)
        result |= {f"{name}_s": time.process_time() - began, f"{name}_passes": told["passes"]}
        result |= {key: told[key] for key in ("overlap", "gradient_overlap", "overlap_module") if key in told}
        cores = [module for module in model.modules() if type(module).__name__ == "CoreFactors"]
        spans[name] = [basis for core in cores for basis in (core.B, core.A.t())]
        base = model.unload()
    overlaps = [subspace_overlap(*pair) for pair in zip(spans["exact"], spans["sketch"], strict=True)]
    mean = statistics.fmean(overlaps)
    return {**result, "mean_overlap": mean, "least_overlap": min(overlaps), "subspaces": len(overlaps)}


def cost_rows() -> list[dict[str, Any]]:
    """Multiply-accumulates of one token, forward, of a whole 4096 x 4096 layer and of SmolLM2-135M's linear layers."""
    from leantune.methods import _cost

    block = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    rows = []
    for name, shapes in (("4096 x 4096", [(4096, 4096)]), ("SmolLM2-135M", block * 30)):
        frozen = _cost.frozen(shapes)
        for method, of, ranks in (("lora", _cost.lora, (8, 32)), ("lora-sb", _cost.lora_xs, (16, 32, 64, 96))):
            for rank in ranks:
                share = of(shapes, rank)
                added = share.forward / frozen.forward
                step = (share.forward + share.backward) / (frozen.forward + frozen.backward)
                rows.append(
                    {"layers": name, "method": method, "rank": rank, "forward_macs": (frozen + share).forward}
                    | {"forward_flops": (frozen + share).forward_flops, "step_flops": (frozen + share).step_flops}
                    | {"added_forward": added, "added_step": step}
                )
    return rows


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    import torch

    torch.set_num_threads(1)
    if cell["part"] == "memory":
        return memory_cell(cell["kind"], cell["layers"], 64 if cell["quick"] else 512)
    if cell["part"] == "epoch":
        return epoch_cell(cell["rows"], cell["quick"])
    return sketch_cell(cell["width"], cell["quick"])


def measure(parts: list[str], cells: Cells, quick: bool) -> dict[str, Any]:
    """The results of the parts asked for."""
    found: dict[str, Any] = {}
    if "memory" in parts:
        found["memory"] = []
        for layers in DEPTHS:
            cell = {"part": "memory", "layers": layers, "quick": quick}
            start, alone = (
                [cells.result({**cell, "kind": kind, "repeat": repeat}) for repeat in range(1 if quick else 3)]
                for kind in ("start", "backward")
            )
            peaks = [statistics.median(each["peak_bytes"] for each in results) for results in (start, alone)]
            row = {
                "layers": layers,
                "start_bytes": peaks[0],
                "backward_bytes": peaks[1],
                "extra_bytes": peaks[0] - peaks[1],
            }
            facts = {name: start[0][name] for name in ("all_gradients_bytes", "passes")}
            found["memory"].append({**row, "budget_bytes": BUDGET, **facts})
    if "epoch" in parts:
        found["epoch"] = [cells.result({"part": "epoch", "rows": rows, "quick": quick}) for rows in ROWS]
    if "sketch" in parts:
        found["sketch"] = [cells.result({"part": "sketch", "width": width, "quick": quick}) for width in WIDTHS]
    if "cost" in parts:
        found["cost"] = cost_rows()
    return found


def show(found: dict[str, Any]) -> None:
    """The figures as lines."""
    for row in found.get("memory", ()):
        megabytes = {name: row[f"{name}_bytes"] / 2**20 for name in ("start", "backward", "extra", "all_gradients")}
        print(
            f"{row['layers']:3} layers: start {megabytes['start']:6.0f} MiB, "
            f"backward alone {megabytes['backward']:6.0f}, "
            f"difference {megabytes['extra']:5.0f}; all gradients {megabytes['all_gradients']:5.0f}; "
            f"{row['passes']} passes"
        )
    for row in found.get("epoch", ()):
        print(
            f"{row['rows']:6,} rows: start {row['start_s']:6.1f} s over {row['rows_drawn']} rows, "
            f"epoch {row['epoch_s']:8,.0f} s, share {row['share_of_epoch']:.2%}"
        )
    for row in found.get("sketch", ()):
        print(
            f"sketch {row['width']:4}: {row['sketch_s']:6.1f} s in {row['sketch_passes']} pass(es), exact "
            f"{row['exact_s']:6.1f} s in {row['exact_passes']}; overlap {row['mean_overlap']:.3f}, "
            f"least {row['least_overlap']:.3f} of {row['subspaces']}"
        )
    for row in found.get("cost", ()):
        print(
            f"{row['layers']:14} {row['method']:8} r {row['rank']:3}: {row['forward_macs'] / 1e6:8.2f} M "
            f"multiply-accumulates a token, +{row['added_forward']:.2%} forward, +{row['added_step']:.2%} a step"
        )


def main() -> None:
    """Run the benchmark, or one cell of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="memory,epoch,sketch,cost", help="which parts, with commas between")
    parser.add_argument("--quick", action="store_true", help="a tiny model everywhere, in seconds")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "bench_start.json")
    parser.add_argument("--cells", type=Path, default=ROOT / "build" / "bench_start", help="where done cells are kept")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(run_cell(json.loads(arguments.cell))))
        return
    found = measure(arguments.part.split(","), Cells(arguments.cells, __file__), arguments.quick)
    show(found)
    if arguments.quick:
        return
    state: dict[str, Any] = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {}
    facts = machine_facts(threads=1)
    about = {
        "model": "SmolLM2-135M, float32; memory: Llama of width 512",
        "rank": RANK,
        "batch": BATCH,
        "length": LENGTH,
    }
    # Parts measured on different days each say when and where.
    parts = {name: {"machine": facts, "rows": rows} for name, rows in found.items()}
    arguments.json.write_text(json.dumps({**state, **about, **parts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
