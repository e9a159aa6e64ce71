"""From an annotated function to a command, so that every file of a command is its function and little else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console


def one_command(function: Callable[..., Any]) -> Any:
    """A command from an annotated function; its docstring is the help below the line of the table."""
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in (function.__doc__ or "").split("\n\n"))
    app.command(help=text)(function)
    return typer.main.get_command(app)


def console(*, stderr: bool = False) -> Console:
    """A rich console that highlights nothing by itself: colour is only where a command puts it."""
    return Console(stderr=stderr, highlight=False)
