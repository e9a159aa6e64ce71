"""Layouts of rows: what the columns of a record mean. One file each, found by the columns.

A new layout is a new module in this folder that ends in ``register(Layout(...))``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from leantune.core.errors import DataError, describe, did_you_mean
from leantune.data.problem import Problems
from leantune.data.reader import Record
from leantune.data.row import Row


@dataclass(frozen=True)
class Layout:
    """One layout of rows.

    Attributes:
        name: the name to ask for it by.
        columns: the columns it needs, as they are spelled in an error.
        matches: whether these column names are of this layout.
        parse: a row, or None with what is wrong noted in ``problems``.
    """

    name: str
    columns: str
    matches: Callable[[frozenset[str]], bool]
    parse: Callable[[Record, Problems], Row | None]


_LAYOUTS: dict[str, Layout] = {}


def register(layout: Layout) -> None:
    """Make a layout known under its name."""
    _LAYOUTS[layout.name] = layout


def _load() -> dict[str, Layout]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _LAYOUTS


def names() -> list[str]:
    """Names of the known layouts."""
    return sorted(_load())


def wanted() -> str:
    """The columns of every layout, for an error text."""
    return ", or ".join(layout.columns for _, layout in sorted(_load().items(), reverse=True))


def get(name: str, where: str) -> Layout:
    """The layout of that name.

    Args:
        name: as in :func:`names`.
        where: the file it was asked for, for the error.

    Raises:
        DataError: there is none.
    """
    layouts = _load()
    if name not in layouts:
        raise DataError(describe(where, f"format '{name}'", "a known format", did_you_mean(name, layouts)))
    return layouts[name]


def detect(columns: Iterable[str]) -> Layout | None:
    """The one layout whose columns these are; None when none or several fit."""
    found = [layout for layout in _load().values() if layout.matches(frozenset(columns))]
    return found[0] if len(found) == 1 else None


def text_of(record: Record, column: str, problems: Problems, *, blank: bool = False) -> str | None:
    """A column that must be text.

    Args:
        record: the record.
        column: the column's name.
        problems: takes note when the column is missing, null, no string, blank or no valid Unicode.
        blank: whether white space alone, or nothing, will do.

    Returns:
        The text, or None when a problem was noted.
    """
    if column not in record.columns:
        present = ", ".join(sorted(record.columns)) or "no column at all"
        problems.add(record.where, f"no '{column}' (it has {present})", f"text in '{column}'", "add it")
        return None
    return check_text(record.columns[column], record.where, column, problems, blank=blank)


def check_text(value: Any, where: str, name: str, problems: Problems, *, blank: bool = False) -> str | None:
    """The value when it is good text; else None, with the problem noted. Arguments as of :func:`text_of`."""
    if not isinstance(value, str):
        got = "null" if value is None else f"{type(value).__name__} {_short(value)}"
        problems.add(where, f"'{name}' is {got}", "text", "write it as a string, or delete the row")
        return None
    if not blank and not value.strip():
        problems.add(where, f"'{name}' is empty", "some text", "fill it in, or delete the row")
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        problems.add(where, f"'{name}' holds half a surrogate pair", "valid Unicode", "write the character whole")
        return None
    return value


def check_references(record: Record, problems: Problems) -> list[str] | None:
    """The optional ``references`` column: a list of texts (absent or null: none); None when a problem was noted."""
    value = record.columns.get("references")
    if value is None:
        return []
    if not isinstance(value, list):
        problems.add(
            record.where,
            f"'references' is {type(value).__name__} {_short(value)}",
            "a list of texts",
            "put it in a list",
        )
        return None
    texts = [check_text(item, record.where, f"references[{i}]", problems) for i, item in enumerate(value)]
    good = [text for text in texts if text is not None]
    return good if len(good) == len(texts) else None


def extra_of(record: Record, used: Iterable[str]) -> dict[str, Any]:
    """The columns that a layout does not use."""
    known = set(used)
    return {name: value for name, value in record.columns.items() if name not in known}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
