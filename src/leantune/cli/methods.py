"""`leantune methods`: what the registry holds, as a table, as JSON, or one method with its options."""

from __future__ import annotations

import dataclasses
import json
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from leantune.cli.command import console, one_command
from leantune.cli.option import options_of

if TYPE_CHECKING:
    from leantune.methods import Method

LAYER = 4096


def command(words: list[str]) -> Any:
    """The command `leantune methods`."""
    del words
    return one_command(methods)


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method's options.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """The column "trained of 4096 x 4096" is the number of parameters that a method trains, at its default options,
    for one linear layer of that size.
    """
    from leantune.methods import get, names

    if name is not None:
        _show_one(get(name), as_json)
    elif as_json:
        typer.echo(json.dumps([_facts(get(known)) for known in names()], indent=2))
    else:
        _show_all([get(known) for known in names()])


def _facts(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "title": method.title,
        "formula": method.formula,
        "trainable_parameters_4096x4096": method.trainable_parameters(method.make_config(), LAYER, LAYER),
        "is_adapter": method.is_adapter,
        "mergeable": method.mergeable,
        "lora_form": method.lora_form,
        "default_learning_rate": method.default_learning_rate,
        "paper": method.paper,
        "options_set": dict(method.options),
    }


def _show_all(found: list[Method]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("method", style="bold cyan", no_wrap=True)
    table.add_column(f"trained of {LAYER} x {LAYER}", justify="right", no_wrap=True)
    table.add_column("merges", no_wrap=True)
    table.add_column("title, formula, paper")
    for method in found:
        trained = method.trainable_parameters(method.make_config(), LAYER, LAYER)
        lines = [method.title, method.formula] + ([method.paper] if method.paper != "-" else [])
        about = Text("\n").join([Text(lines[0]), *(Text(line, style="dim") for line in lines[1:])])
        table.add_row(
            method.name, f"{trained:,} {trained / LAYER**2:>6.1%}", "yes" if method.mergeable else "no", about
        )
        table.add_row()
    out = console()
    out.print(table)
    out.print("[dim]leantune methods NAME shows the options of one method.[/dim]")


def _show_one(method: Method, as_json: bool) -> None:
    options = options_of(method.config, method.options)
    if as_json:
        listed = [dataclasses.asdict(option) | {"default": _plain(option.default)} for option in options]
        typer.echo(json.dumps(_facts(method) | {"options": listed}, indent=2, default=str))
        return
    out = console()
    out.print(f"[bold cyan]{method.name}[/]  {method.title}\n{method.formula}\n[dim]{method.paper}[/dim]")
    if not options:
        out.print("No options.")
        return
    for option in options:
        default = "" if option.default is None else f"  default {_plain(option.default)}"
        out.print(f"\n[cyan]{option.flag}[/] {escape(option.type_name)}[dim]{escape(default)}[/dim]")
        out.print(Padding(Text(shorten(option.help, width=400, placeholder=" ...")), (0, 0, 0, 4)))


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, list, dict, type(None))) else str(value)
