"""``{"messages": [{"role": ..., "content": ...}, ...]}``: OpenAI chat, with an optional ``tools`` column."""

from __future__ import annotations

from typing import Any

from leantune.core.errors import did_you_mean
from leantune.data.layout import Layout, check_references, check_text, extra_of, list_of, pick, register
from leantune.data.problem import Problems
from leantune.data.reader import Record
from leantune.data.row import Message, Row

ROLES = ("assistant", "developer", "system", "tool", "user")
_WANTED = "a list of messages"


def _content(value: Any, where: str, name: str, problems: Problems) -> str | None:
    """Text, or OpenAI's list of parts when every part is text."""
    if isinstance(value, list):
        parts: list[str] = []
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                problems.add(where, f"{name} has a part of type '{kind}'", "parts of text alone", "delete the row")
                return None
            if not isinstance(part.get("text"), str):
                problems.add(where, f"{name} has a text part without text", "text", "fill it in, or delete the row")
                return None
            parts.append(part["text"])
        value = "".join(parts)
    return check_text(value, where, name, problems, blank=True)


def check_message(value: Any, where: str, name: str, problems: Problems) -> Message | None:
    """A message with a known role and text as its content; None with the problem noted.

    Args:
        value: what stands in the file.
        where: the row.
        name: the message's place in it, as ``messages[2]``.
        problems: takes note of what is wrong.
    """
    if not isinstance(value, dict):
        problems.add(where, f"{name} is {type(value).__name__}", "an object with 'role' and 'content'", "mend the row")
        return None
    # Parquet spells an absent key as null.
    message = {key: item for key, item in value.items() if item is not None}
    role = message.get("role")
    if role not in ROLES:
        got = f"{name} has role '{role}'" if role is not None else f"{name} has no 'role'"
        hint = did_you_mean(str(role), ROLES) if role is not None else "add it"
        problems.add(where, got, "one of " + ", ".join(ROLES), hint)
        return None
    if "content" not in message and message.get("tool_calls"):
        return {**message, "content": ""}
    content = _content(message.get("content"), where, f"{name}.content", problems)
    return None if content is None else {**message, "content": content}


def conversation(record: Record, column: str, items: list[Any], problems: Problems) -> list[Message] | None:
    """The checked messages of a record, with at least one assistant turn; None with the problems noted.

    Args:
        record: the record.
        column: the column they stand in, for errors.
        items: what the file has for each message.
        problems: takes note of what is wrong.
    """
    name = record.name_of(column)
    checked = [check_message(item, record.where, f"{name}[{i}]", problems) for i, item in enumerate(items)]
    messages = [message for message in checked if message is not None]
    if len(messages) < len(checked):
        return None
    if not any(message["role"] == "assistant" for message in messages):
        problems.add(record.where, "no assistant turn", "at least one, to learn from", "add it, or delete the row")
        return None
    return messages


def items_of(record: Record, column: str, problems: Problems) -> list[Any] | None:
    """The list of messages in a column, not empty; None with the problem noted."""
    name = record.name_of(column)
    value = record.columns.get(column)
    if column not in record.columns:
        problems.add(record.where, f"no '{name}'", _WANTED, "mend or delete the row")
        return None
    if not record.is_text and not isinstance(value, list):
        problems.add(record.where, f"'{name}' is {type(value).__name__}", _WANTED, "mend or delete the row")
        return None
    items = list_of(record, column, problems, _WANTED)
    if items == []:
        problems.add(record.where, f"'{name}' is empty", _WANTED, "mend or delete the row")
    return items or None


def tools_of(record: Record, problems: Problems) -> dict[str, Any] | None:
    """``{"tools": [...]}`` for a row's extra columns, nothing where there are none; None with the problem noted."""
    if record.columns.get("tools") is None:
        return {}
    tools = list_of(record, "tools", problems, "a list of tool descriptions")
    return None if tools is None else {"tools": tools}


def parse(record: Record, problems: Problems) -> Row | None:
    """A row with at least one assistant turn; messages as plain dictionaries with text contents."""
    items = items_of(record, "messages", problems)
    messages = conversation(record, "messages", items, problems) if items is not None else None
    references, tools = check_references(record, problems), tools_of(record, problems)
    if messages is None or references is None or tools is None:
        return None
    extra = extra_of(record, ("messages", "references", "tools")) | tools
    return Row(where=record.where, messages=messages, references=references, extra=extra)


register(
    Layout(
        name="messages",
        rank=10,
        columns="'messages'",
        find=lambda columns: pick(columns, {"messages": "messages"}, optional=("tools", "references")),
        parse=parse,
        roles=("messages", "tools", "references"),
        needed=("messages",),
        aliases={"messages": ("conversation", "conversations", "chat", "dialogue")},
        hint="loss on the assistant's turns",
    )
)
