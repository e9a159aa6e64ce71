"""Rows with labels: class numbers, names, numbers."""

from __future__ import annotations

from typing import Any

import pytest

from leantune.core.errors import DataError
from leantune.data import Row, encode_classification, encode_regression, find_label_names
from text_fixture import byte_tokenizer

TOKENIZER = byte_tokenizer(opening=True)


def rows(*labels: Any, text: str = "one two", pair: str | None = None) -> list[Row]:
    return [
        Row(where=f"f.jsonl:{i}", text=text, text_pair=pair, label=label) for i, label in enumerate(labels, start=1)
    ]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 2, 2], ["2", "10"]),
        ([1.0, 0.0], ["0", "1"]),
        (["true", "false"], ["false", "true"]),
    ],
)
def test_names_are_found_and_sorted(labels: list[Any], names: list[str]) -> None:
    encoded = encode_classification(rows(*labels), TOKENIZER, max_length=None)
    assert encoded.label_names == names
    words = [str(int(label)) if isinstance(label, float) else str(label) for label in labels]
    assert [names[example["labels"]] for example in encoded] == words


def test_given_names_keep_their_order() -> None:
    encoded = encode_classification(rows("no", "yes"), TOKENIZER, max_length=None, label_names=["yes", "no"])
    assert [example["labels"] for example in encoded] == [1, 0]
    numbered = encode_classification(rows(0, 1), TOKENIZER, max_length=None, label_names=["yes", "no"])
    assert [example["labels"] for example in numbered] == [0, 1]


def test_bad_labels_are_named() -> None:
    with pytest.raises(DataError) as caught:
        encode_classification(rows("yes", "noo", 7), TOKENIZER, max_length=None, label_names=["yes", "no"])
    assert "f.jsonl:2: label 'noo'; one of yes, no; did you mean 'no'?" in str(caught.value)
    assert "f.jsonl:3: label '7'" in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", 1], "some labels are names and some numbers; one kind"),
        (["a", "a"], "1 different labels; 2 to 1000 classes; add rows of other classes"),
        (list(range(1001)), "1001 different labels; 2 to 1000 classes; train it as regression"),
        ([1, 0.5], "f.jsonl:2: label 0.5; a class name or a whole number; train it as regression"),
    ],
)
def test_labels_that_are_no_classes(labels: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_label_names(rows(*labels))


def test_pairs_are_joined_and_cut() -> None:
    both = encode_classification(rows("a", "b", pair="three"), TOKENIZER, max_length=None)
    alone = encode_classification(rows("a", "b"), TOKENIZER, max_length=None)
    assert both.lengths[0] > alone.lengths[0]
    cut = encode_classification(rows("a", "b", pair="three"), TOKENIZER, max_length=both.lengths[0] - 1)
    assert (cut.truncated, cut.tokens_cut) == (2, 2)
    assert cut.lengths == [both.lengths[0] - 1] * 2


def test_regression() -> None:
    encoded = encode_regression(rows(1, 0.5, "2.5"), TOKENIZER, max_length=None)
    assert [example["labels"] for example in encoded] == [1.0, 0.5, 2.5]
    assert all(isinstance(example["labels"], float) for example in encoded)
    with pytest.raises(DataError, match=r"f\.jsonl:1: label 'high'; a number"):
        encode_regression(rows("high"), TOKENIZER, max_length=None)


def test_rows_without_text_are_refused() -> None:
    with pytest.raises(DataError, match="f:1: no 'text'; rows with 'text' and 'label'"):
        encode_regression([Row(where="f:1", prompt="a", completion="b", label=1)], TOKENIZER, max_length=None)
