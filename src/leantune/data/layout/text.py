"""``{"text": ...}``: a text to learn as a whole, with loss on every token."""

from __future__ import annotations

from leantune.data.layout import Layout, Roles, extra_of, register, text_of
from leantune.data.problem import Problems
from leantune.data.reader import Record
from leantune.data.row import Row


def parse(record: Record, problems: Problems) -> Row | None:
    """A row with a text and nothing asked."""
    text = text_of(record, "text", problems)
    return None if text is None else Row(where=record.where, text=text, extra=extra_of(record, ("text",)))


def _find(columns: frozenset[str]) -> Roles | None:
    # Beside half a prompt and completion, it is likelier that the other half is missing.
    return {"text": "text"} if "text" in columns and not {"prompt", "completion"} & columns else None


register(
    Layout(
        name="text",
        rank=60,
        columns="'text'",
        find=_find,
        parse=parse,
        roles=("text",),
        needed=("text",),
        aliases={"text": ("content", "sentence", "document")},
        hint="loss on every token",
    )
)
