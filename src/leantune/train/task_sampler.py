"""The order of the rows of several tasks: how often each task is drawn, and in which steps it takes part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Sampler

TEMPERATURE = 2.0
"""Of ``temperature`` sampling where none is given: shares as the square roots of the row counts."""

_LARGEST_SEED = 2**63


def task_shares(
    rows: Sequence[int], sampling: Literal["proportional", "uniform", "temperature"], temperature: float | None = None
) -> list[float]:
    """The share of each task among the rows drawn: ``n_i^(1/T) / sum_j n_j^(1/T)``.

    Proportional is ``T = 1``, uniform ``T`` without end.

    Args:
        rows: ``n_i``, rows of each task.
        sampling: which of the three.
        temperature: ``T``; None: 2.
    """
    if sampling == "proportional":
        power = 1.0
    else:
        power = 0.0 if sampling == "uniform" else 1 / (TEMPERATURE if temperature is None else temperature)
    weights = [count**power for count in rows]
    return [weight / sum(weights) for weight in weights]


def draws(rows: Sequence[int], shares: Sequence[float]) -> list[int]:
    """How many rows of each task an epoch draws: as many in all as there are, at least one of each task.

    Args:
        rows: rows of each task.
        shares: summing to one.
    """
    total = sum(rows)
    counts = [max(1, int(total * share)) for share in shares]
    # What rounding left goes to the largest remainders; what the least of one took, comes from the largest counts.
    order = sorted(range(len(rows)), key=lambda task: (int(total * shares[task]) - total * shares[task], task))
    for task in order[: max(total - sum(counts), 0)]:
        counts[task] += 1
    while sum(counts) > total and max(counts) > 1:
        counts[counts.index(max(counts))] -= 1
    return counts


class TaskSampler(Sampler[int]):
    """Row indices of an epoch, the tasks mixed; they depend on seed and epoch alone.

    A task's rows come in passes: each row once, in a new order, before any comes again; a pass goes on from one epoch
    to the next. Drawn in proportion, an epoch is exactly one pass of every task.

    Args:
        tasks: ``(rows,)`` the task number of each row.
        shares: of each task among the rows drawn, summing to one.
        seed: of the order.
        lengths: tokens of each row. The rows of an optimizer step are then sorted by them: how a step is cut into
            forward passes changes nothing but the padding, and tasks differ in length.
        rows_a_step: rows of an optimizer step.
    """

    def __init__(
        self,
        tasks: Sequence[int],
        shares: Sequence[float],
        seed: int,
        *,
        lengths: Sequence[int] = (),
        rows_a_step: int = 1,
    ) -> None:
        self.lengths, self.rows_a_step = torch.tensor(lengths), rows_a_step
        numbers = torch.tensor(tasks)
        self.rows = [(numbers == task).nonzero().flatten() for task in range(len(shares))]
        self.draws = draws([len(rows) for rows in self.rows], shares)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.draws)

    def __iter__(self) -> Iterator[int]:
        drawn = torch.cat([self._drawn(task, count) for task, count in enumerate(self.draws)])
        order = torch.randperm(len(drawn), generator=self._generator(len(self.rows), self.epoch))
        drawn = drawn[order]
        if len(self.lengths):
            steps = drawn.split(self.rows_a_step)
            drawn = torch.cat([rows[self.lengths[rows].argsort(descending=True, stable=True)] for rows in steps])
        return iter(drawn.tolist())

    def _drawn(self, task: int, count: int) -> Tensor:
        """The rows of a task that this epoch takes from its endless sequence of passes."""
        own = self.rows[task]
        first, size = self.epoch * count, len(own)
        passes = range(first // size, -(-(first + count) // size))
        sequence = torch.cat([own[torch.randperm(size, generator=self._generator(task, each))] for each in passes])
        start = first - passes.start * size
        return sequence[start : start + count]

    def _generator(self, stream: int, number: int) -> torch.Generator:
        """A generator of its own for each pass of each task, and for the mixing of each epoch."""
        seed = ((self.seed * 1_000_003 + stream) * 1_000_003 + number) % _LARGEST_SEED
        return torch.Generator().manual_seed(seed)


def steps_by_task(sampler: Any, tasks: Sequence[int], count: int, rows_a_step: int, steps: int) -> list[int]:
    """In how many of a run's optimizer steps each task takes part.

    Args:
        sampler: gives the row indices of an epoch; its order is left at epoch 0.
        tasks: ``(rows,)`` the task number of each row.
        count: number of tasks.
        rows_a_step: rows of an optimizer step; the last one of an epoch may have fewer.
        steps: optimizer steps of the run.
    """
    numbers = torch.tensor(tasks)
    found = torch.zeros(count, dtype=torch.long)
    done = epoch = 0
    while done < steps:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        own = numbers[torch.tensor(list(sampler))]
        step = torch.arange(len(own)) // rows_a_step
        takes_part = torch.zeros(int(step[-1]) + 1, count, dtype=torch.bool)
        takes_part[step, own] = True
        found += takes_part[: steps - done].sum(0)
        done, epoch = done + len(takes_part), epoch + 1
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(0)
    return found.tolist()
