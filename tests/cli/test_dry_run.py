"""`leantune train --dry-run`: what it prints, and that it leaves the disk alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def words(tiny: Path, rows: Path, tmp_path: Path) -> list[Any]:
    options = ["--max-steps", 6, "--batch-size", 4, "--heads", 1, "--channels", 8, "--lr", 0.02]
    return ["train", "--model", tiny, "--data", rows, "--out", tmp_path / "run", *options, "--dry-run"]


def test_it_prints_what_would_train(words: list[Any], tmp_path: Path, leantune: Command) -> None:
    code, out, _ = leantune(*words)
    assert code == 0
    assert list(tmp_path.iterdir()) == []
    for text in (
        "model.layers.*.mlp.down_proj.s2ft_slice x2",
        "(32, 8)",
        "256 each",
        "16 rows",
        "6 of 4 rows, 1.5 epochs; 4 batches an epoch",
        "computed positions are padding (in the first epoch)",
        "0.02, cosine, 1 warm-up steps, AdamW",
        "nothing was trained",
    ):
        assert text in out
    assert (tmp_path / "run" / "adapter").as_posix() in out


def test_json_is_for_scripts(words: list[Any], leantune: Command) -> None:
    code, out, _ = leantune(*words, "--json", "--set", "channels=4", "--seed", 3)
    found = json.loads(out)
    assert code == 0
    assert found["method"]["name"] == "s2ft"
    assert (found["config"]["method_options"]["channels"], found["method"]["config"]["seed"]) == (8, 3)
    assert found["steps"]["steps"] == 6


def test_json_without_a_dry_run_is_refused(words: list[Any], tmp_path: Path, leantune: Command) -> None:
    code, _, err = leantune(*words[:-1], "--json")
    assert code == 1
    assert "--dry-run" in err
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_is_one_line(words: list[Any], trained: Path, leantune: Command) -> None:
    words[words.index("--out") + 1] = trained
    code, _, err = leantune(*words)
    assert code == 1
    assert "holds a run already" in err
    assert err.count("\n") == 1


def test_a_dry_run_is_of_a_run_that_begins(words: list[Any], trained: Path, leantune: Command) -> None:
    words[words.index("--out") + 1] = trained
    code, _, err = leantune(*words, "--resume")
    assert code == 1
    assert "with --resume" in err
