"""One row of a data file, whatever file and layout it came from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = dict[str, Any]
Label = str | int | float


@dataclass(frozen=True)
class Row:
    """One row, and the place it came from.

    A row is of one kind: ``prompt`` and ``completion``, or ``messages``, or ``text`` (and ``text_pair``) with
    ``label``, or ``text`` alone. A row of instruction and output (Alpaca) has ``messages`` for a tokenizer with a chat
    template and ``prompt`` and ``completion`` for one without.

    Attributes:
        where: file and line (``train.jsonl:12``) or file and row (``train.parquet row 12``), counted from one.
        prompt: what the model is given.
        completion: what it should say.
        messages: an OpenAI-style conversation, each message with ``role`` and ``content``.
        text: the text to classify or score; without a label, a text to learn as a whole.
        text_pair: the second text of a pair task.
        label: class name, class number, or (regression) a number.
        image: a path, the bytes of an image file, or a dictionary of ``bytes`` and ``path``; unopened.
        references: further right answers beside ``completion``.
        extra: every other column of the file.
    """

    where: str
    prompt: str | None = None
    completion: str | None = None
    messages: list[Message] | None = None
    text: str | None = None
    text_pair: str | None = None
    label: Label | None = None
    image: Any = None
    references: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_plain_text(self) -> bool:
        """Whether the row is a text to learn as a whole."""
        return self.text is not None and self.label is None

    def asked(self) -> str:
        """What the row asks, as a key: rows with the same one are the same question with perhaps another answer."""
        if self.messages is not None:
            return json.dumps(self.messages[: self.last_assistant()], sort_keys=True, default=str)
        return json.dumps([self.prompt, self.text, self.text_pair, *([_shown(self.image)] if self.image else [])])

    def last_assistant(self) -> int:
        """Position in ``messages`` of the last assistant turn.

        Raises:
            ValueError: the row has no messages, or no assistant turn.
        """
        messages = self.messages or []
        for position in range(len(messages) - 1, -1, -1):
            if messages[position]["role"] == "assistant":
                return position
        raise ValueError(f"{self.where} has no assistant turn")

    def answers(self) -> list[str]:
        """The completion (or last assistant turn, or plain text) first, then the other references, each text once."""
        if self.messages is not None:
            first = self.messages[self.last_assistant()].get("content") or ""
        else:
            first = self.completion or self.text or ""
        return list(dict.fromkeys([first, *self.references]))


def _shown(image: Any) -> str:
    """What an image is told from others by: of a path its end, the same from wherever the data is named."""
    if isinstance(image, (str, Path)) and not str(image).startswith("data:"):
        return "/".join(Path(image).parts[-2:])
    return str(image)
