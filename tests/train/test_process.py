"""What one of several processes does by itself: count, evaluate, write. The other one is a stand-in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leantune.train import LeanTrainer, distributed
from leantune.train.validation import validate


def test_items_of_a_step_are_those_of_all_processes() -> None:
    """The other process counted nine."""
    accelerator = SimpleNamespace(num_processes=2, gather=lambda items: torch.stack([items, torch.tensor(9)]))
    args = SimpleNamespace(average_tokens_across_devices=True, world_size=2)
    trainer: Any = SimpleNamespace(task="causal-lm", accelerator=accelerator, args=args)
    batches = [{"labels": torch.tensor([[-100, -100, 5, 6]])}, {"labels": torch.tensor([[3, 7, -100, -100]])}]
    items = LeanTrainer._get_num_items_in_batch(trainer, batches, torch.device("cpu"))
    assert items == 3 + 9
    # Half of them: the gradients of two processes are averaged afterwards.
    assert LeanTrainer._items(trainer, items, 3) == 6


def _mean_of_labels(model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool) -> tuple[Tensor, None]:
    del model, return_outputs
    labels = inputs["labels"]
    return labels[labels >= 0].double().mean(), None


def test_every_row_is_evaluated_once() -> None:
    """Three batches for two processes: the last batch of the second only keeps step with the first."""
    rows = [{"labels": torch.tensor([-100] * (6 - row) + [row] * (row + 1))} for row in range(5)]
    found: list[Tensor] = []
    for process in (0, 1):
        trainer: Any = SimpleNamespace(
            model=nn.Linear(1, 1),
            task="causal-lm",
            args=SimpleNamespace(world_size=2, process_index=process, eval_batch_size=2, device="cpu"),
            accelerator=SimpleNamespace(reduce=lambda totals, reduction: found.append(totals) or totals),
            _prepare_inputs=dict,
            compute_loss=_mean_of_labels,
        )
        validate(trainer, torch.utils.data.DataLoader(rows, batch_size=2))  # type: ignore[arg-type]
    loss, items, seen, _ = (found[0] + found[1]).tolist()
    assert (seen, items) == (5, 1 + 2 + 3 + 4 + 5)
    assert loss == pytest.approx(1 * 2 + 2 * 3 + 3 * 4 + 4 * 5)


def test_the_first_process_alone_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    for process in (0, 1):
        monkeypatch.setenv("RANK", str(process))
        assert distributed.is_main() == (process == 0), "before they have found each other"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for process in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda process=process: process)
        assert distributed.is_main() == (process == 0)
