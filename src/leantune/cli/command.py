"""From an annotated function to a command, so that every file of a command is its function and little else."""

from __future__ import annotations

import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperCommand

TaskOfRun = Annotated[
    str | None, typer.Option("--adapter", metavar="task", help="Of a run with several tasks: which one.")
]
Rounds = Annotated[
    int | None, typer.Option(metavar="number", help="Of a boosted adapter (xgblora): its first so many rounds alone.")
]
_NAMES_WIDTH = 26
_HELP_WIDTH = 100


def one_command(function: Callable[..., Any]) -> Any:
    """A command from an annotated function; its docstring is the help below the line of the table."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(cls=Command, help=reflowed(function.__doc__))(function)
    return typer.main.get_command(app)


def reflowed(text: str | None) -> str:
    """A docstring as paragraphs of one line each."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))


def console(*, stderr: bool = False) -> Console:
    """A rich console that highlights nothing by itself: colour is only where a command puts it."""
    return Console(stderr=stderr, highlight=False)


def say(text: str) -> None:
    """One line about what is going on, on stderr: standard output carries results alone."""
    console(stderr=True).print(text, markup=False, soft_wrap=True, style="dim")


def printable(text: str) -> str:
    """Text of a model for a terminal: control characters, which could steer it, become a mark."""
    return "".join(
        sign if sign in "\n\t" or unicodedata.category(sign) != "Cc" else "\N{REPLACEMENT CHARACTER}" for sign in text
    )


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr that takes ``(stage, done, total)``; nothing where there is no terminal."""
    out = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        stages: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bar.add_task(stage, total=total)
            bar.update(stages[stage], completed=done, total=total)

        yield update


def program() -> str:
    """How this program is typed here: ``leantune``, or its path where it is not on the search path."""
    if shutil.which("leantune") or Path(sys.argv[0]).name != "leantune":
        return "leantune"
    with suppress(ValueError):
        return Path(sys.argv[0]).absolute().relative_to(Path.cwd()).as_posix()
    return sys.argv[0]


class Command(TyperCommand):
    """A command whose help stays readable with fifty options: names left, text right, no boxes."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write usage, text and options, the options under the headings they were given."""
        out = console()
        width = max(60, min(out.width, _HELP_WIDTH))
        text = Text(" ".join(self.get_usage(ctx).split()) + "\n")
        for paragraph in (self.help or "").strip().split("\n\n"):
            text.append("\n" + textwrap.fill(paragraph, width) + "\n")
        sections: dict[str, list[Any]] = {}
        for parameter in self.get_params(ctx):
            if not getattr(parameter, "hidden", False):
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(parameter)
        for heading in sorted(sections, key=lambda title: (title == "Options", title != "Arguments")):
            text.append(f"\n{heading}\n", "bold")
            for parameter in sections[heading]:
                for part, style in _record(parameter, width):
                    text.append(part, style)
        with out.capture() as captured:
            out.print(text, soft_wrap=True, end="\n")
        formatter.write(captured.get())


def _record(parameter: Any, width: int) -> Iterator[tuple[str, str]]:
    """One option: its names in colour, the type dim, then the text beside or below them."""
    is_argument = parameter.param_type_name == "argument"
    names = parameter.name.upper() if is_argument else _flags(parameter)
    kind = "" if is_argument or parameter.is_flag else f" {parameter.metavar or 'text'}"
    yield f"  {names}", "cyan"
    yield kind, "dim"
    used = 2 + len(names) + len(kind)
    lines = textwrap.wrap(_help(parameter), width - _NAMES_WIDTH) or [""]
    if used >= _NAMES_WIDTH:
        yield "\n" + " " * _NAMES_WIDTH, ""
    else:
        yield " " * (_NAMES_WIDTH - used), ""
    yield ("\n" + " " * _NAMES_WIDTH).join(lines) + "\n", ""


def _flags(parameter: Any) -> str:
    on, off = parameter.opts[0], [name for name in parameter.secondary_opts if name.startswith("--no-")]
    return f"--[no-]{on[2:]}" if off and off[0] == f"--no-{on[2:]}" else ", ".join([*parameter.opts, *off])


def _help(parameter: Any) -> str:
    text = parameter.help or ""
    if parameter.required and parameter.param_type_name != "argument":
        return f"{text} [required]"
    shown = parameter.default if parameter.show_default is not False else None
    if shown in (None, False, (), []) or callable(shown):
        return text
    return f"{text} [default: {shown}]"
