"""What a run with several tasks records and leaves: an adapter folder for each task, and each one's own figures.

adapter/tasks.json     the tasks, with the hash of each one's file
adapter/<task>/        the adapter of a task, as a run of its own leaves it
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from leantune import adapters
from leantune.core import atomic
from leantune.data import Encoded
from leantune.data.packing import padding_share
from leantune.models import BaseModel
from leantune.train.card import card
from leantune.train.config import RunConfig
from leantune.train.folder import ADAPTER, TASKS, WEIGHTS
from leantune.train.record import file_hash, loss_facts
from leantune.train.summary import data_facts
from leantune.train.task_data import Task
from leantune.train.task_head import as_task
from leantune.train.task_sampler import draws

if TYPE_CHECKING:
    from leantune.train.setup import Prepared
    from leantune.train.task_trainer import TaskTrainer


def before(prepared: Prepared) -> dict[str, Any]:
    """What is known of the tasks before the first step, for the record of the run.

    Args:
        prepared: the run.

    Returns:
        ``tasks`` (of each one kind, rows, settings, share of the rows drawn, parameters), ``data`` and ``eval_data`` of
        all of them together, ``task_parameters``, their number against as many separate LoRAs, and ``batching``.
    """
    tasks: list[Task] = prepared.tasks
    trainer = cast("TaskTrainer", prepared.trainer)
    shares = trainer.shares()
    drawn = draws([len(task.train) for task in tasks], shares)
    facts: dict[str, Any] = {}
    for task, share, rows in zip(tasks, shares, drawn, strict=True):
        config, evaluation = task.config, None
        if task.evaluation is not None:
            path = config.eval_data if config.eval_data is not None else config.data
            evaluation = data_facts(path, task.evaluation, "validation" if config.eval_data is not None else "train")
            evaluation |= {"eval_share": config.eval_share} if config.eval_data is None else {}
        facts[task.name] = {
            "kind": task.kind,
            "data": {**data_facts(config.data, task.train), "source": task.source},
            "eval_data": evaluation,
            **{name: getattr(config, name) for name in ("schedule", "warmup_ratio", "clip")},
            "lr": config.learning_rate,
            "share": share,
            "rows_an_epoch": rows,
            "trainable_parameters": sum(each.numel() for each in trainer.owned[task.name].values()),
        }
    count: Any = prepared.model.base_model.parameter_count()
    parameters = {name: getattr(count, name) for name in ("shared", "factor", "tasks", "total", "separate")}
    return {
        "tasks": facts,
        "data": _together(facts, "data", prepared.examples.source),
        "eval_data": _together(facts, "eval_data", {}) if prepared.examples.evaluation is not None else None,
        "task_parameters": {**parameters, "text": str(count)},
        "batching": _batching(prepared),
    }


def _batching(prepared: Prepared) -> dict[str, Any]:
    """How the rows are put together, with the padding of the first epoch as the sampler orders it."""
    trainer = cast("TaskTrainer", prepared.trainer)
    order, size = list(trainer._get_train_sampler()), trainer.args.train_batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    share = padding_share(cast(Encoded, prepared.examples.train).lengths, batches)
    return {"way": "tasks", "padding_share": {"tasks": share}, "rows_counted": len(order)}


def _together(tasks: dict[str, Any], part: str, source: dict[str, Any]) -> dict[str, Any]:
    """The facts of all tasks' rows as those of one data set."""
    parts = {name: task[part] for name, task in tasks.items() if task[part] is not None}
    digest = hashlib.sha256("\n".join(f"{name} {each['hash']}" for name, each in parts.items()).encode())
    sums = ("rows", "total_tokens", "loss_tokens", "truncated", "tokens_cut")
    notes = [f"{name}: {each['truncation']}" for name, each in parts.items() if each["truncation"]]
    return {
        "path": " + ".join(parts),
        "hash": f"sha256:{digest.hexdigest()}",
        **{name: sum(each[name] for each in parts.values()) for name in sums},
        "truncation": "; ".join(notes) or None,
        "label_names": None,
        "source": source,
    }


def after(summary: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
    """The tasks of a record, with what training added: steps, losses and the newest evaluation of each.

    Args:
        summary: the record, with ``tasks`` as :func:`before` gives them.
        history: everything that was logged.
    """
    evaluations = [line for line in history if "eval_loss" in line]
    newest = evaluations[-1] if evaluations else {}
    found = {}
    for name, task in summary["tasks"].items():
        lines = [{"loss": line[f"loss/{name}"]} for line in history if f"loss/{name}" in line]
        ending = f"/{name}"
        scores = {
            key.removeprefix("eval_").removesuffix(ending): value
            for key, value in newest.items()
            if key.startswith("eval_") and key.endswith(ending)
        }
        found[name] = {**task, "steps": len(lines), **loss_facts(lines), "evaluation": scores or None}
    return found


def summary_of(summary: dict[str, Any], name: str) -> dict[str, Any]:
    """The record of a run as that of a run of one of its tasks alone.

    Args:
        summary: of the run.
        name: the task.
    """
    task = (summary.get("tasks") or {}).get(name) or {}
    config = dict(summary.get("config") or {})
    own = {"data": (task.get("data") or {}).get("path"), "eval_data": (task.get("eval_data") or {}).get("path")}
    settings = ("lr", "schedule", "warmup_ratio", "clip")
    config |= {**own, **{key: task[key] for key in settings if key in task}, "task": task.get("kind"), "tasks": {}}
    return {**summary, **task, "config": config}


def save_tasks(config: RunConfig, base: BaseModel, model: Any, tasks: list[Task], summary: dict[str, Any]) -> Path:
    """Write the adapters of all tasks in one step; older ones are there until then.

    Args:
        config: of the run.
        base: its base.
        model: with an adapter for each task.
        tasks: the tasks.
        summary: the record of the run.

    Returns:
        The folder that holds them.
    """
    target = config.out / ADAPTER
    listed = {}
    with atomic.new_folder(target) as temporary:
        for task in tasks:
            with as_task(model, task):
                folder = adapters.save(
                    model,
                    temporary / task.name,
                    adapter_name=task.name,
                    base=replace(base, content_hash=task.content_hash),
                    tokenizer=base.encoder,
                    card=card(summary_of(summary, task.name)),
                )
            listed[task.name] = {"kind": task.kind, "sha256": file_hash(folder / WEIGHTS[ADAPTER])}
        atomic.write_json(temporary / TASKS, {"method": config.method, "tasks": listed})
    return target
