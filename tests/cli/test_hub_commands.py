"""`leantune push` and `leantune pull`: what they print and ask, and that a dry run uploads nothing."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leantune.adapters import hub, publication
from leantune.core.errors import HubError

Command = Callable[..., tuple[int, str, str]]
PARITY: dict[str, Any] = {
    "ok": True,
    "prompts": 2,
    "positions": 10,
    "max_abs_logit_difference": 0.0,
    "tolerance": 1e-5,
    "mean_kl": 0.0,
    "argmax_agreement": 1.0,
    "greedy_agreement": 1.0,
    "new_tokens": 4,
}


class Calls:
    """What was asked of the Hub's side, and with what."""

    def __init__(self) -> None:
        self.built: dict[str, Any] = {}
        self.pushed: list[dict[str, Any]] = []
        self.exists = False


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Building and uploading without a model and without a Hub; tests/adapters has the real ones."""
    found = Calls()

    def prepare(run: Path, repo_id: str, folder: Path, **given: Any) -> dict[str, Any]:
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("card")
        found.built = given
        base = {"name": "smollm2-135m", "source": "embedded"}
        return {"files": {"README.md": 4, "native/adapter_model.safetensors": 12345}, "base": base, "parity": PARITY}

    def push(folder: Path, repo_id: str, **given: Any) -> str:
        assert (folder / "README.md").is_file()
        found.pushed.append({"repo_id": repo_id, **given})
        return f"https://hub.invalid/{repo_id}/commit/1"

    def check(repo_id: str, **given: Any) -> dict[str, Any]:
        return {"user": "someone", "exists": found.exists}

    monkeypatch.setattr(publication, "prepare", prepare)
    monkeypatch.setattr(hub, "push", push)
    monkeypatch.setattr(hub, "check_target", check)
    return found


def test_a_dry_run_builds_and_lists_and_uploads_nothing(
    calls: Calls, trained: Path, tmp_path: Path, leantune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "check_target", lambda *words, **given: pytest.fail("asked the Hub"))
    code, out, _ = leantune("push", trained, "someone/it", "--dry-run", "--keep", tmp_path / "kept", "--license", "mit")
    assert code == 0
    assert "12,345 bytes" in out
    assert "not a model of the Hub; the card says why" in out
    assert "nothing was uploaded" in out
    assert (tmp_path / "kept" / "README.md").is_file()
    assert calls.pushed == []
    card = calls.built["card"]
    assert card["license"] == "mit"
    assert {"Training", "Result"} <= set(card["sections"])


def test_a_push_needs_a_word_for_it(
    calls: Calls, trained: Path, leantune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, _, err = leantune("push", trained, "someone/it")
    assert code == 1
    assert "a PUBLIC repository" in err
    assert "--yes" in err
    calls.exists = True
    _, _, err = leantune("push", trained, "someone/it")
    assert "replace the adapter in someone/it" in err
    _, _, err = leantune("push", trained, "someone/it", "--create-pr")
    assert "open a pull request" in err
    assert calls.pushed == []
    code, out, _ = leantune("push", trained, "someone/it", "--yes", "--private", "--revision", "v2")
    assert code == 0
    assert "https://hub.invalid/someone/it/commit/1" in out
    assert calls.pushed == [{"repo_id": "someone/it", "private": True, "revision": "v2", "create_pr": False}]


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 1), ("\n", 1)])
def test_a_person_is_asked(
    answer: str, code: int, calls: Calls, trained: Path, leantune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr("typer.confirm", lambda text: answer.startswith("y") and "PUBLIC" in text)
    assert leantune("push", trained, "someone/it")[0] == code
    assert len(calls.pushed) == (code == 0)


def test_what_is_wrong_is_told_before_anything_is_built(
    calls: Calls, trained: Path, tmp_path: Path, leantune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = leantune("push", trained, "it", "--dry-run")
    assert (code, "owner/name" in err) == (1, True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, _, err = leantune("push", trained, "someone/it", "--dry-run", "--keep", tmp_path / "full")
    assert (code, "already there" in err) == (1, True)

    def refuse(*words: Any, **given: Any) -> None:
        raise HubError("someone/it: no token here; one, to push; hf auth login")

    monkeypatch.setattr(hub, "check_target", refuse)
    code, _, err = leantune("push", trained, "someone/it", "--yes")
    assert (code, "hf auth login" in err) == (1, True)
    assert calls.built == {}


def test_pull_says_what_it_verified_and_what_next(
    tmp_path: Path, leantune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def pull(repo_id: str, out: Path, **words: Any) -> dict[str, Any]:
        given.update(words, repo_id=repo_id)
        out.mkdir()
        (out / "run.json").write_text("{}")
        return {"folder": str(out), "method": "s2ft", "base": "b", "verified": "every tensor", "bytes": 2_500_000}

    monkeypatch.setattr(hub, "pull", pull)
    code, out, _ = leantune("pull", "someone/it", "--out", tmp_path / "it", "--revision", "v2", "--base", "b")
    assert code == 0
    assert (given["repo_id"], given["revision"], given["base"], given["overwrite"]) == ("someone/it", "v2", "b", False)
    assert "s2ft adapter for b, 2.50 MB" in out
    assert "verified: every tensor" in out
    assert f"chat {tmp_path / 'it'}" in out
