"""What a run adds to the model card of its adapter: the data, the settings, the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leantune.train.progress import clock


def card(summary: dict[str, Any]) -> dict[str, Any]:
    """The card's parts, as :func:`leantune.adapters.card.render` takes them.

    Args:
        summary: the record of the run (run.json).
    """
    config, data, base = summary["config"], _counts(summary), summary["base"]
    return {
        "title": f"{base['name']} fine-tuned with {summary['method']['name']}",
        "description": (
            f"An adapter that trained {summary['trainable_parameters']:,} parameters on {data['rows']:,} rows of "
            f"`{Path(config['data']).name}`. Made with Leantune {summary['environment']['versions']['leantune']}."
        ),
        "sections": {"Training": _settings(summary), "Result": _result(summary)},
    }


def _counts(summary: dict[str, Any]) -> dict[str, Any]:
    """Rows and tokens of the training file; of one that was streamed those that were seen."""
    data: dict[str, Any] = summary["data"]
    if data["rows"] is not None:
        return data
    seen = {"rows": summary["rows_seen"], "total_tokens": summary["tokens_seen"]}
    seen |= {"loss_tokens": summary["loss_tokens_seen"], "truncated": summary["stream"]["truncated"]}
    return {**data, **seen}


def _settings(summary: dict[str, Any]) -> dict[str, Any]:
    config, data = summary["config"], _counts(summary)
    options = ", ".join(f"{name}={value}" for name, value in config["method_options"].items())
    unit = "packs" if config["packing"] else "rows"
    return {
        "method": summary["method"]["title"],
        "options": options or "defaults",
        "task": config["task"],
        "training rows": f"{data['rows']:,} ({data['loss_tokens']:,} of {data['total_tokens']:,} tokens carry loss)",
        "cut rows": f"{data['truncated']:,} at {config['max_length']} tokens",
        "data hash": data["hash"],
        "batch": f"{config['batch_size']} {unit} x {config['gradient_accumulation']}",
        "learning rate": f"{config['lr']:g}, {config['schedule']}, warm-up {config['warmup_ratio']:g} of the steps",
        "seed": config["seed"],
        "trained parameters": f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,}",
    }


def _result(summary: dict[str, Any]) -> dict[str, Any]:
    steps = f"{summary['steps']:,}"
    if summary["status"] == "interrupted":
        steps += f" of {summary['planned_steps']:,} (interrupted)"
    rows: dict[str, Any] = {"steps": steps, "training time": clock(summary["train_time_s"])}
    if summary["peak_memory_bytes"] is not None:
        rows["peak memory"] = f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"
    if summary["first_loss"] is not None:
        last = f"{summary['last_loss']:.4f} (mean of the last {summary['last_loss_over_steps']} steps)"
        rows |= {"loss at the first step": f"{summary['first_loss']:.4f}", "loss at the end": last}
    evaluation = summary["evaluation"] or {}
    rows |= {f"evaluation: {name.replace('_', ' ')}": value for name, value in evaluation.items()}
    return rows
