"""``{"messages": [{"role": ..., "content": ...}, ...]}``: OpenAI chat, with an optional ``tools`` column."""

from __future__ import annotations

from typing import Any

from leantune.core.errors import did_you_mean
from leantune.data.layout import Layout, check_references, check_text, extra_of, register
from leantune.data.problem import Problems
from leantune.data.reader import Record
from leantune.data.row import Message, Row

_ROLES = ("assistant", "developer", "system", "tool", "user")


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


def _message(value: Any, where: str, name: str, problems: Problems) -> Message | None:
    if not isinstance(value, dict):
        problems.add(where, f"{name} is {type(value).__name__}", "an object with 'role' and 'content'", "mend the row")
        return None
    # Parquet spells an absent key as null.
    message = {key: item for key, item in value.items() if item is not None}
    role = message.get("role")
    if role not in _ROLES:
        got = f"{name} has role '{role}'" if role is not None else f"{name} has no 'role'"
        hint = did_you_mean(str(role), _ROLES) if role is not None else "add it"
        problems.add(where, got, "one of " + ", ".join(_ROLES), hint)
        return None
    if "content" not in message and message.get("tool_calls"):
        return {**message, "content": ""}
    content = _content(message.get("content"), where, f"{name}.content", problems)
    return None if content is None else {**message, "content": content}


def parse(record: Record, problems: Problems) -> Row | None:
    """A row with at least one assistant turn; messages as plain dictionaries with text contents."""
    value = record.columns.get("messages")
    if not isinstance(value, list) or not value:
        if "messages" not in record.columns:
            got = "no 'messages'"
        else:
            got = "'messages' is empty" if value == [] else f"'messages' is {type(value).__name__}"
        problems.add(record.where, got, "a list of messages", "mend or delete the row")
        return None
    checked = [_message(item, record.where, f"messages[{i}]", problems) for i, item in enumerate(value)]
    references = check_references(record, problems)
    messages = [message for message in checked if message is not None]
    if len(messages) < len(checked) or references is None:
        return None
    if not any(message["role"] == "assistant" for message in messages):
        problems.add(record.where, "no assistant turn", "at least one, to learn from", "add it, or delete the row")
        return None
    extra = extra_of(record, ("messages", "references"))
    return Row(where=record.where, messages=messages, references=references, extra=extra)


register(
    Layout(
        name="messages",
        columns="'messages'",
        matches=lambda columns: "messages" in columns,
        parse=parse,
    )
)
