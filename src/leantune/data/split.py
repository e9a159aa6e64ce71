"""Rows held out for evaluation by a hash of what they ask.

A row's side depends on its own question alone: appending or reordering rows moves none, and rows that ask the same are
never on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from leantune.core.errors import DataError, describe
from leantune.data.row import Row

_BYTES = 8


def is_held_out(row: Row, share: float) -> bool:
    """Whether a row is one of those to evaluate on.

    The first 64 bits of the SHA-256 of :meth:`leantune.data.Row.asked` (the prompt, the conversation before its last
    answer, the text), as a fraction of one, are below the share.

    Args:
        row: the row.
        share: expected share of the questions, between 0 and 1.
    """
    digest = hashlib.sha256(row.asked().encode("utf-8")).digest()
    return int.from_bytes(digest[:_BYTES], "big") < share * 2 ** (8 * _BYTES)


def split_rows(rows: Sequence[Row], share: float, source: str = "data") -> tuple[list[Row], list[Row]]:
    """The rows to train on, and those to evaluate on, each in their order.

    Args:
        rows: all rows.
        share: expected share of the second part.
        source: the file, for the error.

    Raises:
        DataError: one part is empty.
    """
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        parts[is_held_out(row, share)].append(row)
    if not all(parts):
        got = f"eval_share {share:g} takes {len(parts[1])} of {len(rows)} rows"
        do = "change eval_share, or name a file as eval_data"
        raise DataError(describe(source, got, "rows to train on and rows to evaluate on", do))
    return parts
