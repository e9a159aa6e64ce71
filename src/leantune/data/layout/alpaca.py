"""``{"instruction": ..., "input": ..., "output": ...}``: Alpaca, with optional ``system`` and ``history``.

A tokenizer with a chat template gets it as a conversation: the instruction and, after an empty line, the input are
the user's turn, the output is the assistant's, pairs in ``history`` come before as earlier turns. A tokenizer without
one gets the text of the Stanford Alpaca prompt, and the output behind it.
"""

from __future__ import annotations

from leantune.data.layout import (
    Layout,
    check_references,
    check_text,
    extra_of,
    list_of,
    optional_text,
    pick,
    register,
    text_of,
)
from leantune.data.problem import Problems
from leantune.data.reader import Record
from leantune.data.row import Message, Row

_INTRODUCTION = "Below is an instruction that describes a task"
_WITH_INPUT = f"{_INTRODUCTION}, paired with an input that provides further context. "
_REQUEST = "Write a response that appropriately completes the request."
_OPTIONAL = ("input", "system", "history", "references")


def prompt_text(instruction: str, given: str = "", system: str = "") -> str:
    """The Alpaca prompt.

    Args:
        instruction: what to do.
        given: the input to do it with.
        system: stands in the place of the introduction.
    """
    introduction = system or (_WITH_INPUT if given else f"{_INTRODUCTION}. ") + _REQUEST
    middle = f"\n\n### Input:\n{given}" if given else ""
    return f"{introduction}\n\n### Instruction:\n{instruction}{middle}\n\n### Response:\n"


def _history(record: Record, problems: Problems) -> list[Message] | None:
    """The pairs of earlier turns as messages; None with the problem noted."""
    pairs = list_of(record, "history", problems, "a list of [question, answer] pairs")
    if pairs is None:
        return None
    messages: list[Message] = []
    for index, pair in enumerate(pairs):
        name = f"{record.name_of('history')}[{index}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            problems.add(record.where, f"{name} is no pair", "[question, answer]", "mend or delete the row")
            return None
        texts = [check_text(text, record.where, f"{name}[{i}]", problems) for i, text in enumerate(pair)]
        if None in texts:
            return None
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
    return messages


def parse(record: Record, problems: Problems) -> Row | None:
    """A row that is a conversation and, where it has no earlier turns, a prompt and completion too."""
    instruction, output = text_of(record, "instruction", problems), text_of(record, "output", problems)
    given, system = optional_text(record, "input", problems), optional_text(record, "system", problems)
    history, references = _history(record, problems), check_references(record, problems)
    if instruction is None or output is None or given is None or system is None:
        return None
    if history is None or references is None:
        return None
    asked = f"{instruction}\n\n{given}" if given.strip() else instruction
    messages: list[Message] = [{"role": "system", "content": system}] if system.strip() else []
    messages += [*history, {"role": "user", "content": asked}, {"role": "assistant", "content": output}]
    return Row(
        where=record.where,
        messages=messages,
        prompt=None if history else prompt_text(instruction, given.strip() and given, system.strip() and system),
        completion=None if history else output,
        references=references,
        extra=extra_of(record, ("instruction", "output", *_OPTIONAL)),
    )


def _find(columns: frozenset[str]) -> dict[str, str] | None:
    found = pick(columns, {"instruction": "instruction", "output": "output"}, optional=_OPTIONAL)
    if found is not None:
        return found
    answered = {"instruction": "instruction", "output": "response"}
    # Without something to work on, instruction and response are a plain prompt and completion.
    return pick(columns, {**answered, "input": "input"}, {**answered, "input": "context"}, optional=_OPTIONAL)


register(
    Layout(
        name="alpaca",
        rank=30,
        columns="'instruction' and 'output'",
        find=_find,
        parse=parse,
        roles=("instruction", "output", *_OPTIONAL),
        needed=("instruction", "output"),
        aliases={
            "instruction": ("prompt", "question", "query"),
            "output": ("response", "completion", "answer"),
            "input": ("context",),
            "system": ("system_prompt",),
        },
        hint="loss on the output; in the tokenizer's chat template, or as the Alpaca prompt where there is none",
    )
)
