"""Which column means what: found by the names, or said by the user as ``prompt=question,completion=answer``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from leantune.core.errors import DataError, describe, did_you_mean
from leantune.data import layout as layouts
from leantune.data.layout import Layout, Roles
from leantune.data.problem import Problems
from leantune.data.reader import Record

_FORM = "role=column,role=column"


def parse_columns(text: str | Mapping[str, str] | None) -> Roles:
    """``{role: column}`` of a text like ``prompt=question,completion=answer``; a mapping is taken as it is.

    Raises:
        DataError: a part has no ``=``, or a role or a column stands twice.
    """
    if text is None or isinstance(text, Mapping):
        return dict(text or {})
    found: Roles = {}
    for part in text.split(","):
        role, equals, column = (word.strip() for word in part.partition("="))
        if not (role and equals and column):
            raise DataError(describe(f"columns '{text}'", f"'{part.strip()}'", _FORM, "write prompt=COLUMN"))
        if role in found or column in found.values():
            twice = role if role in found else column
            raise DataError(describe(f"columns '{text}'", f"'{twice}' twice", "each role and column once", "drop one"))
        found[role] = column
    return found


@dataclass(frozen=True)
class Reading:
    """How the columns of a source are read.

    Attributes:
        layout: the layout of its rows.
        roles: the column of each role.
        unused: columns that have no role.
        others: other layouts that its columns would fit.
        asked: whether the user named the layout or columns, rather than the names of the columns deciding.
    """

    layout: Layout
    roles: Roles
    unused: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    asked: bool = False

    def renamed(self, record: Record) -> Record:
        """The record with its columns under the names of their roles."""
        moved = {role: column for role, column in self.roles.items() if role != column}
        if not moved:
            return record
        taken = set(self.roles.values())
        # A column that bears the name of a role and has another, or none, would be read as that role.
        columns = {name: value for name, value in record.columns.items() if name not in taken and name not in moved}
        columns |= {role: record.columns[column] for role, column in self.roles.items() if column in record.columns}
        return replace(record, columns=columns, spelled=self.roles)

    def text(self) -> str:
        """``alpaca (instruction, input=context, output=response)``, for a reader."""
        shown = [role if role == column else f"{role}={column}" for role, column in self.roles.items()]
        return f"{self.layout.name} ({', '.join(shown)})"

    def lacks(self, record: Record) -> bool:
        """Whether a record lacks a column that every row needs."""
        return any(self.roles.get(role, role) not in record.columns for role in self.layout.needed)


def _check_columns(given: Roles, layout: Layout | None, record: Record, source: str) -> list[str]:
    known = layout.roles if layout else sorted({role for name in layouts.names() for role in _roles_of(name)})
    problems = []
    for role, column in given.items():
        if role not in known:
            whose = f"format {layout.name}" if layout else "a format"
            where, got = f"columns '{role}={column}'", f"'{role}' is no column of {whose}"
            problems.append(describe(where, got, f"one of {', '.join(known)}", did_you_mean(role, known)))
        if column not in record.columns:
            hint = did_you_mean(column, record.columns)
            got = f"{source} has no column '{column}'"
            problems.append(describe(f"columns '{role}={column}'", got, "one of its columns", hint))
    return problems


def _roles_of(name: str) -> tuple[str, ...]:
    return layouts.get(name, "").roles


def settle(record: Record, source: str, layout: Layout | None, given: Roles, problems: Problems) -> Reading | None:
    """Decide from the first record of a source how its columns are read.

    Args:
        record: the first record.
        source: the file, for errors.
        layout: the layout the user asked for, or None.
        given: the roles the user gave columns.
        problems: takes note when no layout fits the columns.

    Raises:
        DataError: a given role or column is unknown.
    """
    wrong = _check_columns(given, layout, record, source)
    if wrong:
        raise DataError(wrong[0] if len(wrong) == 1 else "\n".join(["columns:", *(f"  - {text}" for text in wrong)]))
    columns = set(record.columns)
    # The given columns are looked for under the names of their roles, whatever else is called so.
    seen = (columns - set(given.values()) - set(given)) | set(given)
    if layout is not None:
        found, others = layout.guess(seen), []
    else:
        fits = layouts.detect(seen)
        if given:
            fits = [(each, roles) for each, roles in fits if set(given) <= set(each.roles)]
        if not fits:
            present = ", ".join(f"'{name}'" for name in sorted(columns)) or "none"
            do = "rename the columns, or say which is which (--columns prompt=COLUMN,completion=COLUMN)"
            problems.add(record.where, f"columns {present}", f"columns {layouts.wanted()}", do)
            return None
        layout, found = fits[0]
        # A layout that leaves out some of these columns and brings in no other is no choice worth telling of.
        others = [each.name for each, roles in fits[1:] if not set(roles.values()) <= set(found.values())]
    roles = {role: given.get(column, column) for role, column in found.items()} | given
    unused = tuple(sorted(columns - set(roles.values())))
    return Reading(layout, roles, unused, tuple(others), asked=bool(given))
