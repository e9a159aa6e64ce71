"""Conversations through a chat template: the text a model sees, and which of it is the assistant's.

The template comes from the tokenizer or is given as Jinja text. Where the assistant's turns stand is known in one of
two ways. A template with ``{% generation %}`` marks says so itself. For any other template the conversation is
rendered up to each assistant turn (with the generation prompt, as it will be when the model is asked) and through it;
what lies between is the turn, provided that both really are beginnings of the whole. Templates that rewrite earlier
turns (they drop old reasoning, say) fail that test and are refused: a guessed mask trains on the wrong tokens.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from leantune.core.errors import DataError, describe
from leantune.data.row import Message, Row

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Piece(NamedTuple):
    """A stretch of a row's text, and whether its tokens carry loss."""

    text: str
    loss: bool


def chat_template(tokenizer: Any, template: str | None) -> str:
    """The Jinja text in use.

    Args:
        tokenizer: a transformers tokenizer.
        template: Jinja text that overrides the tokenizer's own.

    Raises:
        DataError: none was given and the tokenizer has none.
    """
    found = template or tokenizer.chat_template
    if isinstance(found, dict):
        # Several named templates; transformers keeps the ordinary one under this name.
        found = found.get("default")
    if not found:
        raise DataError(
            describe(
                f"tokenizer of {tokenizer.name_or_path or 'the model'}",
                "no chat template",
                "one, since the rows are messages",
                "give a template, take the model's chat version, or write the rows as prompt and completion",
            )
        )
    return found


def has_generation_marks(template: str) -> bool:
    """Whether the template itself marks what the assistant says."""
    return _GENERATION_MARK.search(template) is not None


def render(row: Row, messages: list[Message], tokenizer: Any, template: str, *, generation_prompt: bool) -> str:
    """The text of these messages of a row, its ``tools`` column included.

    Raises:
        DataError: the template refuses the conversation; its own words are passed on.
    """
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=row.extra.get("tools"),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            describe(
                row.where,
                f"the chat template cannot render the first {len(messages)} messages ({error})",
                "a conversation in the template's form",
                "reorder its roles, or give another template",
            )
        ) from error


def generation_messages(row: Row) -> list[Message]:
    """The conversation before its last assistant turn: what a model is asked with."""
    return list(row.messages or [])[: row.last_assistant()]


def pieces(row: Row, tokenizer: Any, template: str) -> list[Piece]:
    """Cut a conversation into stretches with and without loss, by rendering its beginnings.

    An assistant message with ``"weight": 0`` (OpenAI's convention) carries none.

    Raises:
        DataError: a beginning does not render to a beginning of the whole, so the turns cannot be told apart.
    """
    messages = row.messages or []
    whole = render(row, messages, tokenizer, template, generation_prompt=False)
    found: list[Piece] = []
    position = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight", 1) == 0:
            continue
        asked = render(row, messages[:index], tokenizer, template, generation_prompt=True)
        answered = render(row, messages[: index + 1], tokenizer, template, generation_prompt=False)
        if not (whole.startswith(answered) and answered.startswith(asked) and len(asked) >= position):
            raise DataError(
                describe(
                    row.where,
                    f"the chat template rewrites what comes before or in messages[{index}]",
                    "a template whose beginnings stay as they are, or one with {% generation %} marks",
                    "give such a template, or split the conversation into rows with one assistant turn each",
                )
            )
        found.append(Piece(whole[position : len(asked)], False))
        found.append(Piece(answered[len(asked) :], True))
        position = len(answered)
    found.append(Piece(whole[position:], False))
    return [piece for piece in found if piece.text]


def marked_tokens(row: Row, tokenizer: Any, template: str) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and, for each, whether the template marks it as the assistant's."""
    encoded = tokenizer.apply_chat_template(
        row.messages,
        tools=row.extra.get("tools"),
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(encoded["input_ids"]), [bool(value) for value in encoded["assistant_masks"]]
