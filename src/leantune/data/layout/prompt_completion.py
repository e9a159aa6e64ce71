"""``{"prompt": ..., "completion": ..., "references": [...]}``: what the model is given, and what it should say.

Both may be lists of messages (as TRL writes conversations): then the row is a conversation, with loss on the
completion's turns alone.
"""

from __future__ import annotations

from leantune.data.layout import Layout, check_references, extra_of, pick, register, text_of
from leantune.data.layout.messages import conversation, tools_of
from leantune.data.problem import Problems
from leantune.data.reader import Record
from leantune.data.row import Message, Row

# What a prompt and its completion are called, the likeliest first.
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("input", "output"),
    ("instruction", "response"),
    ("query", "response"),
)


def _conversation(record: Record, problems: Problems) -> Row | None:
    prompt, completion = list(record.columns["prompt"]), list(record.columns["completion"])
    messages = conversation(record, "prompt", [*prompt, *completion], problems)
    references, tools = check_references(record, problems), tools_of(record, problems)
    if messages is None or references is None or tools is None:
        return None

    def unlearned(message: Message) -> Message:
        return {**message, "weight": 0} if message["role"] == "assistant" else message

    messages = [*map(unlearned, messages[: len(prompt)]), *messages[len(prompt) :]]
    extra = extra_of(record, ("prompt", "completion", "references", "tools")) | tools
    return Row(where=record.where, messages=messages, references=references, extra=extra)


def parse(record: Record, problems: Problems) -> Row | None:
    """A row; the prompt may be empty (plain text to continue from nothing), the completion may not."""
    if isinstance(record.columns.get("prompt"), list) and isinstance(record.columns.get("completion"), list):
        return _conversation(record, problems)
    prompt = text_of(record, "prompt", problems, blank=True)
    completion = text_of(record, "completion", problems)
    references = check_references(record, problems)
    if prompt is None or completion is None or references is None:
        return None
    extra = extra_of(record, ("prompt", "completion", "references"))
    return Row(where=record.where, prompt=prompt, completion=completion, references=references, extra=extra)


register(
    Layout(
        name="prompt-completion",
        rank=40,
        columns="'prompt' and 'completion'",
        find=lambda columns: pick(
            columns, *({"prompt": asked, "completion": said} for asked, said in PAIRS), optional=("references", "tools")
        ),
        parse=parse,
        roles=("prompt", "completion", "references", "tools"),
        needed=("prompt", "completion"),
        aliases={
            "prompt": ("question", "input", "instruction", "query"),
            "completion": ("response", "answer", "output"),
        },
        hint="loss on the completion",
    )
)
