"""`leantune export`: the adapter in a form that other programs serve, proven the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from leantune.cli.command import Rounds, TaskOfRun, console, one_command, say
from leantune.cli.parity import print_parity


def command(words: list[str]) -> Any:
    """The command `leantune export`."""
    del words
    return one_command(export)


def export(
    run: Annotated[Path, typer.Argument(help="A run folder or an adapter folder.")],
    out: Annotated[Path, typer.Option(metavar="path", help="Folder to write the export into.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="lora; or its own form: native, and for lora-xs and lora-sb without their frozen factors: lora-xs "
            "(recomputed from the base), shared-factors (in one file above the folders of a family).",
        ),
    ] = "lora",
    prompt: Annotated[list[str] | None, typer.Option(metavar="text", help="Compare on this; repeat for more.")] = None,
    pad_rank: Annotated[bool, typer.Option(help="Pad all ranks to one that common servers take.")] = True,
    rank: Annotated[
        int | None,
        typer.Option(metavar="number", help="Recompress to this rank; what that leaves out is measured and said."),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Refuse a --rank that leaves something out.")] = False,
    rounds: Rounds = None,
    adapter: TaskOfRun = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
) -> None:
    """A LoRA folder that PEFT and LoRA servers load without leantune. The conversion is exact; before it is written,
    both models answer the same prompts (the run's own data unless --prompt is given), the exported one in a process
    without leantune. When they differ nothing is written and the exit code is 1. Only where --rank leaves out a part of
    the change the answers may differ: how far they do is printed.
    """
    from leantune.adapters import export_run
    from leantune.adapters.folder import of_task

    result = export_run(
        of_task(run, adapter),
        out,
        format=form,
        prompts=prompt or None,
        pad_rank=pad_rank,
        rank=rank,
        exact=exact,
        rounds=rounds,
        overwrite=overwrite,
        progress=say,
    )
    screen = console()
    if "conversion" not in result:
        _print_own_form(screen, result)
        return
    cost = result["conversion"]
    print_parity(screen, result["parity"])
    screen.print(f"largest weight error  {cost['max_abs_error']:.3g}")
    native, lora = cost["native_bytes"], cost["lora_bytes"]
    times = f"{lora / max(native, 1):.2f} times"
    screen.print(f"bytes                 {native / 1e6:,.2f} MB native, {lora / 1e6:,.2f} MB as LoRA ({times})")
    screen.print(f"rank                  {cost['rank']}, padded to {cost['padded_rank']}; {cost['modules']} modules")
    if cost["recompression"]:
        _print_recompression(screen, cost["recompression"], result["parity"])
    if cost["advice"]:
        screen.print(f"advice                {cost['advice']}", markup=False)
    screen.print(f"Written to [bold]{out}[/]", soft_wrap=True)


def _print_own_form(screen: Console, result: dict[str, Any]) -> None:
    sizes = result["bytes"]
    screen.print(
        f"bytes                 {sizes['native'] / 1e6:,.3f} MB before, {sizes['written'] / 1e6:,.3f} MB written"
    )
    if result["factor_file"]:
        where = Path(result["folder"]).parent / result["factor_file"]
        screen.print(f"shared factors        {sizes['shared'] / 1e6:,.3f} MB in {where}", soft_wrap=True)
    screen.print(f"read back             {result['factor_error']:.2e} off the trained change, at most")
    screen.print(f"Written to [bold]{result['folder']}[/]", soft_wrap=True)


def _print_recompression(screen: Console, left_out: dict[str, Any], parity: dict[str, Any]) -> None:
    total, worst = left_out["total"], left_out["layers"][left_out["worst"]]
    screen.print(
        f"left out              {total['relative']:.3%} of the change (norm {total['absolute']:.3g} of "
        f"{total['norm']:.3g}); rank {left_out['needed_rank']} leaves out nothing",
        soft_wrap=True,
    )
    screen.print(f"worst layer           {worst['relative']:.3%} in {left_out['worst']}", soft_wrap=True)
    if parity["remaining_share"] is not None:
        screen.print(f"in the logits         {parity['remaining_share']:.3%} of what the adapter does to them")
