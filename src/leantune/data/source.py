"""From a data file to checked rows, and the hash that names its bytes."""

from __future__ import annotations

import hashlib
from itertools import islice
from pathlib import Path

from leantune.core.errors import DataError, describe, did_you_mean
from leantune.data import layout as layouts
from leantune.data import reader as readers
from leantune.data.layout import Layout
from leantune.data.problem import Problems
from leantune.data.reader import Record
from leantune.data.row import Row

_HASH_CHUNK_BYTES = 1 << 20


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(describe(str(path), "a folder", "a data file", "name a file in it"))
    if not path.exists():
        beside = [item.name for item in path.parent.iterdir() if item.is_file()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, beside)
        raise DataError(
            describe(str(path), "no such file", "a data file", hint if hint.startswith("did") else "check the path")
        )
    if path.stat().st_size == 0:
        raise DataError(describe(str(path), "an empty file (0 bytes)", "at least one row", "check how it was written"))


def _detect(record: Record, problems: Problems) -> Layout | None:
    found = layouts.detect(record.columns)
    if found is None:
        present = ", ".join(f"'{name}'" for name in sorted(record.columns)) or "none"
        problems.add(
            record.where,
            f"columns {present}",
            f"columns {layouts.wanted()}",
            "rename the columns, or name the format",
        )
    return found


def read_rows(
    path: Path | str, *, format: str | None = None, reader: str | None = None, limit: int | None = None
) -> list[Row]:
    """Read and check the rows of a data file.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file.
        format: the layout of the rows (``prompt-completion``, ``messages``, ``classification``); found from the
            columns of the first record when not given, and then wanted of every row.
        reader: the file type (``jsonl``, ``parquet``), when the suffix does not tell.
        limit: read only this many records.

    Returns:
        The rows in file order.

    Raises:
        DataError: the file cannot be read, is empty, or rows are bad. All bad rows are named in one error.
        DependencyError: the file type needs a package that is not installed.
    """
    path = Path(path)
    _check_file(path)
    source = readers.find(path, reader)
    layout = layouts.get(format, str(path)) if format is not None else None
    problems = Problems(str(path))
    rows: list[Row] = []
    for record in islice(source.read(path, problems), limit):
        layout = layout or _detect(record, problems)
        if layout is None:
            break
        row = layout.parse(record, problems)
        if row is not None:
            rows.append(row)
    problems.raise_if_any()
    if not rows:
        raise DataError(describe(str(path), "no rows", "at least one row", "check how it was written"))
    return rows


def data_hash(path: Path | str) -> str:
    """``sha256:<hex>`` of the file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"
