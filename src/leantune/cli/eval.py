"""`leantune eval`: base and tuned model on a file, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from leantune.cli.command import console, one_command, progress_bar, say


def command(words: list[str]) -> Any:
    """The command `leantune eval`."""
    del words
    return one_command(evaluate_run)


def evaluate_run(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    data: Annotated[
        Path | None, typer.Option(metavar="path", help="Rows to score on; default: those the run evaluates on.")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="Format of the rows; default: as the run was told.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="name=name,...", help="Which column means what; default: as the run was told.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="int", help="Most new tokens of a generated answer.")] = 48,
    batch_size: Annotated[int, typer.Option(metavar="int", help="Rows or prompts at once.")] = 16,
    stop: Annotated[str | None, typer.Option(help="End generated answers at this text too.")] = None,
    metrics: Annotated[str | None, typer.Option(metavar="name,name", help="Only these metrics.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="int", help="Use only the first rows of the file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Language models: loss and perplexity of the answers, and exact match, BLEU and chrF (sacrebleu) of what the
    model writes; rows with the same prompt are one input with several references. Classifiers and regressions have
    their own metrics.

    Brackets are 95% intervals (bootstrap over inputs); the last column is the paired difference on the same inputs,
    coloured when its interval leaves out zero. The numbers also go into run.json.
    """
    from leantune.cli.comparison import compare, note, table
    from leantune.core.errors import ConfigError, describe
    from leantune.data import read_rows
    from leantune.evaluate import METRICS
    from leantune.train import Run
    from leantune.train.rows import held_out

    opened = Run.open(run)
    chosen, split = data or opened.config.eval_data, "validation"
    if chosen is not None:
        asked = {"format": form, "columns": columns}
        if form is None and columns is None:
            asked = {"format": opened.config.format, "columns": opened.config.columns}
        rows = read_rows(chosen, split=split, limit=limit, **asked)
    elif opened.config.eval_share is not None:
        # The run held rows of its own file out; they are found again by their hash.
        chosen, split, rows = opened.config.data, "train", held_out(opened.config)[:limit]
    else:
        raise ConfigError(
            describe("--data", "missing", "rows to score on; the run has no eval_data", "give --data FILE")
        )
    say(f"loading {opened.config.model} and {opened.result}")
    base, _ = opened.load()
    names = [name.strip() for name in metrics.split(",")] if metrics else None
    with progress_bar() as progress:
        found = compare(
            opened,
            rows,
            metrics=names,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            stop=stop,
            progress=progress,
        )
    if limit is None:
        note(opened, chosen, found, split)
    if as_json:
        typer.echo(json.dumps({"data": chosen.as_posix(), "note": base.note, **found.to_dict()}, indent=2))
        return
    out = console()
    out.print(table(found))
    about = f"{found.tuned.n:,} inputs from {found.tuned.rows:,} rows of {chosen}"
    if found.tuned.truncated:
        about += f"; {found.tuned.truncated} rows were cut"
    out.print(about, style="dim", markup=False, soft_wrap=True)
    units = [f"{METRICS[name].title} in {METRICS[name].unit}" for name in found.difference if METRICS[name].unit]
    signatures = [text for name, text in found.tuned.settings.items() if name.endswith("_signature")]
    for text in ("; ".join(units), *signatures, base.note):
        if text:
            out.print(text, style="dim", markup=False, soft_wrap=True)
