"""The loss on rows that are not trained on, exact per token whatever the batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from leantune.train.loss import count_items

if TYPE_CHECKING:
    from leantune.train.trainer import LeanTrainer


@torch.no_grad()
def validate(trainer: LeanTrainer, dataloader: Any) -> tuple[dict[str, float], int]:
    """Measure the loss, and accuracy for classes or mean absolute error for numbers.

    Args:
        trainer: its model, loss and device are used.
        dataloader: the batches.

    Returns:
        The metrics by name, and the number of rows.
    """
    model: Any = trainer.model
    was_training = model.training
    model.eval()
    of_tokens = trainer.task in ("causal-lm", "masked-lm")
    totals = torch.zeros(4, dtype=torch.float64)
    for batch, counts in _own_batches(trainer, dataloader):
        inputs = trainer._prepare_inputs(batch)
        loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
        rows = inputs["labels"].shape[0]
        items = int(count_items(trainer.task, inputs["labels"]))
        right = 0.0 if of_tokens else _hits(trainer.task, outputs.logits, inputs["labels"])
        if counts:
            totals += torch.tensor([float(loss) * items, items, rows, right], dtype=torch.float64)
    model.train(was_training)
    if trainer.args.world_size > 1:
        totals = trainer.accelerator.reduce(totals.to(trainer.args.device), reduction="sum")
    loss_sum, items, rows, right = totals.tolist()
    mean = loss_sum / max(items, 1)
    metrics = {"loss": mean}
    if of_tokens:
        metrics |= {"perplexity": math.exp(min(mean, 700.0)), "tokens": int(items)}
    else:
        metrics |= {"mean_absolute_error" if trainer.task == "regression" else "accuracy": right / max(rows, 1)}
    return metrics, int(rows)


def _own_batches(trainer: LeanTrainer, dataloader: Any) -> Iterator[tuple[dict[str, Any], bool]]:
    """The batches of this process, and whether they count: the last one may only keep step with the others.

    accelerate fills up the last round with rows from the beginning, and would count these twice.
    """
    count, own = trainer.args.world_size, trainer.args.process_index
    if count == 1 or isinstance(dataloader.dataset, IterableDataset):
        yield from ((batch, True) for batch in dataloader)
        return
    rows, size = range(len(dataloader.dataset)), trainer.args.eval_batch_size
    batches = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    places = range(own, -(-len(batches) // count) * count, count)
    loader = DataLoader(
        dataloader.dataset,
        batch_sampler=[batches[min(place, len(batches) - 1)] for place in places],
        collate_fn=dataloader.collate_fn,
    )
    yield from ((batch, place < len(batches)) for batch, place in zip(loader, places, strict=True))


def _hits(task: str, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Rows whose class is right, or the sum of the absolute errors."""
    if task != "regression":
        return float((logits.argmax(-1) == labels).sum())
    return float((logits.squeeze(-1).float() - labels.float()).abs().sum())
