"""Rows by length: every row once, little padding, and an order that depends on seed and epoch alone."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from leantune.train.sampler import LengthSampler


def padding(order: list[int], lengths: list[int], batch: int) -> float:
    cells = 0
    for start in range(0, len(order), batch):
        chosen = [lengths[row] for row in order[start : start + batch]]
        cells += max(chosen) * len(chosen)
    return 1 - sum(lengths) / cells


@given(
    lengths=st.lists(st.integers(1, 200), max_size=120),
    batch=st.integers(1, 9),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 9),
)
def test_every_row_comes_once(lengths: list[int], batch: int, seed: int, epoch: int) -> None:
    sampler = LengthSampler(lengths, batch, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)
    full = [max(lengths[row] for row in order[i : i + batch]) for i in range(0, len(order) - batch + 1, batch)]
    if len(lengths) % batch == 0 and full:
        assert full[0] == max(lengths), "what takes most memory comes first"


def test_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = [row % 17 + 1 for row in range(100)]

    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthSampler(lengths, 8, seed)
        sampler.set_epoch(epoch)
        random.random()
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_it_saves_padding_and_is_still_random() -> None:
    dice = random.Random(0)
    lengths = [int(dice.lognormvariate(3, 0.5)) + 1 for _ in range(2000)]
    order = list(LengthSampler(lengths, 8, 0))
    assert padding(order, lengths, 8) < 0.04
    shuffled = list(range(2000))
    dice.shuffle(shuffled)
    assert padding(shuffled, lengths, 8) > 0.25
    first = [max(lengths[row] for row in order[i : i + 8]) for i in range(8, 2000, 8)]
    assert first != sorted(first)
    assert first != sorted(first, reverse=True)
