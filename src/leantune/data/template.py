"""Conversations through a chat template: the text a model sees, and which of it is the assistant's.

The template comes from the tokenizer or is given as Jinja text. Where the assistant's turns stand is known in one of
two ways. A template with ``{% generation %}`` marks says so itself. For any other template the conversation is
rendered up to each assistant turn (with the generation prompt, as it will be when the model is asked) and through it;
what lies between is the turn, provided that both really are beginnings of the whole.

Templates of reasoning models write an earlier turn otherwise once another follows: they leave its reasoning out. Such
a turn is looked for in the whole, and taken as it stands there if nothing that was said is missing from it; else the
conversation is refused, since a guessed mask trains on the wrong tokens.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from leantune.core.errors import DataError, describe
from leantune.data.row import Message, Row

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TAG = re.compile(r"<[^<>]*>")
# Stands for what a message says, to see where a template puts it: a sign that no text has.
_PROBE = "\uf8fe\uf8ff"


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


def read_template(path: Path | str) -> str:
    """The Jinja text of a chat template file.

    Raises:
        DataError: it cannot be read, is empty, or is no Jinja.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(describe(str(file), reason, "a chat template (Jinja)", "check the path")) from error
    if not text.strip():
        raise DataError(describe(str(file), "an empty file", "a chat template (Jinja)", "check how it was written"))
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([[]], chat_template=text)
    except jinja2.TemplateSyntaxError as error:
        got = f"no Jinja ({error.message})"
        raise DataError(describe(f"{file}:{error.lineno}", got, "a chat template", "mend that line")) from error
    except (jinja2.TemplateError, LookupError, TypeError, ValueError, AttributeError):
        # It is Jinja; an empty conversation is not what it has to render.
        return text
    return text


def has_generation_marks(template: str) -> bool:
    """Whether the template itself marks what the assistant says."""
    return _GENERATION_MARK.search(template) is not None


def render(row: Row, messages: list[Message], tokenizer: Any, template: str, *, generation_prompt: bool) -> str:
    """The text of these messages of a row, its ``tools`` column included.

    Raises:
        DataError: the template refuses the conversation; its own words are passed on.
    """
    return _apply(row, messages, tokenizer, template, tokenize=False, add_generation_prompt=generation_prompt)


def _apply(row: Row, messages: list[Message], tokenizer: Any, template: str, **options: Any) -> Any:
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tools=row.extra.get("tools"), chat_template=template, **options)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        got = f"the chat template cannot render the first {len(messages)} messages ({error})"
        do = "reorder its roles, or give another template"
        if not messages:
            got = f"its first turn is the assistant's, and the chat template cannot ask for that ({error})"
            do = 'begin with a user turn, or give the first message "weight": 0'
        wanted = "a conversation in the template's form"
        raise DataError(describe(row.where, got, wanted, do)) from error


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
        turn = None
        if whole.startswith(asked) and answered.startswith(asked) and len(asked) >= position:
            is_beginning = whole.startswith(answered)
            turn = answered[len(asked) :] if is_beginning else _found(row, index, tokenizer, template, asked)
        if turn is None:
            do = (
                'give such a template, set "weight": 0 on the earlier assistant turns, or split the conversation into '
                "rows with one assistant turn each"
            )
            raise DataError(
                describe(
                    row.where,
                    f"the chat template rewrites what comes before or in messages[{index}]",
                    "a template whose beginnings stay as they are, or one with {% generation %} marks",
                    do,
                )
            )
        found.append(Piece(whole[position : len(asked)], False))
        found.append(Piece(turn, True))
        position = len(asked) + len(turn)
    found.append(Piece(whole[position:], False))
    return [piece for piece in found if piece.text]


def _found(row: Row, index: int, tokenizer: Any, template: str, asked: str) -> str | None:
    """A turn that later messages change the looks of, as it stands in the whole conversation.

    Args:
        row: the row.
        index: which message.
        tokenizer: renders.
        template: the chat template.
        asked: the conversation before the turn, as the model is asked with it.

    Returns:
        The turn, or None where something that was said in it is missing.
    """
    messages = row.messages or []
    probed = [*messages[:index], {**messages[index], "content": _PROBE}, *messages[index + 1 :]]

    def around(count: int) -> tuple[str, str, str]:
        text = render(row, messages[:count], tokenizer, template, generation_prompt=False)
        other = render(row, probed[:count], tokenizer, template, generation_prompt=False)
        start = _shared(text, other)
        end = len(text) - _shared(text[start:][::-1], other[start:][::-1])
        return text[:start], text[start:end], text[end:]

    before, said, after = around(len(messages))
    before_alone, said_alone, after_alone = around(index + 1)
    left_out = before_alone[len(asked) :].removesuffix(before[len(asked) :])
    # Tags around nothing may go (Qwen 3 writes an empty <think></think> into the last turn alone); words may not.
    if said != said_alone or not after.startswith(after_alone) or _TAG.sub("", left_out).strip():
        return None
    return before[len(asked) :] + said + after_alone


def _shared(first: str, second: str) -> int:
    """How many signs two texts begin alike with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def marked_tokens(row: Row, tokenizer: Any, template: str) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and, for each, whether the template marks it as the assistant's.

    Raises:
        DataError: the template refuses the conversation.
    """
    encoded = _apply(
        row,
        row.messages or [],
        tokenizer,
        template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(encoded["input_ids"]), [bool(value) for value in encoded["assistant_masks"]]
