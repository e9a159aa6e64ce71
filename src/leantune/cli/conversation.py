"""What a chat remembers: the turns, the settings, how a question becomes a prompt, and how it is saved."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from leantune.core import atomic
from leantune.core.errors import ConfigError, DataError, describe, did_you_mean


@dataclass
class Settings:
    """How answers are written; changed by `/set name=value`.

    Attributes:
        max_new_tokens: most new tokens of an answer.
        temperature: 0 takes the likeliest token each time.
        top_p: draw from this much probability.
        seed: of the draws; each answer of a conversation draws anew from it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {"max_new_tokens": (1, 10**6), "temperature": (0, 100), "top_p": (1e-9, 1), "seed": (0, 2**63 - 1)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(describe(name, f"{value:g}", f"{low:g} to {high:g}", f"/set {name}=VALUE"))

    def changed(self, words: str) -> Settings:
        """A copy with ``name=value`` settings on top, all or none.

        Raises:
            ConfigError: a name is unknown, or a value is no number in its range.
        """
        kinds = {"max_new_tokens": int, "temperature": float, "top_p": float, "seed": int}
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        for word in words.split():
            name, equals, text = word.partition("=")
            if not equals or name not in kinds:
                raise ConfigError(describe(f"/set {word}", "unknown", did_you_mean(name, kinds), "/set name=value"))
            try:
                values[name] = kinds[name](text)
            except ValueError as error:
                wanted = "a whole number" if kinds[name] is int else "a number"
                raise ConfigError(describe(f"/set {name}", f"'{text}'", wanted, f"/set {name}=VALUE")) from error
        return Settings(**values)

    def __str__(self) -> str:
        return " ".join(f"{each.name}={getattr(self, each.name):g}" for each in fields(self))


@dataclass
class Conversation:
    """Questions and answers so far.

    Attributes:
        tokenizer: of the model.
        is_chat: questions go through the chat template, with all turns before them; otherwise each question is a prompt
            of its own, which the model continues.
        template: Jinja chat template in the place of the tokenizer's.
        system: the system message; empty for none.
        turns: question and answer, in order.
    """

    tokenizer: Any
    is_chat: bool
    template: str | None = None
    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)

    def messages(self, turns: list[tuple[str, str]]) -> list[dict[str, str]]:
        """The turns as an OpenAI-style conversation."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in turns:
            found += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return found

    def prompt(self, question: str, *, before: int | None = None) -> list[int]:
        """Token ids for a question.

        Args:
            question: what was typed.
            before: how many turns come before it; None: all.

        Raises:
            DataError: the chat template refuses the conversation, or nothing was asked.
        """
        from leantune.data import Row, prompt_ids, text_ids

        if not self.is_chat:
            ids = text_ids(question, self.tokenizer)
            if not ids:
                raise DataError(describe("prompt", "no token", "some text", "type one"))
            return ids
        turns = [*self.turns[:before], (question, "")]
        return prompt_ids(Row(where="chat", messages=self.messages(turns)), self.tokenizer, template=self.template)

    def save(self, path: Path) -> int:
        """Add the conversation to a jsonl file, as rows that training takes; returns how many.

        A chat is one row of messages; without a template each turn is a row of prompt and completion.
        """
        if not self.turns:
            raise DataError(describe("/save", "nothing was said yet", "at least one answer", "ask something"))
        rows: list[dict[str, Any]] = [{"prompt": question, "completion": answer} for question, answer in self.turns]
        if self.is_chat:
            rows = [{"messages": self.messages(self.turns)}]
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if before and not before.endswith("\n"):
            before += "\n"
        atomic.write_text(path, before + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return len(rows)
