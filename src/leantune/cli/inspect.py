"""`leantune inspect`: what a data file, an adapter folder or a base model holds, before anything is trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from leantune.cli.command import Command, console, reflowed

_BAR_WIDTH = 40


def command(words: list[str]) -> Any:
    """The command `leantune inspect`, with its three subcommands."""
    del words
    app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)

    @app.callback()
    def root() -> None:
        """Each has a --help of its own."""

    for name, function in (("data", data), ("adapter", adapter), ("model", model)):
        app.command(name, cls=Command, help=reflowed(function.__doc__))(function)
    return typer.main.get_command(app)


def data(
    file: Annotated[Path, typer.Argument(help="A data file: jsonl or parquet.")],
    model: Annotated[str, typer.Option(help="Base model whose tokenizer and chat template to use.")] = "smollm2-135m",
    rows: Annotated[int, typer.Option(metavar="int", help="Rows to show as the model sees them.")] = 3,
    max_length: Annotated[
        int, typer.Option(metavar="int", help="Cut rows to so many tokens, as training would.")
    ] = 1024,
    form: Annotated[str | None, typer.Option("--format", help="Format of the file; default: by its columns.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="int", help="Read only the first rows.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Rows as the model sees them, with the tokens that carry loss in colour (underlined: they are what is learned);
    lengths, truncation, duplicates, and the share of tokens that carry loss.
    """
    from leantune.data import encode, encode_classification, masked_text, read_rows, summary
    from leantune.models import load_tokenizer

    read = read_rows(file, format=form, limit=limit)
    tokenizer = load_tokenizer(model)
    labelled = bool(read) and read[0].label is not None
    encoded = (encode_classification if labelled else encode)(read, tokenizer, max_length=max_length)
    facts = summary(encoded, read, tokenizer)
    if as_json:
        typer.echo(json.dumps({"file": file.as_posix(), "model": model, **facts}, indent=2))
        return
    out = console()
    for example in encoded[: max(rows, 0)]:
        out.print(f"[bold]{read[example['row']].where}[/]  {len(example['input_ids'])} tokens")
        if labelled:
            row = read[example["row"]]
            out.print(Text(" | ".join(part for part in (row.text, row.text_pair) if part)), soft_wrap=True)
            out.print(Text(f"label {row.label}", style="green underline"))
        else:
            out.print(_coloured(masked_text(example, tokenizer)), soft_wrap=True)
        out.print()
    _print_counts(out, facts)


def _coloured(stretches: list[tuple[str, bool]]) -> Text:
    return Text.assemble(*((text, "bold green underline" if loss else "dim") for text, loss in stretches))


def _print_counts(out: Console, facts: dict[str, Any]) -> None:
    tokens, cut, twice = facts["tokens"], facts["truncation"], facts["duplicates"]
    out.print(f"rows          {facts['rows']:,}")
    names = ("min", "median", "p90", "p99", "max")
    out.print("tokens a row  " + "  ".join(f"{name} {tokens[name]:,.0f}" for name in names))
    if facts["loss_share"] is not None:
        out.print(
            f"loss          {facts['loss_tokens']:,} of {facts['total_tokens']:,} tokens carry loss "
            f"({facts['loss_share']:.1%})"
        )
    out.print(
        f"truncation    {cut['rows']:,} rows longer than {cut['max_length']:,} tokens: {cut['tokens']:,} tokens cut, "
        f"{cut['loss_rows']:,} rows lose tokens that carry loss"
    )
    out.print(f"duplicates    {twice['rows']:,} whole rows, {twice['prompts']:,} prompts asked before")
    if facts["unknown_tokens"]:
        out.print(f"[red]unknown       {facts['unknown_tokens']:,} tokens the tokenizer does not know[/]")
    for label, count in (facts["labels"] or {}).items():
        out.print(Text(f"label         {label}: {count:,} rows"))
    edges, counts = tokens["histogram"]["edges"], tokens["histogram"]["counts"]
    out.print("\nlength in tokens")
    width = len(f"{edges[-1]:,.0f}")
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * max(round(_BAR_WIDTH * count / max(counts)), 1 if count else 0)
        out.print(f"  {low:>{width},.0f} to {high:>{width},.0f}  [cyan]{bar}[/] {count:,}")


def adapter(
    folder: Annotated[Path, typer.Argument(help="A run folder or an adapter folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What an adapter is, which base it belongs to, what it changes and what it costs; no model is loaded."""
    from leantune.adapters import inspect_adapter

    _print_facts(inspect_adapter(folder), as_json)


def model(
    name: Annotated[str, typer.Argument(help="A Hub id, a folder, a GGUF file, or smollm2-135m.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Architecture, sizes, and the modules that a method can target; no weights are loaded."""
    from leantune.models import facts

    _print_facts(facts(name), as_json)


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
        return
    out = console()
    width = max(len(str(key)) for key in facts)
    for key, value in facts.items():
        if value is None or value in ([], {}):
            continue
        title = str(key).replace("_", " ")
        if isinstance(value, list) and isinstance(value[0], dict):
            out.print()
            out.print(_records(title, value))
        elif isinstance(value, dict):
            out.print(f"[cyan]{title}[/]")
            for inner, shown in value.items():
                out.print(Text(f"  {inner}: {_shown(inner, shown)}"), soft_wrap=True)
        else:
            out.print(Text.assemble((f"{title:<{width}}  ", "cyan"), _shown(key, value)), soft_wrap=True)


def _shown(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if str(key).endswith("bytes"):
        return f"{value / 1e6:,.2f} MB"
    return f"{value:,}"


def _records(title: str, records: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="cyan")
    for key, value in records[0].items():
        table.add_column(str(key).replace("_", " "), justify="right" if isinstance(value, int | float) else "left")
    for record in records:
        table.add_row(*(_shown(key, value) for key, value in record.items()))
    return table
