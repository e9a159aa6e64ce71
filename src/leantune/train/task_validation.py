"""Several tasks measured on rows that are not trained on, each by its loss and by the metrics of its kind."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from leantune.core.errors import DependencyError
from leantune.evaluate.label_metric import class_statistics, number_statistics
from leantune.train.task_data import TASK, Task

if TYPE_CHECKING:
    from leantune.train.task_trainer import TaskTrainer


@torch.no_grad()
def validate_tasks(trainer: TaskTrainer, rows: Any, prefix: str = "eval") -> dict[str, float]:
    """Measure every task that has rows.

    Args:
        trainer: its model, loss and collator are used.
        rows: examples of all tasks.
        prefix: put before the names.

    Returns:
        ``{prefix}_loss``, the sum over the tasks, and ``{prefix}_METRIC/TASK`` of each task: its loss, and perplexity,
        or accuracy, F1 and MCC, or mean absolute error, Pearson and Spearman.
    """
    model: Any = trainer.model
    was_training = model.training
    model.eval()
    found: dict[str, float] = {f"{prefix}_loss": 0.0}
    try:
        for number, (name, task) in enumerate(trainer.tasks.items()):
            own = [example for example in rows if example[TASK] == number]
            if not own:
                continue
            metrics = _measured(trainer, task, own)
            found[f"{prefix}_loss"] += metrics["loss"]
            found |= {f"{prefix}_{metric}/{name}": value for metric, value in metrics.items()}
    finally:
        model.train(was_training)
    return found


def _measured(trainer: TaskTrainer, task: Task, rows: list[Any]) -> dict[str, float]:
    """The loss per token (per row, for a head) over all batches, whatever their sizes, and the metrics."""
    model: Any = trainer.model
    size = trainer.args.eval_batch_size
    loss_sum, items = 0.0, 0
    outputs: list[torch.Tensor] = []
    labels: list[float] = []
    for start in range(0, len(rows), size):
        batch = trainer._prepare_inputs(trainer.data_collator(rows[start : start + size]))
        loss, answered = trainer.compute_loss(model, batch, return_outputs=True)
        count = int(trainer._count(batch["labels"], batch[TASK]).sum())
        loss_sum, items = loss_sum + float(loss) * count, items + count
        if task.has_head:
            outputs.append(answered.logits[:, : task.outputs].double().cpu())
            labels += batch["labels"].tolist()
    mean = loss_sum / max(items, 1)
    if not task.has_head:
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}
    return {"loss": mean, **_scores(task, np.array(labels), torch.cat(outputs).numpy())}


def _scores(task: Task, true: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
    """The metrics of a head's answers; those of a package that is not installed are left out."""
    if task.kind == "regression":
        found = {"mean_absolute_error": float(np.abs(outputs[:, 0] - true).mean())}
    else:
        found = {"accuracy": float((outputs.argmax(axis=1) == true).mean())}
    try:
        if task.kind == "regression":
            statistics = number_statistics(true, outputs[:, 0])
        else:
            statistics = class_statistics(true.astype(np.int64), outputs.argmax(axis=1), task.outputs)
    except DependencyError:
        return found
    return found | {name: each.value() for name, each in statistics.items() if name not in found}
