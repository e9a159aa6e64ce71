"""`leantune inspect`: what a data file, an adapter folder or a base model holds, before anything is trained on it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from leantune.cli.command import Command, TaskOfRun, console, reflowed


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
    file: Annotated[
        Path,
        typer.Argument(help="A data file, a folder of them, or a Hub data set (owner/name:split).", show_default=False),
    ],
    model: Annotated[str, typer.Option(help="Base model whose tokenizer and chat template to use.")] = "smollm2-135m",
    rows: Annotated[int, typer.Option(metavar="int", help="Rows to show as the model sees them.")] = 3,
    max_length: Annotated[
        int, typer.Option(metavar="int", help="Cut rows to so many tokens, as training would.")
    ] = 1024,
    form: Annotated[str | None, typer.Option("--format", help="Format of the rows; default: by their columns.")] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="name=name,...", help="Which column means what: prompt=question,completion=answer."),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(metavar="path", help="File with the chat template (Jinja) to use.")
    ] = None,
    eval_share: Annotated[
        float | None, typer.Option(metavar="float", help="Count what this share would hold out for evaluation.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="int", help="Read only the first rows.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """A data file as the model will see it.

    How its columns are read; rows, with the tokens that carry loss in colour and underlined (they are what is
    learned); lengths, truncation, duplicates, who says how many tokens and which of them carry loss.
    """
    from leantune.cli.data_sheet import Sheet

    sheet = Sheet(
        file,
        model,
        max_length=max_length,
        form=form,
        columns=columns,
        template=chat_template,
        limit=limit,
        eval_share=eval_share,
    )
    if as_json:
        typer.echo(json.dumps(sheet.facts, indent=2))
        return
    out = console()
    sheet.print_source(out)
    sheet.print_rows(out, rows)
    sheet.print_counts(out)


def adapter(
    folder: Annotated[Path, typer.Argument(help="A run folder or an adapter folder.")],
    adapter: TaskOfRun = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What an adapter changes, and what it costs.

    Its method and options, the base it belongs to, its modules and their sizes. No model is loaded.
    """
    from leantune.adapters import inspect_adapter
    from leantune.adapters.folder import of_task

    facts = inspect_adapter(of_task(folder, adapter))
    if as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
    else:
        _print_facts({**facts, "modules": _grouped(facts["modules"])})


def model(
    name: Annotated[str, typer.Argument(help="A Hub id, a folder, a GGUF file, or smollm2-135m.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Sizes of a model, its target modules, and which of them are coupled.

    Architecture, dimensions, the modules that a method can change, and the structures (heads, channels) that run
    through several of them, found by name or by a trace. No weights are loaded.
    """
    from leantune.methods._discovery import structure_report
    from leantune.models import bare_model, facts

    found, structures = facts(name), structure_report(bare_model(name))
    if as_json:
        typer.echo(json.dumps({**found, "structures": structures}, indent=2, default=str))
    else:
        _print_facts(found)
        _print_structures(structures)


def _print_structures(structures: list[dict[str, Any]]) -> None:
    """A line for each kind of structure, and one for each of its parts."""
    out = console()
    for each in structures:
        times = f" x {each['count']}" if each["count"] > 1 else ""
        groups = f", {each['choices']:,} where key or value train" if each["choices"] != each["units"] else ""
        order = "" if each["permutable"] else ", in this order only"
        unit = {"attention": "heads", "ffn": "channels"}.get(each["kind"], "columns")
        words = f"  {each['kind']}, {each['found']}: {each['units']:,} {unit}{groups}{order}"
        out.print(Text.assemble((each["block"] + times, "cyan"), words), soft_wrap=True)
        for part in each["parts"] if each["kind"] != "plain" else ():
            out.print(Text(f"    {part}", style="dim"), soft_wrap=True)


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
