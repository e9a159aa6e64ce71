"""`leantune inspect`: what a data file, an adapter folder or a base model holds, before anything is trained on it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leantune.cli.command import Command, console, printable, reflowed

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
    """A data file as the model will see it.

    Rows, with the tokens that carry loss in colour and underlined (they are what is learned); lengths, truncation,
    duplicates, and the share of tokens that carry loss.
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
    return Text.assemble(*((printable(text), "bold green underline" if loss else "dim") for text, loss in stretches))


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
    """What an adapter changes, and what it costs.

    Its method and options, the base it belongs to, its modules and their sizes. No model is loaded.
    """
    from leantune.adapters import inspect_adapter

    facts = inspect_adapter(folder)
    if as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
    else:
        _print_facts({**facts, "modules": _grouped(facts["modules"])})


def model(
    name: Annotated[str, typer.Argument(help="A Hub id, a folder, a GGUF file, or smollm2-135m.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Sizes of a model, and its target modules.

    Architecture, dimensions, and the modules that a method can change. No weights are loaded.
    """
    from leantune.models import facts

    found = facts(name)
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
    else:
        _print_facts(found)


def _grouped(modules: dict[str, Any]) -> list[dict[str, Any]]:
    """Modules that differ in their block number alone, as one line."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for name, facts in modules.items():
        tensors = [f"{tensor} {tuple(known['shape'])} {known['dtype']}" for tensor, known in facts["tensors"].items()]
        key = (re.sub(r"\.\d+\.", ".*.", name), "\n".join(tensors))
        group = groups.setdefault(key, {"name": key[0], "count": 0, "parameters": 0, "tensors of each": key[1]})
        group["count"] += 1
        group["parameters"] += facts["parameters"]
    return list(groups.values())


def _print_facts(facts: dict[str, Any]) -> None:
    """Every fact that is there on a line; a list of records as a table."""
    out = console()
    lines = {key: value for key, value in facts.items() if value is not None and value not in ([], {})}
    for key, inner in list(lines.items()):
        if isinstance(inner, dict):
            del lines[key]
            lines |= {f"{key} {name}": value for name, value in inner.items() if value is not None}
    width = max(len(key) for key in lines)
    for key, value in lines.items():
        if not (isinstance(value, list) and isinstance(value[0], dict)):
            title = f"{key.replace('_', ' '):<{width}}  "
            out.print(Text.assemble((title, "cyan"), _shown(key, value)), soft_wrap=True)
    for value in lines.values():
        if isinstance(value, list) and isinstance(value[0], dict):
            out.print(_records(value))


def _shown(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if "bytes" in key:
        return f"{value / 1e6:,.2f} MB"
    return f"{value:.2%}" if key.endswith("ratio") else f"{value:,}"


def _records(records: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for key, value in records[0].items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        table.add_column(key.replace("_", " "), justify="right" if is_number else "left")
    for record in records:
        table.add_row(*(Text(_shown(key, value)) for key, value in record.items()))
    return table
