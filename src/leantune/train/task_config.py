"""The tasks of a run that trains several: what each one is, how they are written down, and what cannot be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from leantune.core.errors import LeantuneError, describe, did_you_mean

if TYPE_CHECKING:
    from leantune.train.config import RunConfig

KINDS = ("causal-lm", "classification", "regression")
HEAD_KINDS = ("classification", "regression")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_LONGEST_NAME = 64
# What the folder of an adapter, or of the tasks of a run, holds beside them.
_TAKEN = {"default", "adapter", "tasks"}


def column_roles(value: Any) -> Any:
    """Columns as YAML or a flag gives them: ``prompt=question,completion=answer`` as a mapping.

    Raises:
        ValueError: the text is no such list.
    """
    if not isinstance(value, str):
        return value
    from leantune.data.column import parse_columns

    try:
        return parse_columns(value) or None
    except LeantuneError as error:
        raise ValueError(str(error)) from error


class TaskConfig(BaseModel):
    """One task of a run with several. Settings left out are the run's.

    Example:
        ``{"data": "stsb.parquet", "kind": "regression", "lr": 2e-3}``, or only the file: ``"stsb.parquet"``
    """

    model_config = ConfigDict(extra="forbid", validate_default=True)

    data: Path = Field(description="Training rows of the task, as data of a run")
    eval_data: Path | None = Field(None, description="Rows to measure the task on")
    kind: Literal["causal-lm", "classification", "regression"] | None = Field(
        None, description="What the task trains; null means as the run's task"
    )
    lr: float | None = Field(None, gt=0, description="Peak learning rate of the task; null means the run's")
    schedule: Literal["cosine", "linear", "constant"] | None = Field(
        None, description="Course of the task's learning rate over the steps it takes part in; null means the run's"
    )
    warmup_ratio: float | None = Field(
        None, ge=0, lt=1, description="Share of the task's steps in which its rate rises; null means the run's"
    )
    clip: float | None = Field(None, ge=0, description="Largest gradient norm of the task; null means the run's")
    limit: int | None = Field(None, ge=1, description="Use only the first rows of the task; null means the run's")
    format: str | None = Field(None, description="Format of the task's rows; null means the run's")
    columns: dict[str, str] | None = Field(None, description="Which column means what; null means the run's")

    @model_validator(mode="before")
    @classmethod
    def _file(cls, value: Any) -> Any:
        """A file alone is a task."""
        return {"data": value} if isinstance(value, (str, Path)) else value

    _roles = field_validator("columns", mode="before")(column_roles)


def view(config: RunConfig, name: str) -> RunConfig:
    """The configuration of one task as a run of its own would have it, with the run's method and base.

    Args:
        config: of the run.
        name: the task.
    """
    task = config.tasks[name]
    changes: dict[str, Any] = {"tasks": {}, "data": task.data, "eval_data": task.eval_data, "run_name": None}
    changes["eval_share"] = None if task.eval_data is not None else config.eval_share
    changes["task"] = task.kind or config.task
    for setting in ("lr", "schedule", "warmup_ratio", "clip", "limit", "format", "columns"):
        own = getattr(task, setting)
        changes[setting] = getattr(config, setting) if own is None else own
    return config.model_copy(update=changes)


def first_file(values: dict[str, Any]) -> dict[str, Any]:
    """Settings with tasks, with the first one's file as ``data``: a run always has rows by that name."""
    tasks = values.get("tasks")
    if values.get("data") is not None or not isinstance(tasks, dict) or not tasks:
        return values
    first = next(iter(tasks.values()))
    path = first.get("data") if isinstance(first, dict) else getattr(first, "data", first)
    return values if path is None else {**values, "data": path}


def without_first_file(values: dict[str, Any]) -> dict[str, Any]:
    """The settings without the ``data`` that :func:`first_file` put in: the tasks may be about to change."""
    bare = {name: value for name, value in values.items() if name != "data"}
    return bare if str(first_file(bare).get("data")) == str(values.get("data")) else dict(values)


def with_task(values: dict[str, Any], name: str, setting: str, value: Any) -> dict[str, Any]:
    """A copy of a run's settings with one setting of one task."""
    tasks = dict(values.get("tasks") or {})
    known = tasks.get(name)
    known = {"data": known} if isinstance(known, (str, Path)) else dict(known or {})
    return {**values, "tasks": {**tasks, name: {**known, setting: value}}}


