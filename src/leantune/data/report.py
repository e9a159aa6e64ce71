"""What a data set looks like to the model: counts, lengths, loss share, and the mask made visible."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from leantune.data.encoding import NO_LOSS, Encoded
from leantune.data.row import Row

_BINS = 12
_QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def _asked(row: Row) -> str:
    """What a row asks, as a key."""
    if row.messages is not None:
        return json.dumps(row.messages[: row.last_assistant()], sort_keys=True, default=str)
    return json.dumps([row.prompt, row.text, row.text_pair])


def _content(row: Row) -> str:
    return json.dumps([row.messages, row.prompt, row.completion, row.text, row.text_pair, row.label], default=str)


def _lengths(lengths: Sequence[int]) -> dict[str, Any]:
    values = np.asarray(lengths)
    counts, edges = np.histogram(values, bins=_BINS)
    quantiles = {name: float(np.quantile(values, q)) for name, q in _QUANTILES.items()}
    return {
        **quantiles,
        "mean": float(values.mean()),
        "histogram": {"edges": [float(edge) for edge in edges], "counts": [int(count) for count in counts]},
    }


def summary(encoded: Encoded, rows: Sequence[Row], tokenizer: Any) -> dict[str, Any]:
    """Counts of a data set, JSON-serialisable.

    Args:
        encoded: the rows, encoded.
        rows: the rows.
        tokenizer: the tokenizer they were encoded with.

    Returns:
        ``rows``; ``tokens`` (quantiles, mean and histogram of the examples' lengths in tokens); ``total_tokens``;
        ``loss_tokens``; ``loss_share`` (of the tokens; None for classification and regression); ``truncation`` (rows,
        tokens, rows that lost loss tokens); ``duplicates`` (rows beyond the first of their kind; ``prompts``: the
        same question, ``rows``: the whole row); ``references`` (rows that bring some); ``unknown_tokens``; ``labels``
        (rows of each label, for classification).
    """
    unknown = tokenizer.unk_token_id
    is_text = isinstance(encoded.examples[0]["labels"], list)
    labels = Counter(str(row.label) for row in rows if row.label is not None)
    return {
        "rows": len(encoded),
        "tokens": _lengths(encoded.lengths),
        "total_tokens": encoded.total_tokens,
        "loss_tokens": encoded.loss_tokens,
        "loss_share": encoded.loss_tokens / encoded.total_tokens if is_text else None,
        "truncation": {
            "max_length": encoded.max_length,
            "rows": encoded.truncated,
            "tokens": encoded.tokens_cut,
            "loss_rows": encoded.loss_rows_cut,
        },
        "duplicates": {
            "prompts": len(rows) - len({_asked(row) for row in rows}),
            "rows": len(rows) - len({_content(row) for row in rows}),
        },
        "references": sum(bool(row.references) for row in rows),
        "unknown_tokens": 0 if unknown is None else sum(example["input_ids"].count(unknown) for example in encoded),
        "labels": dict(labels.most_common()) if encoded.label_names else None,
    }


def masked_text(example: dict[str, Any], tokenizer: Any) -> list[tuple[str, bool]]:
    """An example's text as the model sees it, special tokens included, cut where the mask changes.

    Args:
        example: one of :attr:`Encoded.examples` of a text task.
        tokenizer: the tokenizer it was encoded with.

    Returns:
        Stretches of text, in order, each with whether it carries loss; joined they are the whole text.
    """
    ids, flags = example["input_ids"], [label != NO_LOSS for label in example["labels"]]
    stretches: list[tuple[str, bool]] = []
    written = ""
    for end in range(1, len(ids) + 1):
        if end < len(ids) and flags[end] == flags[end - 1]:
            continue
        # Decoded from the start each time: some tokenizers drop the space before the first token they are given.
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        stretches.append((text[len(written) :], flags[end - 1]))
        written = text
    return stretches
