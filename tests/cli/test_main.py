"""The root of the command line: help without weight, one clear line for every mistake, the right exit code."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from leantune import cli
from leantune.core.errors import DataError

Command = Callable[..., tuple[int, str, str]]


def fresh(*lines: str) -> str:
    """What a fresh Python prints for these lines."""
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(word: str) -> None:
    printed = fresh(
        "import sys, leantune.cli",
        "try:",
        f"    leantune.cli.main(['{word}'])",
        "except SystemExit as left:",
        "    print('code', left.code)",
        "heavy = ('torch', 'peft', 'transformers', 'typer', 'rich', 'pydantic', 'numpy')",
        "print('heavy', [name for name in heavy if name in sys.modules])",
        "print('commands', [name for name in sys.modules if name.startswith('leantune.cli.')])",
    )
    assert "code 0" in printed
    assert "heavy []" in printed
    assert "commands []" in printed


def test_help_lists_every_command_and_no_other(leantune: Command) -> None:
    code, out, _ = leantune("--help")
    assert code == 0
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and line.split()[0][0] not in "-l"]
    assert listed == list(cli.COMMANDS)


def test_no_command_is_a_usage_error(leantune: Command) -> None:
    code, out, _ = leantune()
    assert code == 2
    assert "Usage" in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_begins_with_the_line_of_the_table(name: str, leantune: Command) -> None:
    code, out, _ = leantune(name, "--help")
    assert code == 0
    assert cli.COMMANDS[name][1] in " ".join(out.split())


def test_unknown_command_suggests_the_nearest(leantune: Command) -> None:
    code, out, err = leantune("mehtods")
    assert (code, out) == (2, "")
    assert "did you mean 'methods'?" in err
    assert err.count("\n") == 1


def test_unknown_option_is_a_usage_error(leantune: Command) -> None:
    code, _, err = leantune("methods", "--jsn")
    assert code == 2
    assert "--json" in err


class Failing:
    """A command that fails in a given way."""

    help = ""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def main(self, **given: Any) -> None:
        raise self.error


def plant(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    methods = importlib.import_module("leantune.cli.methods")
    monkeypatch.setattr(methods, "command", lambda words: Failing(error))


def test_a_users_mistake_is_one_line_and_code_1(leantune: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, DataError("rows.jsonl:3: no 'prompt'; a prompt and a completion; add it"))
    assert leantune("methods") == (1, "", "error: rows.jsonl:3: no 'prompt'; a prompt and a completion; add it\n")


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    plant(monkeypatch, DataError("wrong"))
    if how == "environment":
        monkeypatch.setenv("LEANTUNE_DEBUG", "1")
    with pytest.raises(DataError, match="wrong"):
        cli.main(["methods", "--debug"] if how == "flag" else ["methods"])


def test_debug_behind_two_dashes_is_an_argument(leantune: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, DataError("wrong"))
    assert leantune("methods", "--", "--debug")[0] == 1


def test_a_missing_extra_is_named(leantune: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, ModuleNotFoundError("No module named 'sklearn'", name="sklearn"))
    code, _, err = leantune("methods")
    assert code == 1
    assert "pip install 'leantune[eval]'" in err


def test_a_module_of_no_extra_is_a_bug_and_shows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, ModuleNotFoundError("No module named 'nowhere'", name="nowhere"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["methods"])


def test_a_file_error_is_one_line(leantune: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, PermissionError(13, "Permission denied", "/x"))
    code, _, err = leantune("methods")
    assert code == 1
    assert err.startswith("error: PermissionError:")
    assert err.count("\n") == 1


def test_the_core_install_says_which_extra_the_commands_need() -> None:
    printed = fresh(
        "import sys, importlib.util, leantune.cli",
        "find = importlib.util.find_spec",
        "importlib.util.find_spec = lambda name, package=None: None if name == 'typer' else find(name, package)",
        "leantune.cli.main(['methods'])",
    )
    assert printed == "error: typer: not installed; needed for this command; pip install 'leantune[train]'\n"


def test_methods_as_json_is_the_registry(leantune: Command) -> None:
    from leantune.methods import names

    code, out, _ = leantune("methods", "--json")
    assert code == 0
    listed = {method["name"]: method for method in json.loads(out)}
    assert sorted(listed) == names()
    assert listed["lora"]["trainable_parameters_4096x4096"] == 8 * 2 * 4096
    assert listed["full"]["trainable_parameters_4096x4096"] == 4096**2


def test_methods_as_a_table(leantune: Command) -> None:
    code, out, _ = leantune("methods")
    assert code == 0
    assert "lora" in out
    assert "65,536" in out


def test_options_of_one_method(leantune: Command) -> None:
    code, out, _ = leantune("methods", "lora")
    assert code == 0
    assert "--lora-alpha int  default 8" in out
    assert "--task-type" not in out
    code, out, _ = leantune("methods", "lora", "--json")
    assert {"name": "r", "default": 8}.items() <= json.loads(out)["options"][0].items()


def test_unknown_method_suggests_the_nearest(leantune: Command) -> None:
    code, _, err = leantune("methods", "lroa")
    assert code == 1
    assert "did you mean 'lora'?" in err
