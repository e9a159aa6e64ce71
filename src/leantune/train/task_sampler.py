"""The order of the rows of several tasks: how often each task is drawn, and in which steps it takes part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Sampler

from leantune.methods._row_task import seeded

TEMPERATURE = 2.0
"""Of ``temperature`` sampling where none is given: shares as the square roots of the row counts."""


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
    """Row indices of an epoch, the tasks evenly mixed.

    A task's rows come in passes: each row once, in a new order, before any comes again; a pass goes on from one epoch
    to the next. Which row comes when is a function of seed and name: the same whatever tasks are beside it. Drawn in
    proportion, an epoch is exactly one pass of every task.

    The rows of a task stand at equal distances, so every step has its share of each task, up to a row or so. How a step
    is cut into forward passes changes nothing but their cost: rows are sorted by length before the cut, since tasks
    differ in length, and by task after it, so that no layer has to.

    Args:
        tasks: ``(rows,)`` the task number of each row.
        shares: of each task among the rows drawn, by its name; summing to one.
        seed: of the order.
        lengths: tokens of each row.
        rows_a_pass: rows of a forward pass.
        passes: forward passes of an optimizer step.
    """

    def __init__(
        self,
        tasks: Sequence[int],
        shares: Mapping[str, float],
        seed: int,
        *,
        lengths: Sequence[int],
        rows_a_pass: int,
        passes: int = 1,
    ) -> None:
        self.tasks, self.lengths = torch.tensor(tasks), torch.tensor(lengths)
        self.rows_a_pass, self.passes = rows_a_pass, passes
        self.rows = {name: (self.tasks == task).nonzero().flatten() for task, name in enumerate(shares)}
        counts = draws([len(rows) for rows in self.rows.values()], list(shares.values()))
        self.draws = dict(zip(shares, counts, strict=True))
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.draws.values())

    def __iter__(self) -> Iterator[int]:
        drawn = torch.cat([self._drawn(name, count) for name, count in self.draws.items()])
        places = torch.cat([self._places(name, count) for name, count in self.draws.items()])
        rows = drawn[places.argsort(stable=True)]
        rows = _sorted_within(rows, -self.lengths[rows], self.rows_a_pass * self.passes)
        return iter(_sorted_within(rows, self.tasks[rows], self.rows_a_pass).tolist())

    def _places(self, name: str, count: int) -> Tensor:
        """Where the rows of a task stand in the epoch, between 0 and 1: evenly, from a drawn beginning."""
        begin = torch.rand((), generator=seeded("place", self.seed, name, self.epoch), dtype=torch.float64)
        return (torch.arange(count) + begin) / count

    def _drawn(self, name: str, count: int) -> Tensor:
        """The rows of a task that this epoch takes from its endless sequence of passes."""
        own = self.rows[name]
        first, size = self.epoch * count, len(own)
        passes = range(first // size, -(-(first + count) // size))
        order = [own[torch.randperm(size, generator=seeded("rows", self.seed, name, each))] for each in passes]
        start = first - passes.start * size
        return torch.cat(order)[start : start + count]


def _sorted_within(rows: Tensor, key: Tensor, size: int) -> Tensor:
    """The rows, every ``size`` of them sorted by a key."""
    order = key.argsort(stable=True)
    return rows[order[(order // size).argsort(stable=True)]]


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
