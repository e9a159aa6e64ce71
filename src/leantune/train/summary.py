"""The record of a run: what is known before its first step, and what its end adds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from leantune.data import Encoded, RowStream, data_hash
from leantune.methods import TrainingPlan
from leantune.models import BaseModel
from leantune.train import distributed
from leantune.train.batching import batching, stream_facts
from leantune.train.config import RunConfig
from leantune.train.meter import peak_memory
from leantune.train.record import environment, loss_facts, parameter_counts
from leantune.train.setup import Examples
from leantune.train.trainer import LeanTrainer

_TIMING = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def before(config: RunConfig, base: BaseModel, model: Any, examples: Examples, plan: TrainingPlan) -> dict[str, Any]:
    """Model, method, data, settings and machine, before the first step."""
    method = config.chosen_method
    adapters = {name: each.to_dict() for name, each in getattr(model, "peft_config", {}).items()}
    counts = parameter_counts(model)
    at_once = counts["trainable_parameters"] if plan.trained_at_once is None else plan.trained_at_once
    evaluation = None
    if config.eval_data is not None and examples.evaluation is not None:
        evaluation = data_facts(config.eval_data, examples.evaluation, "validation")
    elif config.eval_share is not None and examples.evaluation is not None:
        evaluation = {**data_facts(config.data, examples.evaluation), "eval_share": config.eval_share}
    return {
        "status": "running",
        "base": {
            "name": base.name,
            "source": base.source,
            "hub_id": base.hub_id,
            "revision": base.revision,
            "content_hash": base.content_hash,
            "note": base.note,
            "quantization": None if base.quantisation is None else base.quantisation.to_dict(),
        },
        # After the method was applied: its own account of what it did stands in its config.
        "method": {"name": method.name, "title": method.title, "config": next(iter(adapters.values()), {})},
        "data": {**data_facts(config.data, examples.train), "source": examples.source},
        "eval_data": evaluation,
        "batching": batching(config, examples.train, examples.packs),
        **counts,
        "trained_at_once": at_once,
        "config": config.model_dump(mode="json"),
        "processes": distributed.processes(),
        "environment": environment(),
    }


def after(trainer: LeanTrainer) -> dict[str, Any]:
    """Steps, tokens, times, memory, losses."""
    meter, state = trainer.meter, trainer.state
    device = trainer.args.device
    return {
        "steps": state.global_step,
        "planned_steps": state.max_steps,
        # Of a stream the Trainer knows no epoch; its passes stand below.
        "epochs": None if isinstance(trainer.train_dataset, RowStream) else state.epoch,
        "rows_seen": meter.rows,
        "tokens_seen": meter.tokens,
        "loss_tokens_seen": meter.loss_tokens,
        "padding_share": meter.padding,
        "stream": stream_facts(trainer.train_dataset),
        "train_time_s": meter.seconds,
        "tokens_per_s": meter.tokens / meter.seconds,
        "device": str(device),
        "peak_memory_bytes": peak_memory(device),
        "peak_memory_of": "GPU allocator" if device.type == "cuda" else "resident set of the process",
        **loss_facts(state.log_history),
        "evaluation": _last_evaluation(state.log_history),
        "results": _results(trainer.model),
    }


def _results(model: Any) -> dict[str, Any]:
    """What the method wrote into its config while it trained: the fields marked so, as far as they are set."""
    for config in getattr(model, "peft_config", {}).values():
        fields = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_result")]
        return {name: getattr(config, name) for name in fields if getattr(config, name) is not None}
    return {}


def _last_evaluation(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    lines = [line for line in history if "eval_loss" in line]
    if not lines:
        return None
    scores = {name: value for name, value in lines[-1].items() if name.startswith("eval_") and name not in _TIMING}
    return {name.removeprefix("eval_"): value for name, value in scores.items()}


def data_facts(path: Path, encoded: Encoded | RowStream, split: str = "train") -> dict[str, Any]:
    """Where rows come from, their hash, and their counts; of a stream these are not known.

    Args:
        path: the file.
        encoded: its rows as tokens.
        split: of a folder, which of its files.
    """
    if isinstance(encoded, RowStream):
        unknown = ("rows", "total_tokens", "loss_tokens", "truncated", "tokens_cut", "truncation", "label_names")
        return {"path": path.as_posix(), "hash": data_hash(path, split=split), **dict.fromkeys(unknown)}
    return {
        "path": path.as_posix(),
        "hash": data_hash(path, split=split),
        "rows": len(encoded),
        "total_tokens": encoded.total_tokens,
        "loss_tokens": encoded.loss_tokens,
        "truncated": encoded.truncated,
        "tokens_cut": encoded.tokens_cut,
        "truncation": encoded.truncation_note(),
        "label_names": encoded.label_names,
    }


def title(summary: dict[str, Any]) -> str:
    """One line that names a run: method, base, data."""
    return f"{summary['method']['name']} on {summary['base']['name']}, {Path(summary['data']['path']).name}"
