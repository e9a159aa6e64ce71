"""`leantune pull`: an adapter from the Hub as a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from leantune.cli.command import console, one_command, program, say


def command(words: list[str]) -> Any:
    """The command `leantune pull`."""
    del words
    return one_command(pull)


def pull(
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="An adapter on the Hub.")],
    out: Annotated[Path, typer.Option(metavar="path", help="Run folder to write.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model here, where the adapter names another place.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
) -> None:
    """The adapter as it was trained, its plain LoRA form, and the run's record. Every file is compared with what was
    pushed, every tensor with the base; when anything is wrong nothing is written. Pickles are not even fetched.
    """
    from leantune.adapters import hub

    result = hub.pull(repo_id, out, revision=revision, base=base, overwrite=overwrite, progress=say)
    screen = console()
    screen.print(Text(f"{result['method']} adapter for {result['base']}, {result['bytes'] / 1e6:,.2f} MB, in {out}"))
    screen.print(Text(f"verified: {result['verified']}"))
    if (out / "run.json").is_file():
        screen.print(Text(f"\nNext:\n  {program()} chat {out}"), soft_wrap=True)
