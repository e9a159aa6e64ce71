"""From a name of data (a file, a folder, a data set of the Hub) to checked rows, and the hash of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from leantune.core.errors import DataError, describe
from leantune.data import hub
from leantune.data import layout as layouts
from leantune.data.column import Reading, parse_columns, settle
from leantune.data.location import Location, locate
from leantune.data.problem import Problems
from leantune.data.reader import Record
from leantune.data.row import Row

_HASH_CHUNK_BYTES = 1 << 20
_SHOWN_FILES = 6


class Source:
    """A source of rows, read as often as wanted, row by row.

    Args:
        name: a file, a folder, or a data set of the Hub (``owner/name``, ``owner/name/config:split``).
        format: the layout of the rows; found from the columns of the first record when not given.
        columns: which column means what, ``prompt=question,completion=answer`` or as a mapping.
        reader: the file type, when the suffix does not tell.
        split: which of a folder's files to take, where they are named after splits.

    Attributes:
        name: the name.
        location: what it stands for.
        reading: how its columns are read; None before the first record was.

    Raises:
        DataError: there is no such source, or the format is unknown.
    """

    def __init__(
        self,
        name: Path | str,
        *,
        format: str | None = None,
        columns: str | Mapping[str, str] | None = None,
        reader: str | None = None,
        split: str = "train",
    ) -> None:
        self.location: Location = locate(name, reader=reader, split=split)
        self.name = self.location.name
        self.reading: Reading | None = None
        self._layout = layouts.get(format, self.name) if format is not None else None
        self._columns = parse_columns(columns)

    def records(self, problems: Problems) -> Iterator[Record]:
        """Yield the records, file after file."""
        if self.location.hub is not None:
            yield from hub.records(self.location.hub)
            return
        reader = self.location.reader
        assert reader is not None, "a location is files with their reader, or a data set of the Hub"
        for path in self.location.files:
            yield from reader.read(path, problems)

    def rows(self, problems: Problems, limit: int | None = None) -> Iterator[Row]:
        """Yield the good rows, in order, as they are read; the bad ones are noted.

        Args:
            problems: takes note of what is wrong with the others.
            limit: read only this many records.
        """
        for record in islice(self.records(problems), limit):
            if self.reading is None:
                self.reading = settle(record, self.name, self._layout, self._columns, problems)
                if self.reading is None:
                    return
            if not self._note_other_layout(record, problems):
                row = self.reading.layout.parse(self.reading.renamed(record), problems)
                if row is not None:
                    yield row

    def _note_other_layout(self, record: Record, problems: Problems) -> bool:
        reading = self.reading
        if reading is None or not reading.lacks(record):
            return False
        other = next((layout.name for layout, _ in layouts.detect(record.columns)), reading.layout.name)
        if other == reading.layout.name or self._layout is not None:
            return False
        got = f"a row of format {other}, after rows of {reading.layout.name}"
        problems.add(record.where, got, "one format in all rows", "split the data into a file of each")
        return True

    def notes(self) -> list[str]:
        """How the source was understood, a sentence each: its files, the format, what was left."""
        found = []
        place = self.location
        if len(place.files) > 1 or place.offered:
            names = [path.name for path in place.files]
            shown = ", ".join(names[:_SHOWN_FILES]) + (", ..." if len(names) > _SHOWN_FILES else "")
            found.append(f"of the folder {self.name}: {len(names)} file{'s' * (len(names) > 1)} ({shown})")
        for split, paths in place.offered.items():
            found.append(f"left in it, {split}: " + ", ".join(path.name for path in paths[:_SHOWN_FILES]))
        if self.reading is not None:
            found.append(f"format {self.reading.text()}: {self.reading.layout.hint}")
            if self.reading.unused:
                found.append("columns without a use: " + ", ".join(self.reading.unused))
            if self.reading.others:
                found.append(
                    f"the columns also fit {', '.join(self.reading.others)}; "
                    f"--format {self.reading.others[0]} reads them so"
                )
        return found

    def facts(self) -> dict[str, Any]:
        """The same for a record, JSON-serialisable: ``files``, ``format``, ``columns``, ``unused``, ``also_fits``."""
        reading = self.reading
        return {
            "files": [path.as_posix() for path in self.location.files] or [self.name],
            "format": reading.layout.name if reading else None,
            "columns": dict(reading.roles) if reading else None,
            "unused": list(reading.unused) if reading else [],
            "also_fits": list(reading.others) if reading else [],
        }


def read_source(source: Source, *, limit: int | None = None) -> list[Row]:
    """The rows of a source, checked.

    Args:
        source: the source.
        limit: read only this many records.

    Raises:
        DataError: rows are bad, or there is none. All bad rows are named in one error.
    """
    problems = Problems(source.name)
    rows = list(source.rows(problems, limit))
    problems.raise_if_any()
    if not rows:
        raise DataError(describe(source.name, "no rows", "at least one row", "check how it was written"))
    return rows


def read_rows(
    path: Path | str,
    *,
    format: str | None = None,
    columns: str | Mapping[str, str] | None = None,
    reader: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> list[Row]:
    """Read and check the rows of a data file, a folder of them, or a data set of the Hub.

    Args:
        path: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file (the text ones also with ``.gz``), a
            folder, or ``owner/name``, ``owner/name:split``, ``owner/name/config:split``.
        format: the layout of the rows (``messages``, ``sharegpt``, ``alpaca``, ``prompt-completion``, ``image``,
            ``classification``, ``text``); found from the columns of the first record when not given, and then wanted
            of every row.
        columns: which column means what, where the names do not say: ``prompt=question,completion=answer``.
        reader: the file type (``jsonl``, ``csv``, ...), when the suffix does not tell.
        split: which of a folder's files to take, where they are named after splits.
        limit: read only this many records.

    Returns:
        The rows in file order.

    Raises:
        DataError: the source cannot be read, is empty, or rows are bad. All bad rows are named in one error.
        DependencyError: the file type needs a package that is not installed.
    """
    return read_source(Source(path, format=format, columns=columns, reader=reader, split=split), limit=limit)


def iter_rows(
    path: Path | str,
    *,
    format: str | None = None,
    columns: str | Mapping[str, str] | None = None,
    reader: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> Iterator[Row]:
    """Yield the rows one by one, holding none: for sources larger than memory. Arguments as of :func:`read_rows`.

    Raises:
        DataError: at the first bad row.
    """
    source = Source(path, format=format, columns=columns, reader=reader, split=split)
    problems = Problems(source.name)
    for row in source.rows(problems, limit):
        problems.raise_if_any()
        yield row
    problems.raise_if_any()


def data_hash(path: Path | str, *, split: str = "train") -> str:
    """``sha256:<hex>`` of a file's bytes; of a folder, of its files' paths in it and bytes; else of the rows.

    Args:
        path: as of :func:`read_rows`.
        split: which of a folder's files to take, where they are named after splits.
    """
    if Path(path).is_file():
        return f"sha256:{_hash_of_file(Path(path)).hexdigest()}"
    location = locate(path, split=split)
    digest = hashlib.sha256()
    for file in location.files:
        # Of images the folder is the class.
        name = file.relative_to(location.name).as_posix()
        digest.update(f"{name}\n{_hash_of_file(file).hexdigest()}\n".encode())
    if location.hub is not None:
        for record in hub.records(location.hub):
            digest.update(json.dumps(record.columns, sort_keys=True, default=str).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"


def _hash_of_file(path: Path) -> Any:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest
