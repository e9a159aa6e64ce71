"""``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}``: ShareGPT and its kin.

The speaker stands in ``from`` or ``role``, the text in ``value``, ``content`` or ``text``; a ``system`` column comes
before the first turn.
"""

from __future__ import annotations

from typing import Any

from leantune.core.errors import did_you_mean
from leantune.data.layout import Layout, check_references, extra_of, optional_text, pick, register
from leantune.data.layout.messages import conversation, items_of, tools_of
from leantune.data.problem import Problems
from leantune.data.reader import Record
from leantune.data.row import Row

SPEAKERS = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
_SPEAKER_KEYS, _TEXT_KEYS = ("from", "role"), ("value", "content", "text")


def _message(value: Any, where: str, name: str, problems: Problems) -> dict[str, Any] | None:
    """A turn as a message; what is no object is left for the check of messages to name."""
    if not isinstance(value, dict):
        problems.add(where, f"{name} is {type(value).__name__}", "an object with 'from' and 'value'", "mend the row")
        return None
    rest = {key: item for key, item in value.items() if item is not None}
    speaker = next((rest.pop(key) for key in _SPEAKER_KEYS if key in rest), None)
    text = next((rest.pop(key) for key in _TEXT_KEYS if key in rest), None)
    role = SPEAKERS.get(str(speaker).lower())
    if role is None:
        got = f"{name} has no 'from'" if speaker is None else f"{name} is from '{speaker}'"
        hint = "add it" if speaker is None else did_you_mean(str(speaker).lower(), SPEAKERS)
        problems.add(where, got, "a known speaker: human, gpt, system or tool", hint)
        return None
    if text is None and not rest.get("tool_calls"):
        problems.add(where, f"{name} has no 'value'", "the text of the turn", "fill it in, or delete the row")
        return None
    return {"role": role, **({} if text is None else {"content": text}), **rest}


def parse(record: Record, problems: Problems) -> Row | None:
    """A row of messages with at least one assistant turn."""
    items = items_of(record, "conversations", problems)
    system, references = optional_text(record, "system", problems), check_references(record, problems)
    tools = tools_of(record, problems)
    if items is None or system is None or references is None or tools is None:
        return None
    name = record.name_of("conversations")
    turns = [_message(item, record.where, f"{name}[{i}]", problems) for i, item in enumerate(items)]
    known = [turn for turn in turns if turn is not None]
    messages = conversation(record, "conversations", known, problems) if len(known) == len(turns) else None
    if messages is None:
        return None
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    extra = extra_of(record, ("conversations", "system", "tools", "references")) | tools
    return Row(where=record.where, messages=messages, references=references, extra=extra)


register(
    Layout(
        name="sharegpt",
        rank=20,
        columns="'conversations'",
        find=lambda columns: pick(
            columns,
            {"conversations": "conversations"},
            {"conversations": "conversation"},
            optional=("system", "tools", "references"),
        ),
        parse=parse,
        roles=("conversations", "system", "tools", "references"),
        needed=("conversations",),
        aliases={"conversations": ("conversation", "messages", "dialogue")},
        hint="loss on the assistant's turns",
    )
)
