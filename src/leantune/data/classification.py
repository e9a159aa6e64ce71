"""Rows with a text (or two) and a label: class numbers for classification, floats for regression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from leantune.core.errors import DataError, describe, did_you_mean
from leantune.data.encoding import Encoded
from leantune.data.problem import Problems
from leantune.data.row import Label, Row

_MOST_CLASSES = 1000


def find_label_names(rows: Sequence[Row]) -> list[str]:
    """Class names in the order of their class numbers: numbers by size, names by alphabet.

    Raises:
        DataError: labels are fractions, or names and numbers are mixed, or there is one class alone, or more than a
            thousand.
    """
    labels = {row.label for row in rows if row.label is not None}
    fractions = [row for row in rows if isinstance(row.label, float) and not row.label.is_integer()]
    if fractions:
        raise DataError(
            describe(
                fractions[0].where,
                f"label {fractions[0].label}",
                "a class name or a whole number",
                "train it as regression",
            )
        )
    if len({isinstance(label, str) for label in labels}) > 1:
        raise DataError(describe("labels", "some labels are names and some numbers", "one kind", "write all as names"))
    if not 2 <= len(labels) <= _MOST_CLASSES:
        do = "add rows of other classes" if len(labels) < 2 else "train it as regression, or merge classes"
        raise DataError(describe("labels", f"{len(labels)} different labels", f"2 to {_MOST_CLASSES} classes", do))
    numbers = sorted(int(label) for label in labels if not isinstance(label, str))
    return [str(number) for number in numbers] or sorted(str(label) for label in labels)


def _name(label: Label | None) -> str:
    return str(int(label)) if isinstance(label, (int, float)) else str(label)


def class_number(row: Row, names: list[str], problems: Problems) -> int | None:
    """The place of a row's label among the names; None, with a problem noted, where it is none of them."""
    label = row.label
    name = _name(label)
    if name in names:
        return names.index(name)
    # Beside names that are no numbers, a whole number is the class number itself.
    if isinstance(label, int) and not any(known.lstrip("-").isdigit() for known in names) and 0 <= label < len(names):
        return label
    problems.add(row.where, f"label '{name}'", "one of " + ", ".join(names[:20]), did_you_mean(name, names[:20]))
    return None


def _encode(
    rows: Sequence[Row], tokenizer: Any, max_length: int | None, label_of: Callable[[Row, Problems], Any]
) -> Encoded:
    problems = Problems("data")
    encoded = Encoded(max_length=max_length)
    for index, row in enumerate(rows):
        if row.text is None:
            problems.add(row.where, "no 'text'", "rows with 'text' and 'label'", "name another task, or mend the data")
            continue
        if row.label is None:
            problems.add(row.where, "no label", "rows with 'text' and 'label'", "name another task, or mend the data")
            continue
        label = label_of(row, problems)
        if label is None:
            continue
        full = tokenizer(row.text, row.text_pair, verbose=False)
        kept = full
        if max_length is not None and len(full["input_ids"]) > max_length:
            kept = tokenizer(row.text, row.text_pair, truncation=True, max_length=max_length, verbose=False)
            encoded.truncated += 1
            encoded.tokens_cut += len(full["input_ids"]) - len(kept["input_ids"])
        ids = list(kept["input_ids"])
        if not ids:
            problems.add(row.where, "its text has no tokens", "at least one", "fill it in, or delete the row")
            continue
        example = {**row.extra, "input_ids": ids, "labels": label, "row": index}
        if "token_type_ids" in kept:
            example["token_type_ids"] = list(kept["token_type_ids"])
        encoded.examples.append(example)
        encoded.lengths.append(len(ids))
    problems.raise_if_any()
    encoded.total_tokens = sum(encoded.lengths)
    encoded.loss_tokens = len(encoded)
    return encoded


def encode_classification(
    rows: Sequence[Row], tokenizer: Any, *, max_length: int | None, label_names: list[str] | None = None
) -> Encoded:
    """Tokenise texts (pairs as the tokenizer joins them) with class numbers as labels.

    Args:
        rows: rows with ``text`` and ``label``.
        tokenizer: a transformers tokenizer.
        max_length: longest example in tokens; longer ones are cut (the longer text of a pair first) and counted.
        label_names: class names in the order of their numbers; found in the rows and sorted when not given.

    Returns:
        The examples, with ``label_names`` set.

    Raises:
        DataError: a row has no text, a label is not among the names, or the labels are no classes. Rows are named.
    """
    names = list(label_names) if label_names is not None else find_label_names(rows)
    encoded = _encode(rows, tokenizer, max_length, lambda row, problems: class_number(row, names, problems))
    encoded.label_names = names
    return encoded


def _number(row: Row, problems: Problems) -> float | None:
    try:
        return float(row.label)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        problems.add(row.where, f"label '{row.label}'", "a number", "mend it, or train it as classification")
        return None


def encode_regression(rows: Sequence[Row], tokenizer: Any, *, max_length: int | None) -> Encoded:
    """Tokenise texts with numbers as labels. Arguments and errors as of :func:`encode_classification`."""
    return _encode(rows, tokenizer, max_length, _number)
