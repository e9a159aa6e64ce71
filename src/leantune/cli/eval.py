"""`leantune eval`: base and tuned model on a file, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leantune.cli.command import Rounds, TaskOfRun, console, one_command, progress_bar, say

if TYPE_CHECKING:
    from leantune.cli.comparison import Comparison
    from leantune.train import Run


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
    adapter: TaskOfRun = None,
    rounds: Rounds = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Language models: loss and perplexity of the answers, and exact match, BLEU and chrF (sacrebleu) of what the
    model writes; rows with the same prompt are one input with several references. Classifiers and regressions have
    their own metrics. Of a run with several tasks each one is scored on its own rows, unless --adapter names one.

    Brackets are 95% intervals (bootstrap over inputs); the last column is the paired difference on the same inputs,
    coloured when its interval leaves out zero. The numbers also go into run.json, unless --limit or --rounds is given.
    """
    from leantune.core.errors import ConfigError, describe
    from leantune.train import Run

    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "stop": stop}
    settings["metrics"] = [name.strip() for name in metrics.split(",")] if metrics else None
    opened = Run.open(run, adapter)
    if not opened.config.tasks:
        chosen, split, rows = _rows(opened, data, form, columns, limit)
        found = _scores(opened, rows, settings, rounds)
        if limit is None and rounds is None:
            _note(opened, chosen, found, split)
        _show({"data": chosen.as_posix()}, opened, found, as_json)
        return
    if data is not None:
        got = f"{data} for {len(opened.config.tasks)} tasks"
        raise ConfigError(describe("--data", got, "the task whose rows these are", "add --adapter TASK"))
    scored: dict[str, Any] = {}
    # What is missing is known before the first model is loaded.
    all_rows = {name: _rows(opened.of_task(name), None, form, columns, limit) for name in opened.config.tasks}
    for name, (chosen, split, rows) in all_rows.items():
        task = opened.of_task(name)
        found = _scores(task, rows, settings, rounds)
        if limit is None and rounds is None:
            _note(task, chosen, found, split)
        if as_json:
            scored[name] = _plain({"data": chosen.as_posix()}, task, found)
        else:
            console().print(f"task {name}: {task.config.task}", style="cyan", markup=False)
            _show({"data": chosen.as_posix()}, task, found, False)
    if as_json:
        typer.echo(json.dumps({"tasks": scored}, indent=2))


def _rows(
    opened: Run, data: Path | None, form: str | None, columns: str | None, limit: int | None
) -> tuple[Path, str, list[Any]]:
    """What to score on: the file, which split of it, and the rows."""
    from leantune.core.errors import ConfigError, describe
    from leantune.data import read_rows
    from leantune.train.rows import held_out

    config = opened.config
    chosen = data or config.eval_data
    if chosen is not None:
        asked: dict[str, Any] = {"format": form, "columns": columns}
        if form is None and columns is None:
            asked = {"format": config.format, "columns": config.columns}
        return chosen, "validation", read_rows(chosen, split="validation", limit=limit, **asked)
    if config.eval_share is not None:
        # The run held rows of its own file out; they are found again by their hash.
        return config.data, "train", held_out(config)[:limit]
    what = f"task {opened.task}" if opened.task is not None else "the run"
    wanted = f"rows to score on; {what} has no eval_data"
    do = "give --data FILE" + (f" with --adapter {opened.task}" if opened.task is not None else "")
    raise ConfigError(describe("--data", "missing", wanted, do))


def _scores(opened: Run, rows: list[Any], settings: dict[str, Any], rounds: int | None) -> Comparison:
    from leantune.adapters.truncation import keep_rounds
    from leantune.cli.comparison import compare

    say(f"loading {opened.config.model} and {opened.result}")
    opened.load()
    keep_rounds(opened.model, rounds)
    with progress_bar() as progress:
        return compare(opened, rows, progress=progress, **settings)


def _note(opened: Run, chosen: Path, found: Comparison, split: str) -> None:
    from leantune.cli.comparison import note

    note(opened, chosen, found, split)


def _plain(about: dict[str, Any], opened: Run, found: Comparison) -> dict[str, Any]:
    return {**about, "note": opened.base.note if opened.base is not None else None, **found.to_dict()}


def _show(about: dict[str, Any], opened: Run, found: Comparison, as_json: bool) -> None:
    from leantune.cli.comparison import table
    from leantune.evaluate import METRICS

    if as_json:
        typer.echo(json.dumps(_plain(about, opened, found), indent=2))
        return
    out = console()
    out.print(table(found))
    text = f"{found.tuned.n:,} inputs from {found.tuned.rows:,} rows of {about['data']}"
    if found.tuned.truncated:
        text += f"; {found.tuned.truncated} rows were cut"
    out.print(text, style="dim", markup=False, soft_wrap=True)
    units = [f"{METRICS[name].title} in {METRICS[name].unit}" for name in found.difference if METRICS[name].unit]
    signatures = [text for name, text in found.tuned.settings.items() if name.endswith("_signature")]
    for text in ("; ".join(units), *signatures, opened.base.note if opened.base is not None else None):
        if text:
            out.print(text, style="dim", markup=False, soft_wrap=True)
