"""Rows that ask the same are one input with several right answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from leantune.data import Row


@dataclass
class Input:
    """One distinct input.

    Attributes:
        row: the first row that asks it.
        references: every right answer, each text once, in file order.
        rows: positions of its rows.
    """

    row: Row
    references: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def _key(row: Row) -> str:
    if row.messages is None:
        # A plain text asks nothing: each is an input of its own.
        return json.dumps(["text", row.text] if row.is_plain_text else row.prompt)
    asked = {"messages": row.messages[: row.last_assistant()], "tools": row.extra.get("tools")}
    return json.dumps(asked, sort_keys=True, default=str)


def group_references(rows: Sequence[Row]) -> list[Input]:
    """Distinct inputs in file order, each with the answers of all its rows as references.

    Args:
        rows: rows of prompt and completion, or of messages (the last assistant turn is the answer).
    """
    inputs: dict[str, Input] = {}
    for position, row in enumerate(rows):
        entry = inputs.setdefault(_key(row), Input(row))
        entry.rows.append(position)
        entry.references = list(dict.fromkeys([*entry.references, *row.answers()]))
    return list(inputs.values())
