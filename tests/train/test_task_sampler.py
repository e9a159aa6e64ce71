"""The order in which rows of several tasks come."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest

from leantune.train.task_sampler import TaskSampler, draws, steps_by_task, task_shares

ROWS = [90, 9, 1]
NAMES = ["a", "b", "c"]
NUMBERS = [task for task, count in enumerate(ROWS) for _ in range(count)]
LENGTHS = [row * 7 % 100 for row in range(100)]


def sampler_of(shares: list[float], seed: int = 0, rows_a_pass: int = 4, passes: int = 2) -> TaskSampler:
    named = dict(zip(NAMES, shares, strict=True))
    return TaskSampler(NUMBERS, named, seed, lengths=LENGTHS, rows_a_pass=rows_a_pass, passes=passes)


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
    sampler = sampler_of(task_shares(ROWS, "proportional"))
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert len(sampler) == 100


def test_no_row_comes_again_before_all_of_its_task_have_come() -> None:
    sampler = sampler_of(task_shares(ROWS, "uniform"))
    for task, count in enumerate(ROWS):
        drawn = Counter(row for row in chain(*(epoch(sampler, e) for e in range(9))) if NUMBERS[row] == task)
        assert len(drawn) == count
        assert max(drawn.values()) - min(drawn.values()) <= 1


def test_the_order_is_that_of_seed_and_epoch() -> None:
    shares = task_shares(ROWS, "temperature")
    one, same, other = (sampler_of(shares, seed) for seed in (5, 5, 6))
    epoch(one, 0)
    assert epoch(one, 3) == epoch(same, 3)
    assert epoch(one, 3) != epoch(other, 3)


def test_every_step_has_its_share_of_each_task() -> None:
    shares = [0.625, 0.25, 0.125]
    order = epoch(sampler_of(shares), 1)
    for start in range(0, 96, 8):
        counts = Counter(NUMBERS[row] for row in order[start : start + 8])
        assert all(abs(counts[task] - 8 * share) < 2 for task, share in enumerate(shares))
    # Of equal tasks exactly, where they divide the step.
    numbers = [row % 3 for row in range(96)]
    even = TaskSampler(numbers, dict.fromkeys(NAMES, 1 / 3), 0, lengths=[1] * 96, rows_a_pass=12)
    steps = [epoch(even, 0)[start : start + 12] for start in range(0, 96, 12)]
    assert all(Counter(numbers[row] for row in step) == {0: 4, 1: 4, 2: 4} for step in steps)


def test_a_tasks_rows_come_in_the_order_they_have_without_the_others() -> None:
    shares = dict.fromkeys(NAMES, 1 / 3)
    together = TaskSampler(NUMBERS, shares, 5, lengths=[1] * 100, rows_a_pass=1)
    own = [row for row in NUMBERS if row == 1]
    alone = TaskSampler([0] * len(own), {"b": 1.0}, 5, lengths=[1] * len(own), rows_a_pass=1)
    found = [row - ROWS[0] for number in range(4) for row in epoch(together, number) if NUMBERS[row] == 1]
    wanted = [row for number in range(20) for row in epoch(alone, number)]
    assert found == wanted[: len(found)]


def test_a_step_is_cut_by_length_and_a_pass_is_sorted_by_task() -> None:
    shares = task_shares(ROWS, "proportional")
    plain = epoch(sampler_of(shares, rows_a_pass=8, passes=1), 2)
    cut = epoch(sampler_of(shares, rows_a_pass=4, passes=2), 2)
    assert cut != plain
    for start in range(0, 100, 8):
        step = cut[start : start + 8]
        assert sorted(step) == sorted(plain[start : start + 8])
        passes = [step[:4], step[4:]]
        assert all([NUMBERS[row] for row in rows] == sorted(NUMBERS[row] for row in rows) for rows in passes)
        if passes[1]:
            assert min(LENGTHS[row] for row in passes[0]) > max(LENGTHS[row] for row in passes[1])


def test_steps_of_each_task_counted_by_hand() -> None:
    class Given:
        def __iter__(self):
            return iter([0, 1, 2, 3, 4])

    # Steps of two rows: (a a) (b a) (c), then the same again.
    assert steps_by_task(Given(), [0, 0, 1, 0, 2], 3, 2, 3) == [2, 1, 1]
    assert steps_by_task(Given(), [0, 0, 1, 0, 2], 3, 2, 5) == [4, 2, 1]
