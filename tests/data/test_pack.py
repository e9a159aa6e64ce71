"""Packs: every row once, none too full, hardly any room left; the batch that keeps their rows apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leantune.data import NO_LOSS, PackCollator, Packs
from leantune.data.packing import best_fit, padding_share

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [5, 6, NO_LOSS], "weight": 0.5},
    {"input_ids": [8, 9], "labels": [NO_LOSS, 9], "weight": 1.5},
    {"input_ids": [3, 4, 5, 6], "labels": [NO_LOSS, NO_LOSS, 5, 6], "weight": 2.5},
]
PACKS = [{"documents": [ROWS[0], ROWS[1]]}, {"documents": [ROWS[2]]}]


@given(st.lists(st.integers(1, 32), max_size=80), st.integers(0, 3))
def test_every_row_is_in_one_pack_and_no_pack_is_too_full(lengths: list[int], seed: int) -> None:
    packs = best_fit(lengths, 32, seed)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    filled = [sum(lengths[row] for row in pack) for pack in packs]
    assert all(0 < tokens <= 32 for tokens in filled)
    # Two packs that would fit into one are never both left; and the bound of the algorithm, from the lower bound.
    assert sum(sorted(filled)[:2]) > 32 or len(packs) < 2
    fewest = max(-(-sum(lengths) // 32), sum(length > 16 for length in lengths))
    assert len(packs) <= 11 / 9 * fewest + 1 or fewest < 4


def test_packs_follow_from_lengths_and_seed() -> None:
    lengths = [4, 4, 4, 3, 3, 2, 2, 1] * 5
    assert best_fit(lengths, 10, 1) == best_fit(lengths, 10, 1)
    assert best_fit(lengths, 10, 1) != best_fit(lengths, 10, 2)
    # 4 goes beside the 6, where it fills the room, and the two of 5 share a pack.
    assert best_fit([6, 5, 4, 5], 10) in ([[0, 2], [1, 3]], [[0, 2], [3, 1]])
    with pytest.raises(ValueError, match="11 tokens does not fit"):
        best_fit([11], 10)


def test_a_data_set_of_packs() -> None:
    packs = Packs.of(ROWS, 5, seed=0)
    assert packs.members == [[2], [0, 1]]
    assert packs[1]["documents"] == [ROWS[0], ROWS[1]]
    assert [len(pack["documents"]) for pack in packs[:]] == [1, 2]
    assert packs.lengths == [4, 5]
    assert packs.filled == pytest.approx(9 / 10)


def test_padding_share() -> None:
    assert padding_share([1, 2, 3, 4], [[0, 3], [1, 2]]) == pytest.approx(1 - 10 / 14)
    assert padding_share([], []) == 0


def test_positions_restart_and_first_tokens_carry_no_loss() -> None:
    batch = PackCollator(0)(PACKS)
    assert set(batch) == {"input_ids", "position_ids", "labels", "documents"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 5, 6, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    # The example says that its first token carries loss; in a pack the row before it would have to predict it.
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, 9], [-100, -100, 5, 6, -100]]
    assert batch["documents"].tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 2, -1]]


def test_extra_columns_have_one_value_a_row() -> None:
    assert PackCollator(0, ("weight",))(PACKS)["weight"].tolist() == [0.5, 1.5, 2.5]


def test_a_mask_in_booleans_or_numbers() -> None:
    mask = PackCollator(0, form="mask")(PACKS)["attention_mask"]
    documents = [[0, 0, 0, 1, 1], [2, 2, 2, 2, -1]]
    for pack in range(2):
        for query in range(5):
            for key in range(5):
                allowed = key <= query and documents[pack][query] == documents[pack][key]
                assert bool(mask[pack, 0, query, key]) is allowed
    numbers = PackCollator(0, form="mask", mask_dtype=torch.float64)(PACKS)["attention_mask"]
    assert numbers.dtype == torch.float64
    assert torch.equal(numbers == 0, mask)


def test_one_sequence_with_borders() -> None:
    batch: dict[str, Any] = PackCollator(0, form="varlen", pad_to_multiple_of=8)(PACKS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3, 4, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 9]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (4, 4)
    assert PackCollator(0, pad_to_multiple_of=8)(PACKS)["input_ids"].shape == (2, 8)


def test_examples_that_are_no_packs_are_padded() -> None:
    batch = PackCollator(0)(ROWS)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["attention_mask"].sum() == 9
