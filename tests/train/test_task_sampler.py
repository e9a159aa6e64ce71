"""The order in which rows of several tasks come."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest

from leantune.train.task_sampler import TaskSampler, draws, steps_by_task, task_shares

ROWS = [90, 9, 1]
NUMBERS = [task for task, count in enumerate(ROWS) for _ in range(count)]


def epoch(sampler: TaskSampler, number: int) -> list[int]:
    sampler.set_epoch(number)
    return list(sampler)


def test_shares_by_the_formula() -> None:
    assert task_shares(ROWS, "proportional") == [0.9, 0.09, 0.01]
    assert task_shares(ROWS, "uniform") == pytest.approx([1 / 3] * 3)
    assert task_shares([16, 1], "temperature") == pytest.approx([4 / 5, 1 / 5])
    assert task_shares([16, 1], "temperature", 4) == pytest.approx([2 / 3, 1 / 3])
    assert task_shares(ROWS, "temperature", 1) == task_shares(ROWS, "proportional")


@pytest.mark.parametrize("shares", [[0.9, 0.09, 0.01], [1 / 3] * 3, [0.999, 0.0005, 0.0005]])
def test_an_epoch_draws_as_many_rows_as_there_are(shares: list[float]) -> None:
    counts = draws(ROWS, shares)
    assert sum(counts) == 100
    assert min(counts) >= 1
    assert all(abs(count - 100 * share) <= 2 for count, share in zip(counts, shares, strict=True))


def test_in_proportion_an_epoch_is_every_row_once() -> None:
    sampler = TaskSampler(NUMBERS, task_shares(ROWS, "proportional"), 0)
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert len(sampler) == 100


def test_no_row_comes_again_before_all_of_its_task_have_come() -> None:
    sampler = TaskSampler(NUMBERS, task_shares(ROWS, "uniform"), 0)
    for task, count in enumerate(ROWS):
        drawn = Counter(row for row in chain(*(epoch(sampler, e) for e in range(9))) if NUMBERS[row] == task)
        assert len(drawn) == count
        assert max(drawn.values()) - min(drawn.values()) <= 1


def test_the_order_is_that_of_seed_and_epoch() -> None:
    shares = task_shares(ROWS, "temperature")
    one, same, other = (TaskSampler(NUMBERS, shares, seed) for seed in (5, 5, 6))
    epoch(one, 0)
    assert epoch(one, 3) == epoch(same, 3)
    assert epoch(one, 3) != epoch(other, 3)


def test_the_rows_of_a_step_are_sorted_and_stay_in_it() -> None:
    lengths = [row * 7 % 100 for row in range(100)]
    shares = task_shares(ROWS, "proportional")
    plain = epoch(TaskSampler(NUMBERS, shares, 0), 2)
    by_length = epoch(TaskSampler(NUMBERS, shares, 0, lengths=lengths, rows_a_step=8), 2)
    assert by_length != plain
    for start in range(0, 100, 8):
        step = by_length[start : start + 8]
        assert sorted(step) == sorted(plain[start : start + 8])
        assert step == sorted(step, key=lambda row: -lengths[row])


def test_steps_of_each_task_counted_by_hand() -> None:
    class Given:
        def __iter__(self):
            return iter([0, 1, 2, 3, 4])

    # Steps of two rows: (a a) (b a) (c), then the same again.
    assert steps_by_task(Given(), [0, 0, 1, 0, 2], 3, 2, 3) == [2, 1, 1]
    assert steps_by_task(Given(), [0, 0, 1, 0, 2], 3, 2, 5) == [4, 2, 1]
