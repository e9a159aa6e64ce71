"""Layouts of rows: what the columns of a record mean. One file each, found by the columns.

A layout names the columns it reads (its roles) and, for each, the other names it is known by. A record's columns are
renamed to the roles before it is parsed; errors name them as the file does. Where several layouts fit, the one of the
lowest rank is taken and the others are reported.

A new layout is a new module in this folder that ends in ``register(Layout(...))``.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from leantune.core.errors import DataError, describe, did_you_mean
from leantune.data.problem import Problems
from leantune.data.reader import Record
from leantune.data.row import Row

Roles = dict[str, str]


@dataclass(frozen=True)
class Layout:
    """One layout of rows.

    Attributes:
        name: the name to ask for it by.
        rank: place in the order of detection; where several layouts fit, the lowest is taken.
        columns: the columns it needs, as they are spelled in an error.
        find: which column has which role, as ``{role: column}``, or None where these column names are of no such
            layout.
        parse: a row, or None with what is wrong noted in ``problems``. It sees the columns under their roles' names.
        roles: every role, the needed ones first.
        needed: the roles without which there is no row.
        aliases: other names of a role, the likeliest first, for a layout that was asked for by name.
        hint: what the layout trains on, for a reader.
    """

    name: str
    rank: int
    columns: str
    find: Callable[[frozenset[str]], Roles | None]
    parse: Callable[[Record, Problems], Row | None]
    roles: tuple[str, ...]
    needed: tuple[str, ...]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hint: str = ""

    def guess(self, columns: Iterable[str]) -> Roles:
        """The roles these columns have in this layout, as far as their names tell; for one that was asked for."""
        lowered = _lowered(columns)
        found = self.find(frozenset(lowered)) or {}
        for role in self.roles if not found else ():
            names = (role, *self.aliases.get(role, ()))
            free = [name for name in names if name in lowered and name not in found.values()]
            if free:
                found[role] = free[0]
        return {role: lowered[name] for role, name in found.items()}


def _lowered(columns: Iterable[str]) -> dict[str, str]:
    """Columns by their names in lower case; where two differ in case alone, the one that is all lower case."""
    return {column.strip().lower(): column for column in sorted(columns, key=lambda name: (name.islower(), name))}


_LAYOUTS: dict[str, Layout] = {}


def register(layout: Layout) -> None:
    """Make a layout known under its name."""
    _LAYOUTS[layout.name] = layout


def _load() -> list[Layout]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(_LAYOUTS.values(), key=lambda layout: layout.rank)


def names() -> list[str]:
    """Names of the known layouts, in the order of detection."""
    return [layout.name for layout in _load()]


def wanted() -> str:
    """The columns of every layout, for an error text."""
    return ", or ".join(layout.columns for layout in _load())


def get(name: str, where: str) -> Layout:
    """The layout of that name.

    Args:
        name: as in :func:`names`.
        where: the file it was asked for, for the error.

    Raises:
        DataError: there is none.
    """
    _load()
    if name not in _LAYOUTS:
        raise DataError(describe(where, f"format '{name}'", "a known format", did_you_mean(name, _LAYOUTS)))
    return _LAYOUTS[name]


def detect(columns: Iterable[str]) -> list[tuple[Layout, Roles]]:
    """The layouts that these column names fit, in the order of detection, each with the roles it gives them.

    Names are compared in lower case.
    """
    lowered = _lowered(columns)
    fits = [(layout, layout.find(frozenset(lowered))) for layout in _load()]
    found = [(layout, roles) for layout, roles in fits if roles is not None]
    if not found and {"prompt", "completion"} & set(lowered):
        # One half of the commonest layout: parsing it says what is missing.
        found = [(_LAYOUTS["prompt-completion"], _LAYOUTS["prompt-completion"].guess(lowered))]
    return [(layout, {role: lowered[name] for role, name in roles.items()}) for layout, roles in found]


def pick(columns: frozenset[str], *choices: Mapping[str, str], optional: Iterable[str] = ()) -> Roles | None:
    """The first choice of which every column is there, with the optional columns that are there too.

    Args:
        columns: the columns of the file.
        choices: ``{role: column}``.
        optional: roles that a column of the same name has.
    """
    for choice in choices:
        if set(choice.values()) <= columns:
            free = columns - set(choice.values())
            return {**choice, **{role: role for role in optional if role in free and role not in choice}}
    return None


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
    name = record.name_of(column)
    if column not in record.columns:
        present = ", ".join(sorted(record.name_of(each) for each in record.columns)) or "no column at all"
        problems.add(record.where, f"no '{name}' (it has {present})", f"text in '{name}'", "add it")
        return None
    return check_text(record.columns[column], record.where, name, problems, blank=blank)


def optional_text(record: Record, column: str, problems: Problems) -> str | None:
    """A column that may be missing, null or blank (then ``""``); None when a problem was noted."""
    value = record.columns.get(column)
    if value is None or value == "":
        return ""
    return check_text(value, record.where, record.name_of(column), problems, blank=True)


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


def list_of(record: Record, column: str, problems: Problems, wanted: str) -> list[Any] | None:
    """A column that must be a list, if it is there.

    Args:
        record: the record; one of a table that knows text alone may spell the list as JSON.
        column: the column's name.
        problems: takes note when it is something else.
        wanted: what the list holds, for the error.

    Returns:
        The list, empty where the column is absent, null or (in such a table) blank; None when a problem was noted.
    """
    value = record.columns.get(column)
    if value is None or (record.is_text and not str(value).strip()):
        return []
    if isinstance(value, str) and (record.is_text or column == "tools"):
        try:
            value = json.loads(value)
        except ValueError:
            got = f"'{record.name_of(column)}' is no JSON list ({_short(value)})"
            problems.add(record.where, got, wanted, "write it as JSON: [...]")
            return None
    if not isinstance(value, list):
        got = f"'{record.name_of(column)}' is {type(value).__name__} {_short(value)}"
        problems.add(record.where, got, wanted, "put it in a list")
        return None
    return value


def check_references(record: Record, problems: Problems) -> list[str] | None:
    """The optional ``references`` column: a list of texts (absent or null: none); None when a problem was noted."""
    value = list_of(record, "references", problems, "a list of texts")
    if value is None:
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
