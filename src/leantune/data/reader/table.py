"""Comma- and tab-separated tables (csv, tsv): the first record names the columns, fields may hold line breaks."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from leantune.data.problem import Problems
from leantune.data.reader import Reader, Record, lines_of, register

_SEPARATORS = ",;\t|"
_LONGEST_FIELD = 2**31 - 1


def separator_of(header: str) -> str:
    """The separator that a first line uses most, outside of quotes; a comma when it uses none."""
    outside = "".join(header.split('"')[::2])
    counts = [outside.count(sign) for sign in _SEPARATORS]
    return _SEPARATORS[counts.index(max(counts))] if any(counts) else ","


class _Lines:
    """The lines of a file for the csv module, which does not say at which line a record began."""

    def __init__(self, path: Path, problems: Problems) -> None:
        self._lines = lines_of(path, problems)
        self._first: str | None = next((line for _, line, _ in self._lines), None)
        self.first = self._first or ""
        self.taken = 0

    def __iter__(self) -> Iterator[str]:
        if self._first is not None:
            self.taken = 1
            yield self._first
        for number, line, _ in self._lines:
            self.taken = number
            yield line


def _records(path: Path, problems: Problems, separator: str | None) -> Iterator[tuple[int, list[str]]]:
    """The line each record begins at, and its fields; blank lines are skipped."""
    lines = _Lines(path, problems)
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        # Strict: without it a quote that is never closed swallows the rest of the file in silence.
        reader = csv.reader(lines, delimiter=separator or separator_of(lines.first), strict=True)
        while True:
            start = lines.taken + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                got = f"not readable as a table ({error})"
                problems.add(
                    f"{path}:{start}", got, 'fields with "" for a quote inside quotes', "close or double the quote"
                )
                continue
            if fields:
                yield start, fields
    finally:
        csv.field_size_limit(before)


def _read(path: Path, problems: Problems, separator: str | None) -> Iterator[Record]:
    records = _records(path, problems, separator)
    line, names = next(records, (1, []))
    names = [name.strip() for name in names]
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        got = "several columns named " + ", ".join(f"'{name}'" for name in doubled)
        problems.add(f"{path}:{line}", got, "a name of its own for each column", "rename them")
        return
    for line, fields in records:
        if len(fields) != len(names):
            named = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            problems.add(
                f"{path}:{line}",
                f"{len(fields)} fields",
                f"{len(names)}, as the first line names ({named})",
                "quote a field that holds the separator, or add what is missing",
            )
            continue
        yield Record(f"{path}:{line}", dict(zip(names, fields, strict=True)), is_text=True)


def _reader_of(separator: str | None) -> Callable[[Path, Problems], Iterator[Record]]:
    def read(path: Path, problems: Problems) -> Iterator[Record]:
        return _read(path, problems, separator)

    return read


register(Reader(name="csv", suffixes=(".csv",), read=_reader_of(None), compressed=True))
register(Reader(name="tsv", suffixes=(".tsv", ".tab"), read=_reader_of("\t"), compressed=True))
