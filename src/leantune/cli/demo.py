"""`leantune demo`: a real model fine-tuned on real text, and what that changed, in minutes on a laptop.

Training comes first, then a few prompts before and after, then BLEU of both on the test inputs: the base needs no
load of its own, since it is the trained model with its adapter switched off.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from leantune.cli.command import console, one_command, printable, program, progress_bar, say
from leantune.core.errors import ConfigError, describe

if TYPE_CHECKING:
    from leantune.cli.comparison import Comparison
    from leantune.evaluate import Input
    from leantune.train import Run

# Above src/leantune/cli: the root of a checkout. From an installed wheel there is no examples/ there.
_ROOT = Path(__file__).resolve().parents[3]
_SHOWN = 4
_NEW_TOKENS = 48
_BATCH = 32


def command(words: list[str]) -> Any:
    """The command `leantune demo`."""
    del words
    return one_command(demo)


def demo(
    full: Annotated[bool, typer.Option("--full", help="Train longer, for a better score.")] = False,
    data: Annotated[Path | None, typer.Option(metavar="path", help="Folder with train.jsonl and test.jsonl.")] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="path", help="Settings of the run.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="path", help="Run folder; default: the recipe's.")] = None,
) -> None:
    """SmolLM2-135M learns to put facts about a restaurant into a sentence (E2E NLG), with S2FT. Shows prompts before
    and after, BLEU before and after, and what it took. The settings are examples/recipes/demo.yaml (--full:
    demo-full.yaml) and the rows examples/data/e2e_nlg, both of a checkout of the repository.
    """
    began = time.perf_counter()
    recipe = recipe or _in_checkout("recipes/demo-full.yaml" if full else "recipes/demo.yaml")
    data = data or _in_checkout("data/e2e_nlg")
    # Imports of seconds: a wrong path should not have to wait for them.
    from leantune.cli.comparison import compare, note
    from leantune.data import read_rows
    from leantune.evaluate import group_references
    from leantune.models import embedded
    from leantune.train import RunConfig, fit

    overrides = [f"data={data / 'train.jsonl'}", *([f"out={out}"] if out else [])]
    config = RunConfig.from_yaml(recipe, overrides)
    rows = read_rows(data / "test.jsonl")
    screen = console()
    if config.model == embedded.EMBEDDED_NAME:
        embedded.ensure(say)
    run = fit(config)
    if run.summary["status"] != "complete":
        # Ctrl-C asked for an end, not for minutes of scoring.
        raise typer.Exit(130)
    inputs = group_references(rows)
    _show_samples(screen, run, inputs[:: max(len(inputs) // _SHOWN, 1)][:_SHOWN])
    say(f"scoring {len(inputs)} test inputs, before and after")
    with progress_bar() as progress:
        found = compare(run, rows, metrics=["bleu"], max_new_tokens=_NEW_TOKENS, batch_size=_BATCH, progress=progress)
    note(run, data / "test.jsonl", found)
    _show_result(screen, run, found, time.perf_counter() - began)
    _show_next(screen, run, min((each.row.prompt or "" for each in inputs), key=len), data)


def _in_checkout(path: str) -> Path:
    found = _ROOT / "examples" / path
    if not found.exists():
        got = f"no examples/{path} beside the installed package"
        do = "run it in a checkout, or give --data and --recipe"
        raise ConfigError(describe("demo", got, "a checkout of the repository", do))
    return found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found


def _show_samples(screen: Console, run: Run, inputs: list[Input]) -> None:
    """A few prompts, with what the model wrote before and what it writes now."""
    from leantune.cli.comparison import base_of
    from leantune.evaluate import generate

    prompts = [each.row.prompt or "" for each in inputs]
    after = generate(run.model, run.tokenizer, prompts, max_new_tokens=_NEW_TOKENS)
    with base_of(run) as model:
        before = generate(model, run.tokenizer, prompts, max_new_tokens=_NEW_TOKENS)
    screen.print("\n[bold]The same prompts, before and after[/]")
    for prompt, old, new in zip(prompts, before, after, strict=True):
        screen.print()
        screen.print(Text(prompt.removesuffix("\nSentence:"), style="cyan"))
        said = {
            title: printable(" ".join(text.split())) or "(nothing)" for title, text in (("before", old), ("after", new))
        }
        _print_pairs(screen, said, styles={"before": "dim", "after": "green"})


def _show_result(screen: Console, run: Run, found: Comparison, seconds: float) -> None:
    from leantune.cli.comparison import interval

    facts = run.summary
    share = facts["trainable_parameters"] / facts["total_parameters"]
    memory = facts["peak_memory_bytes"]
    bleu, config = found.difference["bleu"], run.config
    lines = {
        "BLEU before": f"{interval(found.base.metrics['bleu'])}",
        "BLEU after": f"{interval(found.tuned.metrics['bleu'])}",
        "difference": f"{interval(bleu, sign=True)}, paired",
        "measured": f"sacrebleu, {found.tuned.n} distinct test inputs with all their {found.tuned.rows:,} references, "
        f"greedy, {_NEW_TOKENS} new tokens; brackets are 95% intervals",
        "trained": f"{facts['trainable_parameters']:,} parameters of {facts['total_parameters']:,} ({share:.2%}), "
        f"{config.method}, {facts['steps']} steps of {config.batch_size} rows",
        "time": f"{_clock(facts['train_time_s'])} training, {_clock(seconds)} in all",
        "peak memory": "unknown" if memory is None else f"{memory / 2**30:.2f} GiB while training",
        "run folder": str(run.folder),
    }
    if run.base is not None and run.base.note:
        lines["base model"] = run.base.note
    screen.print("\n[bold]What it bought[/]\n")
    _print_pairs(screen, lines, styles={"BLEU after": "bold green"})


def _print_pairs(screen: Console, pairs: dict[str, str], styles: dict[str, str]) -> None:
    """Titles left, texts right, aligned where they wrap."""
    grid = Table.grid(padding=(0, 2))
    for title, text in pairs.items():
        grid.add_row(Text(title, style="cyan"), Text(text, style=styles.get(title, "")))
    screen.print(Padding(grid, (0, 0, 0, 2)))


def _show_next(screen: Console, run: Run, prompt: str, data: Path) -> None:
    name, folder = program(), run.folder.as_posix()
    asked = shlex.quote(prompt.replace("\\", "\\\\").replace("\n", "\\n").replace("%", "%%"))
    screen.print("\n[bold]Try next[/]\n")
    for line in (
        f"printf {asked} | {name} generate {shlex.quote(folder)}",
        f"{name} eval {shlex.quote(folder)} --data {shlex.quote((data / 'validation.jsonl').as_posix())}",
        f"{name} export {shlex.quote(folder)} --format lora --out {shlex.quote(folder + '-lora')}",
    ):
        screen.print(Text("  " + line), soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
