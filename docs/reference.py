"""Writes docs/reference.md from the texts in the code: commands, settings of a run, methods and their options.

python docs/reference.py            write it
python docs/reference.py --check    exit 1 when it is not what the code says
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from leantune.cli import COMMANDS
from leantune.cli.option import Option, options_of, run_options
from leantune.methods import Method, get, names
from leantune.train.config import RunConfig

PAGE = Path(__file__).with_name("reference.md")


def _table(options: Iterable[Option]) -> list[str]:
    lines = ["| name | type | default | what it does |", "|---|---|---|---|"]
    for option in options:
        cells = (f"`{option.name}`", option.type_name, _default(option.default), option.help)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _default(value: Any) -> str:
    if value is None:
        return ""
    return ("on" if value else "off") if isinstance(value, bool) else f"`{value}`"


def _command(name: str) -> list[str]:
    module, line = COMMANDS[name]
    built: Any = import_module(module).command([])
    kinds = getattr(built, "commands", {})
    text = [f"### leantune {name}", "", line, "", *([built.help, ""] if built.help and not kinds else [])]
    for kind, command in kinds.items():
        text += [f"`leantune {name} {kind}`: {' '.join(command.help.split())}", ""]
    return text


def _method(method: Method) -> list[str]:
    text = [f"### {method.name}", "", f"{method.title}: `{method.formula}`.", ""]
    if method.paper != "-":
        text[2] = text[2] + f" {method.paper}."
    facts = [
        f"Learning rate {method.default_learning_rate:g} unless given",
        "its result merges into the base" if method.mergeable else "its result does not merge",
        "exports as plain LoRA, exactly" if method.lora_form else "has no LoRA form",
    ]
    text += ["; ".join(facts) + ".", ""]
    if not method.config.__module__.startswith("leantune."):
        return [*text, f"Options: those of `{method.config.__module__.split('.')[0]}.{method.config.__name__}`.", ""]
    options = options_of(method.config, method.options)
    return [*text, *(_table(options) if options else ["No options."]), ""]


def page() -> str:
    """The whole page."""
    lines = ["# Reference", "", "Written by `docs/reference.py` from the code; change the texts there.", ""]
    lines += ["## Commands", "", "`leantune COMMAND --help` lists the options of a command.", ""]
    for name in COMMANDS:
        lines += _command(name)
    lines += ["## Settings of a run", "", "Keys of a recipe; with dashes they are the flags of `leantune train`.", ""]
    lines += [*_table(run_options(RunConfig)), "", "## Methods", ""]
    for name in names():
        lines += _method(get(name))
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        is_current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
        sys.exit(None if is_current else f"{PAGE.name} is not what the code says; run make docs")
    PAGE.write_text(page(), encoding="utf-8")
