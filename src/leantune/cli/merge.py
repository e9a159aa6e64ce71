"""`leantune merge`: the adapter written into its base, as a plain model folder, proven the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from leantune.cli.command import Rounds, TaskOfRun, console, one_command, say
from leantune.cli.parity import print_parity


def command(words: list[str]) -> Any:
    """The command `leantune merge`."""
    del words
    return one_command(merge)


def merge(
    run: Annotated[Path, typer.Argument(help="A run folder or an adapter folder.")],
    out: Annotated[Path, typer.Option(metavar="path", help="Folder to write the merged model into.")],
    prompt: Annotated[list[str] | None, typer.Option(metavar="text", help="Compare on this; repeat for more.")] = None,
    onto: Annotated[
        str,
        typer.Option(
            help="Of a quantised base: trained (dequantised, same answers) or original (before quantisation)."
        ),
    ] = "trained",
    adapter: TaskOfRun = None,
    rounds: Rounds = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
) -> None:
    """The merged folder loads with stock transformers. Before it is written, both models answer the same prompts (the
    run's own data unless --prompt is given), the merged one in a process without leantune; when they differ nothing
    is written and the exit code is 1. --onto original writes into weights that training never met: how far the answers
    then are from the trained model's is measured and said.
    """
    from leantune.adapters import merge_run
    from leantune.adapters.folder import of_task

    result = merge_run(
        of_task(run, adapter),
        out,
        prompts=prompt or None,
        onto=onto,
        rounds=rounds,
        overwrite=overwrite,
        progress=say,
    )
    screen = console()
    print_parity(screen, result["parity"])
    if result.get("merged_onto"):
        screen.print(f"merged onto           {result['merged_onto']}", soft_wrap=True)
    size = result["bytes"] / 1e6
    screen.print(
        f"Merged {result['modules']} modules: {size:,.1f} MB, {result['dtype']}, in [bold]{out}[/]", soft_wrap=True
    )