def named_tasks(settings: Iterable[tuple[str, str]]) -> tuple[dict[str, str], list[str]]:
    """The tasks among ``(key, value)`` settings: ``task`` with a value ``name=file``.

    Returns:
        Name to file in the order given, and what is wrong with them.
    """
    found: dict[str, str] = {}
    problems = []
    for key, text in settings:
        if key != "task" or "=" not in text:
            continue
        name, _, path = (part.strip() for part in text.partition("="))
        if name in found:
            got = f"named twice ({found[name]} and {path})"
            problems.append(describe(f"task '{name}'", got, "a name of its own for each task", "rename one of them"))
        elif not path:
            problems.append(describe(f"task '{name}'", "no file", "--task name=file", "name its file"))
        else:
            found[name] = path
    return found, problems


def task_problems(config: RunConfig) -> list[str]:
    """What is wrong with the tasks of a run, and with tasks beside its other settings."""
    if not config.tasks:
        return _without_tasks(config)
    problems = [problem for name in config.tasks if (problem := name_problem(name))]
    lower = [name.lower() for name in config.tasks]
    for name in config.tasks:
        if lower.count(name.lower()) > 1:
            got = "told from another by upper and lower case alone, which folders are not everywhere"
            problems.append(describe(f"task '{name}'", got, "names that differ", "rename it"))
    if not config.chosen_method.has_tasks:
        from leantune.methods import get, names

        able = ", ".join(name for name in names() if get(name).has_tasks)
        got = f"{config.method} trains one task"
        problems.append(describe("tasks", got, f"a method that trains several ({able})", "name that method"))
    kinds = {name: task.kind or config.task for name, task in config.tasks.items()}
    other = sorted({kind for kind in kinds.values() if kind not in KINDS})
    if other:
        problems.append(describe("tasks", f"of the kind {', '.join(other)}", "one of " + ", ".join(KINDS), "mend kind"))
    if "causal-lm" in kinds.values() and set(kinds.values()) & set(HEAD_KINDS):
        causal = ", ".join(name for name, kind in kinds.items() if kind == "causal-lm")
        heads = ", ".join(name for name, kind in kinds.items() if kind in HEAD_KINDS)
        got = f"language modelling ({causal}) beside heads ({heads})"
        wanted = "causal-lm tasks on one decoder, or classification and regression tasks on one encoder"
        problems.append(describe("tasks", got, wanted, "train them in two runs, or set kind of each task"))
    return problems + _beside_tasks(config)


def _without_tasks(config: RunConfig) -> list[str]:
    problems = []
    for setting in ("task_sampling", "task_temperature"):
        value = getattr(config, setting)
        if value != type(config).model_fields[setting].default:
            got = f"{value} without tasks"
            problems.append(describe(setting, got, "a run with several tasks", "name tasks: --task name=file"))
    return problems


def _beside_tasks(config: RunConfig) -> list[str]:
    problems = []
    first = next(iter(config.tasks.values())).data
    if config.data != first:
        got = f"{config.data.as_posix()} beside tasks, which bring their own files"
        problems.append(describe("data", got, "the files of the tasks", "drop data"))
    if config.eval_data is not None:
        got = f"{config.eval_data.as_posix()} for all tasks together"
        problems.append(describe("eval_data", got, "one for each task", "set tasks.NAME.eval_data"))
    for setting in ("packing", "streaming", "group_by_length", "compile"):
        if getattr(config, setting):
            got = "with several tasks, whose rows are drawn and put together by task"
            problems.append(describe(setting, got, "plain batches", f"drop {setting}"))
    if config.task_temperature is not None and config.task_sampling != "temperature":
        got = f"{config.task_temperature:g} with task_sampling {config.task_sampling}"
        problems.append(describe("task_temperature", got, "task_sampling: temperature", "set that, or drop this"))
    return problems


def name_problem(name: str) -> str | None:
    """Why a name cannot be that of a task, which is that of an adapter, a folder and a key; None when it can."""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        wanted = f"letters, digits, '_' and '-', at most {_LONGEST_NAME}, a letter or digit first"
        return describe(f"task '{name}'", "no name that an adapter can have", wanted, "rename it")
    if name in _TAKEN:
        return describe(f"task '{name}'", "a name that has a meaning of its own", "another name", "rename it")
    return None


def unknown_task(name: str, known: Iterable[str]) -> str:
    """The problem of a name that none of the tasks has."""
    return describe(f"task '{name}'", "not one of this run", did_you_mean(name, list(known)), "choose one")
