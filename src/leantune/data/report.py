"""What a data set looks like to the model: counts, lengths, loss share, and the mask made visible."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from leantune.data.encoding import NO_LOSS, Encoded, special_ids
from leantune.data.row import Row

_BINS = 12
_QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def _content(row: Row) -> str:
    return json.dumps([row.messages, row.prompt, row.completion, row.text, row.text_pair, row.label], default=str)


def _lengths(lengths: Sequence[int]) -> dict[str, Any]:
    values = np.asarray(lengths)
    # Bins of whole tokens, the last edge behind the longest row.
    width = -(-int(values.max() - values.min() + 1) // _BINS)
    counts, edges = np.histogram(values, bins=np.arange(values.min(), values.max() + width + 1, width))
    quantiles = {name: float(np.quantile(values, q)) for name, q in _QUANTILES.items()}
    return {
        **quantiles,
        "mean": float(values.mean()),
        "histogram": {"edges": [int(edge) for edge in edges], "counts": [int(count) for count in counts]},
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
        same question, ``rows``: the whole row); ``references`` (rows that bring some); ``glued`` (see :func:`glued`);
        ``unknown_tokens``; ``labels`` (rows of each label, for classification); ``roles`` (of a text task: for each
        role the tokens, and those that carry loss) and ``ends`` (what answers end with, see :func:`ends`).
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
            "prompts": len(rows) - len({row.asked() for row in rows}),
            "rows": len(rows) - len({_content(row) for row in rows}),
        },
        "references": sum(bool(row.references) for row in rows),
        "glued": glued(rows),
        "unknown_tokens": 0 if unknown is None else sum(example["input_ids"].count(unknown) for example in encoded),
        "labels": dict(labels.most_common()) if encoded.label_names else None,
        "roles": roles(encoded, rows, tokenizer) if is_text else None,
        "ends": ends(encoded, tokenizer) if is_text else None,
    }


def glued(rows: Sequence[Row]) -> int:
    """Rows of prompt and completion with no white space where the one ends and the other begins.

    Nothing is put between them, so that a question would run into its answer.
    """
    bordered = ((row.prompt[-1:], row.completion[:1]) for row in rows if row.prompt and row.completion)
    return sum(not (before.isspace() or after.isspace()) for before, after in bordered)


TEMPLATE = "template"


def roles(encoded: Encoded, rows: Sequence[Row], tokenizer: Any) -> dict[str, dict[str, int]]:
    """Who says the tokens, and how many of them carry loss.

    Args:
        encoded: the rows, encoded.
        rows: the rows.
        tokenizer: the tokenizer they were encoded with.

    Returns:
        ``{role: {"tokens": ..., "loss_tokens": ...}}``. The roles of a conversation are those of its messages, counted
        where their content stands; what the chat template writes around them is ``template``. Else the roles are
        ``prompt`` and ``completion``, or ``text``.
    """
    found: dict[str, dict[str, int]] = {}

    def count(role: str, flags: Sequence[bool]) -> None:
        entry = found.setdefault(role, {"tokens": 0, "loss_tokens": 0})
        entry["tokens"] += len(flags)
        entry["loss_tokens"] += sum(flags)

    for example in encoded:
        row = rows[example["row"]]
        flags = [label != NO_LOSS for label in example["labels"]]
        if row.is_plain_text:
            count("text", flags)
        elif row.messages is None or _is_alpaca_prompt(row, tokenizer, example):
            start = flags.index(True)
            count("prompt", flags[:start])
            count("completion", flags[start:])
        else:
            is_cut = len(example["input_ids"]) == encoded.max_length
            for role, first, last in _said(row, example["input_ids"], tokenizer, is_cut):
                count(role, flags[first:last])
    order = ["system", "developer", "tool", "user", "assistant", TEMPLATE]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else -1))


def _is_alpaca_prompt(row: Row, tokenizer: Any, example: dict[str, Any]) -> bool:
    """Whether a row that has two forms was encoded as prompt and completion."""
    if row.prompt is None:
        return False
    shown = tokenizer.decode(example["input_ids"], clean_up_tokenization_spaces=False)
    return row.prompt.strip()[:200] in shown


def _said(row: Row, ids: list[int], tokenizer: Any, is_cut: bool) -> Iterator[tuple[str, int, int]]:
    """Stretches of tokens, each with the role whose message they are of, or "template"."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    end_of, every = _token_ends(ids, text, tokenizer), range(len(ids))
    place = token = 0
    for message in row.messages or []:
        content = str(message.get("content") or "").strip()
        found = text.find(content, place) if content else -1
        if found < 0:
            # Cut off, or written otherwise by the template.
            found = _cut_off(content, text, place) if is_cut else -1
            if found < 0:
                continue
        place = min(found + len(content), len(text))
        # A token that reaches into what is said, or out of it, is part of it.
        first, last = bisect_right(every, found, key=end_of), bisect_left(every, place, key=end_of) + 1
        if first > token:
            yield TEMPLATE, token, first
        yield message["role"], max(first, token), last
        token = max(token, last)
    if token < len(ids):
        yield TEMPLATE, token, len(ids)


def _cut_off(content: str, text: str, place: int) -> int:
    """Where a content begins that the end of the text cuts off; -1 where none does."""
    longest = min(len(content) - 1, len(text) - place)
    kept = next((count for count in range(longest, 0, -1) if text.endswith(content[:count])), 0)
    return len(text) - kept if kept else -1


def _token_ends(ids: list[int], text: str, tokenizer: Any) -> Callable[[int], int]:
    """Tells at which place of the decoded text a token ends."""
    if getattr(tokenizer, "is_fast", False):
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if list(again["input_ids"]) == ids:
            return [end for _, end in again["offset_mapping"]].__getitem__

    def end_of(token: int) -> int:
        return len(tokenizer.decode(ids[: token + 1], clean_up_tokenization_spaces=False))

    return end_of


def ends(encoded: Encoded, tokenizer: Any) -> dict[str, Any]:
    """What answers end with: a model stops where it has learned to, and a server where it is told to.

    Returns:
        ``tokens``: for each special token that is the last with loss of a row, how many rows; ``without``: rows whose
        last token with loss is no special token, so that nothing teaches the model to stop (rows that were cut among
        them); ``end_of_text``: the tokenizer's end-of-text token, at which generation stops.
    """
    special = special_ids(tokenizer)
    last = [next(token for token in reversed(example["labels"]) if token != NO_LOSS) for example in encoded.examples]
    counts = Counter(tokenizer.decode([token]) for token in last if token in special)
    return {
        "tokens": dict(counts.most_common()),
        "without": sum(token not in special for token in last),
        "end_of_text": tokenizer.eos_token,
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
