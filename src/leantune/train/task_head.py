"""Heads of several tasks on one encoder: each task has its own, of its own width, trained by its own rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from leantune.train.loss import token_losses, without_adapter
from leantune.train.task_data import Task


class TaskHead(ModulesToSaveWrapper):
    """PEFT's wrapper of a module that is trained whole, with rows of several tasks in one forward.

    Each row goes through its own task's copy. Outputs of unequal width are filled up with zeros on the right, which no
    loss looks at.
    """

    row_tasks: Sequence[str] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.row_tasks is None:
            return cast(Tensor, super().forward(*args, **kwargs))
        hidden, *rest = args
        outputs, places = [], []
        for task, rows in rows_by_task(self.row_tasks, hidden.device).items():
            outputs.append(self.modules_to_save[task](hidden.index_select(0, rows), *rest, **kwargs))
            places.append(rows)
        width = max(output.shape[-1] for output in outputs)
        filled = torch.cat([F.pad(output, (0, width - output.shape[-1])) for output in outputs])
        return filled.index_select(0, torch.cat(places).argsort())


def rows_by_task(names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """The rows of each task in the order in which the tasks come up."""
    return {
        task: torch.tensor([row for row, name in enumerate(names) if name == task], device=device)
        for task in dict.fromkeys(names)
    }


def give_heads(model: nn.Module, heads: Mapping[str, Mapping[str, nn.Module]]) -> None:
    """Put its own fresh head on every task of a PEFT model whose adapters all have the same one.

    Args:
        model: with an adapter for each task.
        heads: of each task the modules of its head, by their path in the base model.
    """
    base = without_adapter(model)
    for path in next(iter(heads.values()), {}):
        wrapper = base.get_submodule(path)
        # The state is PEFT's; only how a batch goes through it differs.
        wrapper.__class__ = TaskHead
        for task, modules in heads.items():
            copies = cast(nn.ModuleDict, wrapper.modules_to_save)
            copies[task] = copy.deepcopy(modules[path]).requires_grad_(True)


def set_rows(model: nn.Module, names: Sequence[str] | None, step: int | None = None) -> None:
    """Tell all layers and heads which task each row of the coming batches belongs to.

    Args:
        model: a PEFT model with an adapter for each task.
        names: one task a row; None: the active adapter for all rows.
        step: what dropout is keyed by, beside the task.
    """
    tuner: Any = cast(Any, model).base_model
    tuner.set_row_tasks(None if names is None else list(names), **({} if step is None else {"step": step}))
    for module in model.modules():
        if isinstance(module, TaskHead):
            module.row_tasks = None if names is None else list(names)


@contextmanager
def as_task(model: nn.Module, task: Task) -> Iterator[None]:
    """Inside, the base's config describes the head of one task, as it would in a run of its own."""
    config: Any = without_adapter(model).config
    before = head_facts(config)
    _describe_head(config, task.head)
    try:
        yield
    finally:
        _describe_head(config, before)


def head_facts(config: Any) -> dict[str, Any]:
    """What a base's config says of its head."""
    names = ("num_labels", "problem_type", "id2label", "label2id")
    return {name: copy.copy(getattr(config, name, None)) for name in names}


def _describe_head(config: Any, facts: Mapping[str, Any]) -> None:
    # The number first: setting it renames the labels.
    for name, value in facts.items():
        setattr(config, name, value)


def head_losses(logits: Tensor, labels: Tensor, rows: Mapping[str, Tensor], tasks: Mapping[str, Task]) -> Tensor:
    """``(rows,)`` losses: cross-entropy in nats for classes, squared error for numbers, each task by its own head.

    Args:
        logits: ``(rows, widest)``.
        labels: ``(rows,)`` class numbers and numbers.
        rows: the rows of each task in the batch.
        tasks: by name.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    found = []
    for name, own in rows.items():
        task, outputs = tasks[name], wide.index_select(0, own)
        wanted = labels.index_select(0, own)
        if task.kind == "regression":
            found.append((outputs[:, 0] - wanted.to(outputs.dtype)) ** 2)
        else:
            found.append(token_losses(outputs[:, : task.outputs], wanted.long()))
    return torch.cat(found).index_select(0, torch.cat(list(rows.values())).argsort())


def switch_off_dropout(model: nn.Module) -> bool:
    """Take the base's own dropout away: it is drawn for a batch as a whole, so a task's would depend on the others.

    Returns:
        Whether there was any.
    """
    base = without_adapter(model)
    found = False
    config: Any = getattr(base, "config", None)
    for module in [*base.modules(), *([config] if config is not None else [])]:
        if isinstance(module, nn.Dropout):
            found = found or module.p > 0
            module.p = 0.0
        for name, value in list(vars(module).items()):
            # Attention hands its share to a kernel as a number.
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")) and value > 0:
                found = True
                setattr(module, name, 0.0)
    return found
