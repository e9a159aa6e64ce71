"""What the documents tell people to type exists: commands, make targets, options, files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from leantune import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if path.name != "CHANGELOG.md"]


def code_of(text: str) -> str:
    """Fenced blocks and inline code."""
    fenced = re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.DOTALL)
    return "\n".join([*fenced, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))])


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(path: Path) -> None:
    named = re.findall(
        r"^\s*(?:\.venv/bin/)?leantune ([a-z]+)", code_of(path.read_text(encoding="utf-8")), re.MULTILINE
    )
    assert set(named) <= set(cli.COMMANDS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(path: Path) -> None:
    named = re.findall(r"^\s*make ([a-z][a-z-]*)", code_of(path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    assert set(named) <= targets()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_phony_target_of_the_makefile_is_explained_or_plumbing() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    explained = set(re.findall(r"^#   make ([a-z-]+)", text, flags=re.MULTILINE))
    assert targets() - explained <= {"help", "install"}


def test_the_method_in_contributing_keeps_the_contract(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "outer.py").write_text(code, encoding="utf-8")
    # A process of its own: a method stays registered for as long as a process lives.
    check = "import outer; from leantune.testing import check_method; check_method('outer', families=['llama'])"
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=False, env={**os.environ, **threads}
    )
    assert done.returncode == 0, done.stderr


def test_the_reference_is_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "reference.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
