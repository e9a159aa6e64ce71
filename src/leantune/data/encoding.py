"""From rows to token ids and a loss mask.

A prompt is tokenised alone, as generation will see it. The completion gets the tokens it has after that prompt: those
of the joined text when they begin with the prompt's own, else its own tokens alone (a word that would merge across
the border must not, since at generation time the border is there). The tokenizer's opening token is added if it adds
one, and the end-of-text token closes the completion. Only the completion (the assistant's turns, through the token
that ends each) carries loss. A plain text carries loss on every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, overload

from leantune.core.errors import DataError, describe
from leantune.data import template as chat
from leantune.data.problem import Problems
from leantune.data.row import Row
from leantune.data.template import Piece

NO_LOSS = -100
_CHUNK_ROWS = 1000


@dataclass
class Encoded(Sequence[dict[str, Any]]):
    """Rows as token ids, in the order they were given; a sequence of its ``examples``.

    Attributes:
        examples: dictionaries with ``input_ids`` (token ids), ``labels`` (the id where a token carries loss, -100
            where not; for classification and regression the label), ``row`` (position in the rows given) and the
            rows' extra columns.
        lengths: tokens of each example, after truncation.
        total_tokens: sum of ``lengths``.
        loss_tokens: tokens that carry loss; examples, for classification and regression.
        truncated: rows that were longer than ``max_length``.
        tokens_cut: tokens that truncation took away.
        loss_rows_cut: rows of which truncation took tokens that carried loss.
        max_length: the limit in tokens, or None.
        label_names: class names in the order of their numbers (classification alone).
    """

    examples: list[dict[str, Any]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    total_tokens: int = 0
    loss_tokens: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    loss_rows_cut: int = 0
    max_length: int | None = None
    label_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return self.examples[index]

    def truncation_note(self) -> str | None:
        """One sentence on what was cut, or None when nothing was."""
        if not self.truncated:
            return None
        return (
            f"{self.truncated} of {len(self)} rows were cut to {self.max_length} tokens: {self.tokens_cut} tokens "
            f"lost, {self.loss_rows_cut} rows lost tokens that carry loss"
        )


def special_prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before any text (its opening token, or nothing)."""
    probe = "a"
    plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe, add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return list(full[:start])
    return []


