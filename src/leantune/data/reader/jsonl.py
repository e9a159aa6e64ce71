"""JSON lines: one JSON object a line, UTF-8."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leantune.data.problem import Problems
from leantune.data.reader import Reader, Record, lines_of, register

KINDS = {
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def _parse(line: str, where: str, is_torn: bool, problems: Problems) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        if is_torn:
            problems.add(
                where,
                "the last line breaks off",
                "a complete JSON object",
                "copy or write the file again, or delete that line",
            )
        else:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            problems.add(
                where, f"not JSON ({reason}{column})", "one JSON object on each line", "mend or delete the line"
            )
        return None
    if not isinstance(value, dict):
        do = "write the list's items as lines of their own" if isinstance(value, list) else "mend or delete the line"
        problems.add(
            where, KINDS[type(value)], 'one JSON object on each line, as {"prompt": ..., "completion": ...}', do
        )
        return None
    return value


def read(path: Path, problems: Problems) -> Iterator[Record]:
    """Yield one record a line; blank lines are skipped.

    Lines end at ``\\n`` alone: JSON strings may hold the other Unicode line breaks.
    """
    for number, line, is_good in lines_of(path, problems):
        if not is_good or not line.strip():
            continue
        where = f"{path}:{number}"
        # Only the last line can lack its line break, and a cut file nearly always ends inside a line.
        columns = _parse(line, where, not line.endswith("\n"), problems)
        if columns is not None:
            yield Record(where, columns)


register(Reader(name="jsonl", suffixes=(".jsonl", ".ndjson"), read=read, compressed=True))
