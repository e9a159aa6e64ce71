"""A data file as the model will see it: what `leantune inspect data` finds and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from leantune.cli.command import printable

if TYPE_CHECKING:
    from leantune.data import Encoded, Row

_BAR_WIDTH = 40
_BATCH_ROWS = 8
_TITLE_WIDTH = 12


class Sheet:
    """Rows of a source, read and encoded as training would, with the counts of both.

    Args:
        name: file, folder or Hub data set.
        model: the base model whose tokenizer to use.
        max_length: cut rows to so many tokens.
        form: format of the rows, or None.
        columns: which column means what, or None.
        template: file with the chat template, or None.
        limit: read only the first rows.
        eval_share: share of the rows to hold out, or None.

    Attributes:
        rows: the rows.
        encoded: them as tokens.
        tokenizer: the tokenizer.
        labelled: whether they are texts with labels.
        facts: what was counted, JSON-serialisable.

    Raises:
        DataError: the source or a row is bad, or would carry no loss.
    """

    def __init__(
        self,
        name: Path,
        model: str,
        *,
        max_length: int,
        form: str | None = None,
        columns: str | None = None,
        template: Path | None = None,
        limit: int | None = None,
        eval_share: float | None = None,
    ) -> None:
        from leantune.data import encode, encode_classification, encode_regression, summary
        from leantune.data.source import Source, read_source
        from leantune.data.template import read_template
        from leantune.models import load_tokenizer

        source = Source(name, format=form, columns=columns)
        jinja = read_template(template) if template is not None else None
        self.rows: list[Row] = read_source(source, limit=limit)
        self.tokenizer = load_tokenizer(model)
        if jinja is not None:
            self.tokenizer.chat_template = jinja
        self.labelled = self.rows[0].label is not None
        fractions = any(isinstance(row.label, float) and not row.label.is_integer() for row in self.rows)
        task = encode_regression if fractions else encode_classification if self.labelled else encode
        self.encoded: Encoded = task(self.rows, self.tokenizer, max_length=max_length)
        self.facts: dict[str, Any] = {
            "file": name.as_posix(),
            "model": model,
            **source.facts(),
            "notes": source.notes(),
            "chat_template": self._template(template),
            **summary(self.encoded, self.rows, self.tokenizer),
            "packing": None if self.labelled else _packing(self.encoded, max_length),
            "eval_share": None if eval_share is None else self._held_out(eval_share, source.name),
        }

    def _template(self, given: Path | None) -> str | None:
        """Which chat template the rows went through."""
        if self.rows[0].messages is None:
            return None
        if given is not None:
            return given.as_posix()
        return "the tokenizer's" if self.tokenizer.chat_template else None

    def _held_out(self, share: float, source: str) -> dict[str, Any]:
        from leantune.data.split import split_rows

        train, evaluation = split_rows(self.rows, share, source)
        return {"share": share, "train_rows": len(train), "evaluation_rows": len(evaluation)}

    def print_rows(self, out: Console, count: int) -> None:
        """The first rows, with what carries loss in colour and underlined."""
        from leantune.data import masked_text

        for example in self.encoded[: max(count, 0)]:
            row = self.rows[example["row"]]
            out.print(Text.assemble((row.where, "bold"), f"  {len(example['input_ids']):,} tokens"), soft_wrap=True)
            if self.labelled:
                out.print(Text(" | ".join(part for part in (row.text, row.text_pair) if part)), soft_wrap=True)
                out.print(Text(f"label {row.label}", style="green underline"))
            else:
                out.print(_coloured(masked_text(example, self.tokenizer)), soft_wrap=True)
            out.print()

    def print_source(self, out: Console) -> None:
        """How the columns are read."""
        lines = _Lines()
        notes = self.facts["notes"]
        for place, note in enumerate(notes):
            lines.add("read as" if place == 0 else "", note)
        if self.rows[0].messages is not None:
            shown = self.facts["chat_template"] or "none: the Alpaca prompt"
            lines.add("template", f"{shown} chat template" if shown.startswith("the ") else shown)
        lines.print(out)
        out.print()

    def print_counts(self, out: Console) -> None:
        """Lengths, loss, truncation, duplicates, who says what."""
        facts = self.facts
        tokens, cut, twice = facts["tokens"], facts["truncation"], facts["duplicates"]
        lines = _Lines()
        lines.add("rows", f"{facts['rows']:,}")
        names = ("min", "median", "p90", "p99", "max")
        lines.add("tokens a row", "  ".join(f"{name} {tokens[name]:,.0f}" for name in names))
        if facts["loss_share"] is not None:
            lines.add(
                "loss",
                f"{facts['loss_tokens']:,} of {facts['total_tokens']:,} tokens carry loss ({facts['loss_share']:.1%})",
            )
            lines.add("ends", _ends(facts["ends"]))
        if facts["glued"] and self.rows[0].messages is None:
            lines.add(
                "border",
                f"{facts['glued']:,} prompts run into their completion: end the one, or begin the other, with a space "
                "or a line break",
                "yellow",
            )
        lines.add(
            "truncation",
            f"{cut['rows']:,} rows longer than {cut['max_length']:,} tokens: {cut['tokens']:,} tokens cut, "
            f"{cut['loss_rows']:,} rows lose tokens that carry loss"
            if cut["rows"]
            else f"no row is longer than {cut['max_length']:,} tokens",
        )
        lines.add("duplicates", f"{twice['rows']:,} whole rows, {twice['prompts']:,} prompts asked before")
        if facts["packing"]:
            packs = facts["packing"]
            lines.add(
                "packing",
                f"makes {packs['sequences']:,} sequences of {packs['length']:,} tokens, {packs['filled']:.0%} filled; "
                f"plain batches of {packs['batch_rows']} rows are {packs['plain_padding']:.0%} padding",
            )
        if facts["eval_share"]:
            held = facts["eval_share"]
            lines.add("eval share", f"{held['evaluation_rows']:,} rows held out, {held['train_rows']:,} to train on")
        if facts["unknown_tokens"]:
            lines.add("unknown", f"{facts['unknown_tokens']:,} tokens the tokenizer does not know", "red")
        for label, count in (facts["labels"] or {}).items():
            lines.add("label", f"{label}: {count:,} rows")
        lines.print(out)
        if facts["roles"]:
            out.print(_roles(facts["roles"], facts["total_tokens"]))
        _print_histogram(out, tokens["histogram"])


class _Lines:
    """Titles with texts beside them, which wrap below themselves."""

    def __init__(self) -> None:
        self._grid = Table.grid(padding=(0, 2, 0, 0))
        self._grid.add_column(no_wrap=True, min_width=_TITLE_WIDTH)
        self._grid.add_column(overflow="fold")

    def add(self, title: str, text: str, style: str = "") -> None:
        self._grid.add_row(Text(title, style=style or "cyan"), Text(text, style=style))

    def print(self, out: Console) -> None:
        out.print(self._grid)


def _coloured(stretches: list[tuple[str, bool]]) -> Text:
    return Text.assemble(*((printable(text), "bold green underline" if loss else "dim") for text, loss in stretches))


def _ends(found: dict[str, Any]) -> str:
    """What the answers end with, and whether that is where generation stops."""
    parts = [f"{count:,} answers in {token}" for token, count in found["tokens"].items()]
    if found["without"]:
        parts.append(f"{found['without']:,} in no special token (cut, or the template's marks leave the end out)")
    others = [token for token in found["tokens"] if token != found["end_of_text"]]
    if others:
        parts.append(f"generation has to stop there too, not at {found['end_of_text']} alone")
    return "; ".join(parts)


def _roles(roles: dict[str, dict[str, int]], total: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), title_justify="left")
    table.add_column("who says", style="cyan", min_width=_TITLE_WIDTH - 1)
    for title in ("tokens", "of all", "carry loss", "of these"):
        table.add_column(title, justify="right")
    for role, counts in roles.items():
        tokens, loss = counts["tokens"], counts["loss_tokens"]
        shares = f"{tokens / total:.1%}", f"{loss / tokens:.1%}" if tokens else "-"
        table.add_row(role, f"{tokens:,}", shares[0], Text(f"{loss:,}", style="green" if loss else "dim"), shares[1])
    return table


def _packing(encoded: Encoded, max_length: int) -> dict[str, Any]:
    """What packing would make of the rows, beside plain batches in file order."""
    from leantune.data import Packs
    from leantune.data.packing import padding_share

    packs = Packs.of(encoded, max_length, 0)
    places = list(range(len(encoded)))
    batches = [places[start : start + _BATCH_ROWS] for start in range(0, len(places), _BATCH_ROWS)]
    return {
        "sequences": len(packs),
        "length": max_length,
        "filled": packs.filled,
        "batch_rows": _BATCH_ROWS,
        "plain_padding": padding_share(encoded.lengths, batches),
    }


def _print_histogram(out: Console, histogram: dict[str, Any]) -> None:
    edges, counts = histogram["edges"], histogram["counts"]
    out.print("\nlength in tokens")
    width = len(f"{edges[-1]:,}")
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * max(round(_BAR_WIDTH * count / max(counts)), 1 if count else 0)
        last = f"to {high - 1:>{width},}" if high - 1 > low else " " * (width + 3)
        out.print(f"  {low:>{width},} {last}  [cyan]{bar}[/] {count:,}")
