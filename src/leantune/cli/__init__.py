"""The command line: a table of commands, each one thin file, imported when it is used.

``leantune --help`` and ``--version`` import neither torch nor a command. Everything a user can cause ends in one
clear line and exit code 1 (2 for a wrong command line); ``--debug`` or ``LEANTUNE_DEBUG=1`` shows the traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from leantune.core.errors import LeantuneError, describe, did_you_mean, require

# name -> (module, the one line that both `leantune --help` and `leantune NAME --help` show)
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("leantune.cli.train", "Fine-tune a model on your data."),
    "generate": ("leantune.cli.generate", "Ask a trained model, or its base."),
    "chat": ("leantune.cli.chat", "Talk with a trained model, its base beside it."),
    "eval": ("leantune.cli.eval", "Score base and trained model side by side."),
    "merge": ("leantune.cli.merge", "Write the adapter into its base, and prove it the same."),
    "export": ("leantune.cli.export", "Write the adapter as plain LoRA, and prove it the same."),
    "push": ("leantune.cli.push", "Upload a run's adapter to the Hugging Face Hub."),
    "pull": ("leantune.cli.pull", "Fetch an adapter from the Hugging Face Hub into a run folder."),
    "inspect": ("leantune.cli.inspect", "Look into a data file, an adapter or a model."),
    "methods": ("leantune.cli.methods", "List the methods, or the options of one of them."),
    "doctor": ("leantune.cli.doctor", "Say what is installed, what is missing, and how to mend it."),
    "demo": ("leantune.cli.demo", "Fine-tune a real model in minutes, and compare before and after."),
}

_DISTRIBUTION = {"yaml": "pyyaml", "sklearn": "scikit-learn"}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code.

    Args:
        argv: the words after ``leantune``; those of this process when None.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("LEANTUNE_DEBUG", "") not in ("", "0")
    options = words[: words.index("--")] if "--" in words else words
    if "--debug" in options:
        words.remove("--debug")
        debug = True
    if not words or words[0] in ("--help", "-h"):
        print(_help(sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        print(_version_line())
        sys.exit(0)
    name = words.pop(0)
    if name not in COMMANDS:
        _fail(f"leantune {name}: no such command; {did_you_mean(name, COMMANDS)}", code=2)
    try:
        require("typer", "train")
        command = importlib.import_module(COMMANDS[name][0]).command(words)
        command.help = f"{COMMANDS[name][1]}\n\n{command.help or ''}"
        command.main(args=words, prog_name=f"leantune {name}")
    except LeantuneError as error:
        if debug:
            raise
        _fail(str(error))
    except ModuleNotFoundError as error:
        extra = _extra_of(error.name or "")
        if extra is None or debug:
            raise
        _fail(describe(str(error.name), "not installed", "needed for this command", f"pip install 'leantune[{extra}]'"))
    except OSError as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {error}; --debug shows where")
    sys.exit(0)


def _fail(text: str, code: int = 1) -> NoReturn:
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\033[1;31merror:\033[0m {text}" if colour else f"error: {text}", file=sys.stderr)
    sys.exit(code)


def _help(colour: bool) -> str:
    """The table as text. Plain on purpose: typer and rich would take longer to import than the rest of this."""
    width = max(len(name) for name in COMMANDS)
    bold, plain = ("\033[1;36m", "\033[0m") if colour else ("", "")
    return "\n".join(
        [
            "Fine-tune a language model by training a sliver of it, and prove what that bought.",
            "",
            "Usage: leantune COMMAND [OPTIONS]",
            "",
            *(f"  {bold}{name:<{width}}{plain}  {line}" for name, (_, line) in COMMANDS.items()),
            "",
            "  leantune COMMAND --help   the options of a command",
            "  leantune --version        the version, with those of torch, transformers and PEFT",
            "  --debug                   after any command: the traceback of an error",
        ]
    )


def _extra_of(module: str) -> str | None:
    """The extra of leantune that brings a module, or None when none does."""
    from importlib.metadata import PackageNotFoundError, requires

    distribution = _DISTRIBUTION.get(module.partition(".")[0], module.partition(".")[0])
    try:
        lines = requires("leantune") or []
    except PackageNotFoundError:
        return None
    for line in lines:
        requirement, _, marker = line.partition(";")
        if requirement.lower().startswith(distribution.lower()) and "extra ==" in marker:
            return marker.partition("extra ==")[2].strip(" \"'")
    return None


def _version_line() -> str:
    """The version, with those of what decides numbers: a bug report needs one line."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from leantune import __version__

    parts = []
    for name in ("torch", "transformers", "peft"):
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            parts.append(f"{name} missing")
    return f"leantune {__version__} ({', '.join(parts)}, Python {platform.python_version()})"
