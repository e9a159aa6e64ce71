"""Readers of file types: one file each, found by its suffix.

A reader turns a file into records (a place and a dictionary of columns) and knows nothing of what the columns mean.
A new one is a new module in this folder that ends in ``register(Reader(...))``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leantune.core.errors import DataError, describe, did_you_mean
from leantune.data.problem import Problems


@dataclass(frozen=True)
class Record:
    """One record of a file: the place it stands at, and its columns."""

    where: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class Reader:
    """One file type.

    Attributes:
        name: the name to ask for it by, e.g. ``"jsonl"``.
        suffixes: lower-case file suffixes, with the dot.
        read: yields the records of a file; records that cannot be read are noted in ``problems`` instead.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Path, Problems], Iterator[Record]]


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
    by_suffix = {suffix: reader for reader in readers.values() for suffix in reader.suffixes}
    suffix = path.suffix.lower()
    if suffix in by_suffix:
        return by_suffix[suffix]
    got = f"suffix '{suffix}'" if suffix else "no suffix"
    raise DataError(
        describe(str(path), got, "a data file ending in " + " or ".join(sorted(by_suffix)), _advice(suffix, by_suffix))
    )


def _advice(suffix: str, by_suffix: dict[str, Reader]) -> str:
    hint = did_you_mean(suffix, by_suffix) if suffix else ""
    convert = "convert or rename it"
    return f"{hint} else {convert}" if hint.startswith("did you mean") else convert
