"""Batches: padding on the right, masked; extra columns carried."""

from __future__ import annotations

import torch

from leantune.data import NO_LOSS, Collator

EXAMPLES = [
    {"input_ids": [5, 6, 7], "labels": [NO_LOSS, 6, 7], "row": 0, "weight": 0.5, "task": "a"},
    {"input_ids": [8, 9], "labels": [NO_LOSS, 9], "row": 1, "weight": 2, "task": "b"},
]


def test_padding_is_on_the_right_and_masked() -> None:
    # The padding id is a real token (many models pad with their end-of-text): only the mask may tell them apart.
    batch = Collator(7)(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[NO_LOSS, 6, 7], [NO_LOSS, 9, NO_LOSS]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_length_is_rounded_up() -> None:
    batch = Collator(0, pad_to_multiple_of=8)(EXAMPLES)
    assert {value.shape for value in batch.values()} == {(2, 8)}
    assert batch["attention_mask"].sum() == 5
    full = [{"input_ids": [1] * 8, "labels": [1] * 8}]
    assert Collator(0, pad_to_multiple_of=8)(full)["input_ids"].shape == (1, 8)


def test_extra_columns() -> None:
    batch = Collator(0, ("row", "weight", "task"))(EXAMPLES)
    assert torch.equal(batch["row"], torch.tensor([0, 1]))
    assert torch.equal(batch["weight"], torch.tensor([0.5, 2.0]))
    assert batch["task"] == ["a", "b"]


def test_labels_of_rows() -> None:
    examples = [
        {"input_ids": [1, 2], "token_type_ids": [0, 1], "labels": 3},
        {"input_ids": [1], "token_type_ids": [1], "labels": 0},
    ]
    batch = Collator(9)(examples)
    assert torch.equal(batch["labels"], torch.tensor([3, 0]))
    assert batch["labels"].dtype == torch.long
    assert batch["token_type_ids"].tolist() == [[0, 1], [1, 0]]
    numbers = Collator(9)([{"input_ids": [1], "labels": 0.5}])
    assert numbers["labels"].dtype == torch.float32
