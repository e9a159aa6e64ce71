"""`leantune generate`: ask a trained model, or its base."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from leantune.cli.command import Rounds, TaskOfRun, console, one_command, printable, progress_bar, say
from leantune.core.errors import ConfigError, DataError, describe, raise_all


def command(words: list[str]) -> Any:
    """The command `leantune generate`."""
    del words
    return one_command(generate)


def generate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    prompt: Annotated[list[str] | None, typer.Option(metavar="text", help="A prompt; repeat for more.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Prompts: one a line, or the prompt column of a .jsonl file.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="int", help="Most new tokens of an answer.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="float", help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(metavar="float", help="Draw from this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(metavar="int", help="Seed of the draws.")] = 0,
    stop: Annotated[str | None, typer.Option(help="End an answer at this text too.")] = None,
    adapter: TaskOfRun = None,
    rounds: Rounds = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap each prompt in the model's chat template.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Ask the base model, without what was trained.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print prompts and answers as JSON.")] = False,
) -> None:
    """Prompts come from --prompt, from --file, or as one text from standard input. A model trained on messages is
    asked through its chat template with --chat.
    """
    prompts = _prompts(prompt or [], file)
    from leantune.adapters.truncation import keep_rounds
    from leantune.cli.comparison import base_of
    from leantune.data import Row, prompt_ids
    from leantune.evaluate import generate as answer
    from leantune.train import Run

    opened = Run.open(run, adapter)
    if opened.config.task != "causal-lm":
        own = f" --adapter {adapter}" if adapter else ""
        got, do = f"trained for {opened.config.task}", f"leantune eval {run} --data FILE{own} scores it"
        raise ConfigError(describe(str(run), got, "a language model", do))
    say(f"loading {opened.config.model}" + ("" if base else f" and {opened.result}"))
    opened.load()
    keep_rounds(opened.model, rounds)
    asked: list[Any] = list(prompts)
    if chat:
        turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": ""}] for text in prompts]
        asked = [prompt_ids(Row(where="--prompt", messages=turn), opened.tokenizer) for turn in turns]
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": stop, "seed": seed}
    if temperature > 0:
        settings |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
    with progress_bar() as progress:
        if base:
            with base_of(opened) as model:
                answers = answer(model, opened.tokenizer, asked, progress=progress, **settings)
        else:
            answers = answer(opened.model, opened.tokenizer, asked, progress=progress, **settings)
    _show(prompts, answers, as_json)


def _show(prompts: list[str], answers: list[str], as_json: bool) -> None:
    if as_json:
        pairs = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, answers, strict=True)]
        typer.echo(json.dumps(pairs, indent=2, ensure_ascii=False))
        return
    out = console()
    for index, (prompt, text) in enumerate(zip(prompts, answers, strict=True)):
        if len(prompts) > 1:
            out.print(prompt, style="cyan", markup=False, soft_wrap=True)
        out.print(printable(text.strip()) if out.is_terminal else text.strip(), markup=False, soft_wrap=True)
        if index + 1 < len(prompts):
            out.print()


def _prompts(given: list[str], file: Path | None) -> list[str]:
    prompts = given + (_from_file(file) if file else [])
    if not given and file is None and not sys.stdin.isatty():
        prompts = [sys.stdin.read().removesuffix("\n")]
    if not [prompt for prompt in prompts if prompt]:
        raise DataError(describe("prompts", "none", "at least one", "give --prompt TEXT or --file FILE"))
    return prompts


def _from_file(path: Path) -> list[str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return lines
    prompts, problems = [], []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError):
            problems.append(describe(f"{path}:{number}", line[:40], "an object with a 'prompt'", "mend the line"))
    raise_all(problems, DataError)
    # Rows that share a prompt (several references) are one question.
    return list(dict.fromkeys(prompts))