def _join(
    pieces: list[Piece], wholes: list[list[int]], opening: list[int], special: frozenset[int], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """Ids and loss flags of a row's pieces.

    Args:
        pieces: the row's stretches of text.
        wholes: for each piece, the ids of all text through it.
        opening: ids before the text.
        special: ids of the special tokens.
        tokenizer: for a piece whose ids depend on its neighbour.
    """
    ids: list[int] = []
    flags: list[bool] = []
    for piece, whole in zip(pieces, wholes, strict=True):
        if whole[: len(ids)] == ids:
            new = whole[len(ids) :]
        else:
            new = tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        ids.extend(new)
        flags.extend([piece.loss] * len(new))
        if piece.loss:
            _stop_at_end(ids, flags, len(new), special, tokenizer)
    return opening + ids, [False] * len(opening) + flags


def _stop_at_end(ids: list[int], flags: list[bool], new: int, special: frozenset[int], tokenizer: Any) -> None:
    """Take the loss off what a template writes after the token that ends a turn: generation never gets there.

    That is everything after an end-of-text token, and white space after any special token (as ``<end_of_turn>``).
    """
    first = len(ids) - new
    for position in range(len(ids) - 1, first - 1, -1):
        if ids[position] in special:
            rest = ids[position + 1 :]
            if ids[position] == tokenizer.eos_token_id or (rest and not tokenizer.decode(rest).strip()):
                flags[position + 1 :] = [False] * len(rest)
            return


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the special tokens, those beside the tokenizer's own few included (``<|eot_id|>``, ``<end_of_turn>``)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset([*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)])


def _completion_pieces(row: Row) -> list[Piece]:
    if row.is_plain_text:
        return [Piece(row.text or "", True)]
    return [Piece(row.prompt or "", False), Piece(row.completion or "", True)]


def _end_of_text(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            describe(
                f"tokenizer of {tokenizer.name_or_path or 'the model'}",
                "no end-of-text token",
                "one, to close the completions with",
                "set tokenizer.eos_token",
            )
        )
    return tokenizer.eos_token_id


def _first_token(tokenizer: Any) -> list[int]:
    """One token to stand before a completion that has nothing before it: the first token is predicted from it."""
    return [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else _end_of_text(tokenizer)]


def _tokenise(rows: list[Row], tokenizer: Any, template: str | None) -> Iterator[tuple[list[int], list[bool]]]:
    """Ids and loss flags of each row, uncut. Rows are of one layout, so one batch call serves them all."""
    if rows[0].messages is not None:
        jinja = chat.chat_template(tokenizer, template)
        if chat.has_generation_marks(jinja) and not _any_weight(rows):
            yield from (chat.marked_tokens(row, tokenizer, jinja) for row in rows)
            return
        all_pieces = [chat.pieces(row, tokenizer, jinja) for row in rows]
        opening: list[int] = []
    else:
        all_pieces = [_completion_pieces(row) for row in rows]
        opening = special_prefix(tokenizer)
    beginnings = ["".join(p.text for p in pieces[: k + 1]) for pieces in all_pieces for k in range(len(pieces))]
    special = special_ids(tokenizer)
    batch = iter(tokenizer(beginnings, add_special_tokens=False, verbose=False)["input_ids"])
    for row, pieces in zip(rows, all_pieces, strict=True):
        ids, flags = _join(pieces, list(islice(batch, len(pieces))), opening, special, tokenizer)
        if row.messages is None:
            if flags and flags[0]:
                ids, flags = _first_token(tokenizer) + ids, [False, *flags]
            if ids[-1] != _end_of_text(tokenizer):
                ids, flags = [*ids, _end_of_text(tokenizer)], [*flags, True]
        yield ids, flags


def _any_weight(rows: list[Row]) -> bool:
    return any("weight" in message for row in rows for message in row.messages or [])


def _kind(row: Row) -> str:
    if row.messages is not None:
        return "messages"
    return "text" if row.is_plain_text else "prompt and completion"


def check_answers(rows: Sequence[Row]) -> None:
    """Refuse rows that have no answer (rows of text and label), or are not all of one layout.

    Raises:
        DataError: naming the rows.
    """
    problems = Problems("data")
    for row in rows:
        if row.messages is None and row.completion is None and not row.is_plain_text:
            labelled = row.text is not None
            got, do = "a text with a label", "name the task, or --format text to learn the text itself"
            if not labelled:
                got, do = "no answer", "mend the data, or name another task"
            problems.add(row.where, got, "a prompt and completion, or messages", do)
        elif _kind(row) != _kind(rows[0]):
            problems.add(row.where, "a row of another layout than the first", "one layout", "split the data")
    problems.raise_if_any()


def settled(row: Row, tokenizer: Any, template: str | None) -> Row:
    """The one form of a row that has two (Alpaca): messages where there is a chat template, else the prompt."""
    if row.messages is None or row.prompt is None:
        return row
    if template or tokenizer.chat_template:
        return replace(row, prompt=None, completion=None)
    return replace(row, messages=None)


def _settled(rows: Sequence[Row], tokenizer: Any, template: str | None) -> list[Row]:
    found = [settled(row, tokenizer, template) for row in rows]
    if any(row.messages is not None for row in found):
        # Some have earlier turns, which no prompt can hold; the lack of a template is what has to be mended.
        chat.chat_template(tokenizer, template)
    return found


def encode(rows: Sequence[Row], tokenizer: Any, *, max_length: int | None, template: str | None = None) -> Encoded:
    """Tokenise rows of prompt and completion, or of messages, with loss on the answers alone; or plain texts.

    Args:
        rows: rows of one layout, as :func:`leantune.data.read_rows` gives them.
        tokenizer: a transformers tokenizer.
        max_length: longest example in tokens; the end of a longer one is cut off and counted. None: no limit.
        template: Jinja chat template that overrides the tokenizer's (messages alone).

    Returns:
        The examples, one a row, and the counts.

    Raises:
        DataError: rows have no answer, or are left without a token that carries loss (cut away, or never there), the
            template cannot render a row or hides where the assistant speaks, or the tokenizer lacks a template or
            end-of-text token. Rows are named.
    """
    rows = _settled(rows, tokenizer, template)
    check_answers(rows)
    problems = Problems("data")
    encoded = Encoded(max_length=max_length)
    remedy = _remedy(rows, tokenizer, template)
    for start in range(0, len(rows), _CHUNK_ROWS):
        chunk = list(rows[start : start + _CHUNK_ROWS])
        for offset, (ids, flags) in enumerate(_tokenise(chunk, tokenizer, template)):
            _add(encoded, chunk[offset], start + offset, ids, flags, problems, remedy)
    problems.raise_if_any()
    return encoded


def _remedy(rows: list[Row], tokenizer: Any, template: str | None) -> str:
    """What to do about rows without loss."""
    if rows and rows[0].messages is not None and chat.has_generation_marks(chat.chat_template(tokenizer, template)):
        return (
            "put {% generation %} and {% endgeneration %} around what the assistant says in the chat template (and the "
            "token that ends it), or take these marks out of it: the turns are then found by rendering"
        )
    return "delete the row, or check the chat template"


def _add(
    encoded: Encoded, row: Row, index: int, ids: list[int], flags: list[bool], problems: Problems, remedy: str
) -> None:
    # Nothing predicts the first token, so it never carries loss.
    flags = [False, *flags[1:]]
    limit = encoded.max_length
    kept, kept_flags = ids[:limit], flags[:limit]
    cut = len(ids) - len(kept)
    if not any(kept_flags):
        if any(flags):
            got = f"{flags.index(True)} of its {len(ids)} tokens come before the answer, and max_length is {limit}"
            problems.add(
                row.where, got, "at least one token that carries loss", "raise max_length or shorten the prompt"
            )
        else:
            problems.add(row.where, "no token carries loss", "at least one", remedy)
        return
    if cut:
        encoded.truncated += 1
        encoded.tokens_cut += cut
        encoded.loss_rows_cut += any(flags[len(kept) :])
    labels = [token if flag else NO_LOSS for token, flag in zip(kept, kept_flags, strict=True)]
    encoded.examples.append({**row.extra, "input_ids": kept, "labels": labels, "row": index})
    encoded.lengths.append(len(kept))
    encoded.total_tokens += len(kept)
    encoded.loss_tokens += sum(kept_flags)


def prompt_text(row: Row, tokenizer: Any, *, template: str | None = None) -> str:
    """The text a model is asked with: the prompt, or the conversation before its last assistant turn, rendered.

    Args:
        row: a row of prompt and completion, or of messages; of a plain text nothing is asked.
        tokenizer: its chat template renders messages.
        template: Jinja chat template that overrides the tokenizer's.

    Raises:
        DataError: as :func:`encode`, for messages.
    """
    row = settled(row, tokenizer, template)
    if row.messages is None:
        return row.prompt or ""
    jinja = chat.chat_template(tokenizer, template)
    return chat.render(row, chat.generation_messages(row), tokenizer, jinja, generation_prompt=True)


def text_ids(text: str, tokenizer: Any, *, rendered: bool = False) -> list[int]:
    """Token ids of a text to continue; the same that :func:`encode` gives a prompt.

    Args:
        text: a prompt; an empty one becomes the opening (or end-of-text) token alone.
        tokenizer: a transformers tokenizer.
        rendered: the text comes from a chat template, which writes every special token itself.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    opening = [] if rendered else special_prefix(tokenizer)
    return opening + list(ids) or _first_token(tokenizer)


def prompt_ids(row: Row, tokenizer: Any, *, template: str | None = None) -> list[int]:
    """Token ids that a model is asked with for this row: :func:`prompt_text`, tokenised as in training.

    Arguments and errors as of :func:`prompt_text`.
    """
    row = settled(row, tokenizer, template)
    text = prompt_text(row, tokenizer, template=template)
    return text_ids(text, tokenizer, rendered=row.messages is not None)
