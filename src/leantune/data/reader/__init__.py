"""Readers of file types: one file each, found by its suffix.

A reader turns a file into records (a place and a dictionary of columns) and knows nothing of what the columns mean.
A new one is a new module in this folder that ends in ``register(Reader(...))``.
"""

from __future__ import annotations

import gzip
import importlib
import pkgutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from leantune.core.errors import DataError, describe, did_you_mean
from leantune.data.problem import Problems

_COMPRESSED = ".gz"


@dataclass(frozen=True)
class Record:
    """One record of a file.

    Attributes:
        where: the place it stands at: file and line, or file and row.
        columns: its columns by name.
        is_text: every column is text because the file knows nothing else (csv): numbers and lists are spelled out.
        spelled: how the file names a column that was renamed to what it means, for errors.
    """

    where: str
    columns: dict[str, Any]
    is_text: bool = False
    spelled: dict[str, str] | None = None

    def name_of(self, column: str) -> str:
        """A column's name as the file spells it."""
        return (self.spelled or {}).get(column, column)


@dataclass(frozen=True)
class Reader:
    """One file type.

    Attributes:
        name: the name to ask for it by, e.g. ``"jsonl"``.
        suffixes: lower-case file suffixes, with the dot.
        read: yields the records of a file; records that cannot be read are noted in ``problems`` instead.
        compressed: whether ``read`` takes gzipped files too (it opens them with :func:`opened`).
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Path, Problems], Iterator[Record]]
    compressed: bool = False


_READERS: dict[str, Reader] = {}


def register(reader: Reader) -> None:
    """Make a reader known under its name and suffixes."""
    _READERS[reader.name] = reader


def _load() -> dict[str, Reader]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _READERS


def names() -> list[str]:
    """Names of the known file types."""
    return sorted(_load())


def suffixes() -> dict[str, Reader]:
    """The readers by suffix, ``.jsonl.gz`` and its like included."""
    found = {suffix: reader for reader in _load().values() for suffix in reader.suffixes}
    return found | {suffix + _COMPRESSED: reader for suffix, reader in found.items() if reader.compressed}


def suffix_of(path: Path) -> str:
    """The suffix that tells the file type: lower case, ``.gz`` with the one before it."""
    ends = [suffix.lower() for suffix in path.suffixes]
    return "".join(ends[-2:]) if ends[-1:] == [_COMPRESSED] else "".join(ends[-1:])


def find(path: Path, name: str | None = None) -> Reader:
    """The reader for a file.

    Args:
        path: the file; its suffix decides when ``name`` is not given.
        name: a file type that overrides the suffix.

    Raises:
        DataError: no reader has that name or suffix.
    """
    readers = _load()
    if name is not None:
        if name not in readers:
            raise DataError(
                describe(str(path), f"file type '{name}'", "a known file type", did_you_mean(name, readers))
            )
        return readers[name]
    by_suffix = suffixes()
    suffix = suffix_of(path)
    if suffix in by_suffix:
        return by_suffix[suffix]
    got = f"suffix '{suffix}'" if suffix else "no suffix"
    plain = sorted(each for each in by_suffix if not each.endswith(_COMPRESSED))
    raise DataError(describe(str(path), got, "a data file ending in " + " or ".join(plain), _advice(suffix, plain)))


def _advice(suffix: str, known: list[str]) -> str:
    hint = did_you_mean(suffix, known) if suffix else ""
    convert = "convert or rename it"
    return f"{hint} else {convert}" if hint.startswith("did you mean") else convert


def opened(path: Path) -> BinaryIO:
    """A file opened for its bytes, unpacked when its name ends in ``.gz``."""
    if path.suffix.lower() == _COMPRESSED:
        return cast(BinaryIO, gzip.open(path, "rb"))
    return open(path, "rb")


def lines_of(path: Path, problems: Problems) -> Iterator[tuple[int, str, bool]]:
    """The lines of a UTF-8 file, each with its line break; lines end at ``\\n`` alone.

    Args:
        path: the file; a byte order mark at its beginning is dropped.
        problems: takes note of lines that are not UTF-8, which come with replacement characters.

    Yields:
        The line's number, its text, and whether it was UTF-8.

    Raises:
        DataError: a gzipped file is damaged.
    """
    number = 0
    try:
        with opened(path) as file:
            for number, raw in enumerate(file, start=1):
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                try:
                    yield number, raw.decode(encoding), True
                except UnicodeDecodeError as error:
                    problems.add(
                        f"{path}:{number}",
                        f"byte 0x{raw[error.start]:02x} at column {error.start + 1} is not UTF-8",
                        "UTF-8 text",
                        "save the file as UTF-8",
                    )
                    yield number, raw.decode(encoding, errors="replace"), False
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        got = f"not readable as gzip after line {number} ({' '.join(str(error).split())})"
        raise DataError(describe(str(path), got, "a whole gzip file", "copy or write it again")) from error
