"""From a configuration with several tasks to what trains: their rows, one base, an adapter and a head for each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, get_peft_model
from torch import nn

from leantune.core.errors import ConfigError, MethodError, describe, raise_all
from leantune.data import Encoded
from leantune.methods._peft import prefix_of
from leantune.models import BaseModel
from leantune.train import distributed
from leantune.train.config import RunConfig
from leantune.train.folder import kept_template
from leantune.train.head import head_modules
from leantune.train.rows import Rows
from leantune.train.setup import (
    Examples,
    Prepared,
    build_trainer,
    enable_checkpointing,
    encode_rows,
    load_model,
    method_config,
)
from leantune.train.task_config import view
from leantune.train.task_data import Task, joined, read_tasks
from leantune.train.task_head import give_heads, head_facts, switch_off_dropout


def prepare_tasks(config: RunConfig, checkpoints: Path, *, resume: bool = False) -> Prepared:
    """All that comes before the first step of a run with several tasks.

    Args:
        config: the settings, learning rate resolved.
        checkpoints: where the trainer may make its folder.
        resume: the folder holds this very run.

    Raises:
        LeantuneError: the data, the model, a name or the method's options are not as they must.
    """
    if distributed.processes() > 1:
        got = f"{distributed.processes()} processes"
        do = "train on one, or each task in a run of its own"
        raise ConfigError(describe("tasks", got, "one: a task may be absent from some of them", do))
    rows = read_tasks(config, kept_template(config) if resume else None)
    base, tasks, heads = _load(config, rows)
    _check_names(base, list(tasks), config)
    _encode(tasks, rows, base)
    notes = _notes(tasks)
    if switch_off_dropout(base.model):
        notes.append("the base's own dropout is off: it is drawn for a batch as a whole, whatever its tasks")
    model = apply_tasks(config, base, list(tasks), heads)
    examples = Examples(
        joined([task.train for task in tasks.values()]),
        _evaluation(list(tasks.values())),
        source={"tasks": {name: task.source for name, task in tasks.items()}, "notes": notes},
    )
    trainer = build_trainer(config, base, model, examples, checkpoints, list(tasks.values()))
    return Prepared(base, examples, model, trainer, list(tasks.values()))


def _load(
    config: RunConfig, rows: dict[str, Rows]
) -> tuple[BaseModel, dict[str, Task], dict[str, dict[str, nn.Module]]]:
    """The base of all tasks, the tasks without rows yet, and the fresh modules of each one's head.

    A head is loaded as a run of its own would load it, so that both begin with the same numbers and an adapter's
    record names the base that such a run meets.
    """
    base: BaseModel | None = None
    loaded: dict[tuple[str, int], tuple[str, dict[str, Any], dict[str, nn.Module]]] = {}
    tasks, heads = {}, {}
    for name, found in rows.items():
        own = view(config, name)
        outputs = 1 if own.task == "regression" else len(found.label_names or ())
        key = (own.task, outputs)
        if key not in loaded:
            opened = load_model(own, config.model, found.label_names)
            paths = head_modules(opened) if outputs else []
            modules = {path: copy.deepcopy(opened.model.get_submodule(path)) for path in paths}
            loaded[key] = (opened.content_hash, head_facts(opened.model.config), modules)
            base = opened if base is None else base
        content_hash, head, modules = loaded[key]
        if found.label_names:
            named = dict(enumerate(found.label_names))
            head = {**head, "id2label": named, "label2id": {label: number for number, label in named.items()}}
        task = Task(name, own, Encoded(), label_names=found.label_names, outputs=outputs)
        task.content_hash, task.head, task.source = content_hash, head, found.source
        tasks[name], heads[name] = task, modules
        if base is not None and found.template is not None:
            base.tokenizer.chat_template = found.template
    if base is None:
        raise ConfigError(describe("tasks", "none", "at least one", "name them"))
    return base, tasks, heads


def _encode(tasks: dict[str, Task], rows: dict[str, Rows], base: BaseModel) -> None:
    """Give every task its rows as tokens."""
    for name, task in tasks.items():
        encoded = encode_rows(task.config, rows[name], base.encoder)
        task.train, task.evaluation = encoded.train, encoded.evaluation  # type: ignore[assignment]


def _evaluation(tasks: list[Task]) -> Any:
    parts = [task.evaluation for task in tasks]
    return joined(parts) if any(part is not None for part in parts) else None


def _notes(tasks: dict[str, Task]) -> list[str]:
    return [f"{name}: {note}" for name, task in tasks.items() for note in task.source.get("notes", [])]


def apply_tasks(
    config: RunConfig, base: BaseModel, names: list[str], heads: dict[str, dict[str, nn.Module]]
) -> PeftModel:
    """The base with an adapter for each task, all of one config, and all of them trained.

    Args:
        config: method, options, seed.
        base: the base model.
        names: of the tasks.
        heads: the fresh modules of each task's head, by their path; empty mappings without heads.

    Raises:
        LeantuneError: the options contradict each other or do not fit the model.
    """
    method = config.chosen_method
    options = method_config(method, view(config, names[0]), base)
    saved = list(options.modules_to_save or ())
    try:
        model: Any = get_peft_model(base.model, options, adapter_name=names[0])
        for name in names[1:]:
            # PEFT adds a head's usual names each time.
            options.modules_to_save = saved or None
            model.add_adapter(name, options)
    except (ValueError, TypeError) as error:
        text = " ".join(str(error).split())
        do = f"see leantune methods {method.name} and leantune inspect model {base.name}"
        raise MethodError(describe(f"method {method.name}", text, "options that fit the model", do)) from error
    if any(heads.values()):
        give_heads(model, heads)
    model.set_requires_grad(names, True)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    return cast(PeftModel, model)


def _check_names(base: BaseModel, names: list[str], config: RunConfig) -> None:
    """Refuse names that PEFT would take for something else in the keys of a file.

    Raises:
        ConfigError: all of them at once.
    """
    parts = {part for path, _ in base.model.named_modules() for part in path.split(".")}
    parts |= {name.rpartition(".")[2] for name, _ in base.model.named_parameters()}
    parts |= {"base_model", "model", "base_layer", "modules_to_save", "original_module"}
    prefix, container = prefix_of(config.method.replace("-", "_")), nn.ModuleDict()
    # PEFT looks for the modules that train whole, and for two usual names of a head, by the end of a path.
    whole = {"classifier", "score", *(path.rpartition(".")[2] for path in head_modules(base))}
    problems = []
    for name in names:
        if name.endswith(tuple(whole)):
            got = f"ends with '{next(end for end in sorted(whole) if name.endswith(end))}', by which PEFT finds heads"
        elif name in parts or hasattr(container, name):
            got = "the name of a part of the model, which the keys of its adapter could not be told from"
        elif name in prefix:
            got = f"a part of '{prefix}', by which PEFT finds the method's tensors"
        else:
            continue
        problems.append(describe(f"task '{name}'", got, "another name", "rename the task"))
    raise_all(problems, ConfigError)
