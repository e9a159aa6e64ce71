"""`leantune train`: a run from a recipe, from flags, or from both; the flags are the fields of the run's config."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leantune.cli.command import console, one_command, program, say
from leantune.cli.option import options_of, run_options, with_options
from leantune.core.errors import ConfigError, RunError, describe

if TYPE_CHECKING:
    from leantune.train import RunConfig

_RECIPES = (".yaml", ".yml")


def command(words: list[str]) -> Any:
    """The command `leantune train`, with the options of the method that the words name."""
    from leantune.train.config import RunConfig

    options = [(option, "Run") for option in run_options(RunConfig, without=["method_options"])]
    name = _method_named(words)
    if name is None and not {"--help", "-h"} & set(words):
        name = RunConfig.model_fields["method"].default
    if name is not None:
        from leantune.methods import get

        method = get(name)
        options += [(option, f"Method {name}") for option in options_of(method.config, method.options)]
    return one_command(with_options(train, options))


def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="A YAML recipe; flags win over it. With --resume also a run folder.", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="key=value", help="Set any field of the recipe; repeat as needed."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Resolve and check everything, say what would happen, train nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run from its newest checkpoint: the same bits on a CPU.")
    ] = False,
    resume_anyway: Annotated[
        bool, typer.Option("--resume-anyway", help="The same under other library versions or on another device.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")] = False,
    **given: Any,
) -> None:
    """Without a recipe, --model, --data and --out are needed. `--method NAME --help` adds the options of that method
    to this list.

    The run folder holds the adapter, config.yaml, metrics.jsonl, loss.png, run.json and checkpoints; a run that was
    killed leaves its last good state there, and `leantune train --resume FOLDER` goes on from it.
    """
    resume = resume or resume_anyway
    if resume and dry_run:
        do = "drop --dry-run: what does not fit is refused before anything is written"
        raise ConfigError(describe("--dry-run", "with --resume", "one of them", do))
    config = configuration(recipe, settings or [], given, resume=resume)
    if dry_run:
        _say_what_would_happen(config, as_json)
        return
    if as_json:
        raise ConfigError(describe("--json", "without --dry-run", "a dry run", "add --dry-run; a run writes run.json"))
    from leantune.train import distributed, fit

    if lost := distributed.lost_processes():
        say(lost)
    try:
        run = fit(config, resume=resume, resume_anyway=resume_anyway)
    except KeyboardInterrupt:
        typer.echo(
            f"stopped at once; {program()} train --resume {config.out} goes on from the last checkpoint", err=True
        )
        raise typer.Exit(_exit_code("SIGINT")) from None
    stopped_by = run.summary.get("signal")
    if distributed.is_main():
        _say_what_next(run.folder, config, is_complete=stopped_by is None)
    distributed.leave()
    if stopped_by is not None:
        raise typer.Exit(_exit_code(stopped_by))


def _exit_code(name: str) -> int:
    """As a shell counts a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + signal.Signals[name]


def _say_what_would_happen(config: RunConfig, as_json: bool) -> None:
    from leantune.cli.preview import print_preview
    from leantune.train import dry_run

    found = dry_run(config)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_preview(console(), found)


def configuration(
    recipe: Path | None, settings: list[str], given: dict[str, Any], *, resume: bool = False
) -> RunConfig:
    """The run's config: the recipe (that of the run to go on with), then ``--set``, then the flags that were given."""
    from leantune.train.config import RunConfig, apply_overrides

    flags = [
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, values in given.items()
        for value in (values if isinstance(values, list) else [values])
        if value is not None
    ]
    overrides = [*settings, *flags]
    if recipe is None and resume and given.get("out"):
        recipe = Path(given["out"])
    if recipe is not None and (recipe.is_dir() or (resume and recipe.suffix not in _RECIPES)):
        recipe = _config_of_run(recipe, resume)
        overrides.append(f"out={recipe.parent}")
    return RunConfig.from_yaml(recipe, overrides) if recipe else RunConfig(**apply_overrides({}, overrides))


def _config_of_run(folder: Path, resume: bool) -> Path:
    from leantune.train.folder import CONFIG

    if not resume:
        raise ConfigError(
            describe(str(folder), "a folder", "a YAML recipe", "add --resume to go on with the run in it")
        )
    if not (folder / CONFIG).is_file():
        got = f"no {CONFIG}" if folder.exists() else "not there"
        raise RunError(describe(str(folder), got, "the folder of a run to go on with", "check the path"))
    return folder / CONFIG


def _method_named(words: list[str]) -> str | None:
    """The method that a command line asks for: by flag, by --set, or in the recipe; None when nothing does."""
    name = None
    for index, word in enumerate(words):
        for start in ("--method=", "--set=method="):
            if word.startswith(start):
                name = word.removeprefix(start)
        if word == "--method" and index + 1 < len(words):
            name = words[index + 1]
        if word.startswith("method=") and index and words[index - 1] == "--set":
            name = word.removeprefix("method=")
    if name is None:
        resumes = not {"--resume", "--resume-anyway"}.isdisjoint(words)
        recipes = [f"{word}/config.yaml" if resumes and Path(word).is_dir() else word for word in words]
        name = next((found for word in recipes if (found := _method_of_recipe(word))), None)
    return name


def _method_of_recipe(word: str) -> str | None:
    import yaml

    if not word.endswith(_RECIPES) or not Path(word).is_file():
        return None
    try:
        values = yaml.safe_load(Path(word).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        # Reading the recipe for the run says what is wrong with it.
        return None
    return values.get("method") if isinstance(values, dict) else None


def _say_what_next(folder: Path, config: RunConfig, is_complete: bool) -> None:
    from leantune.train.setup import HEAD_TASKS

    out, name = console(), program()
    out.print("\nNext:")
    if config.tasks:
        _say_what_next_of_tasks(folder, config, is_complete)
        return
    # A plain LoRA holds no head.
    onward = f"merge {folder}" if config.task in HEAD_TASKS else f"export {folder} --format lora"
    # Without --data, eval takes the rows that the run evaluates on.
    has_rows = config.eval_data is not None or config.eval_share is not None
    for line in (
        *([] if is_complete else [f"{name} train --resume {folder}"]),
        *([f"{name} generate {folder} --prompt '...'"] if config.task == "causal-lm" else []),
        f"{name} eval {folder}" + ("" if has_rows else " --data FILE"),
        *([f"{name} {onward} --out DIR"] if config.chosen_method.is_adapter else []),
    ):
        out.print("  " + line, markup=False, soft_wrap=True)


def _say_what_next_of_tasks(folder: Path, config: RunConfig, is_complete: bool) -> None:
    from leantune.train.setup import HEAD_TASKS

    first, task = next(iter(config.tasks.items()))
    is_text = (task.kind or config.task) not in HEAD_TASKS
    onward = f"export {folder} --adapter {first} --format lora" if is_text else f"merge {folder} --adapter {first}"
    has_rows = config.eval_share is not None or all(each.eval_data is not None for each in config.tasks.values())
    for line in (
        *([] if is_complete else [f"train --resume {folder}"]),
        *([f"generate {folder} --adapter {first} --prompt '...'"] if is_text else []),
        f"eval {folder}" + ("" if has_rows else f" --adapter {first} --data FILE"),
        f"{onward} --out DIR",
    ):
        console().print(f"  {program()} {line}", markup=False, soft_wrap=True)
