"""`leantune demo` on a tiny model: the whole story on the screen, and its settings in the repository."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from leantune.cli import demo
from leantune.train.config import RunConfig

Command = Callable[..., tuple[int, str, str]]
RECIPES = Path(demo.__file__).resolve().parents[3] / "examples" / "recipes"


@pytest.fixture
def sample(rows: Path, tmp_path: Path) -> Path:
    for name in ("train", "test", "validation"):
        (tmp_path / f"{name}.jsonl").write_bytes(rows.read_bytes())
    return tmp_path


def test_the_demo_tells_the_whole_story(tiny: Path, sample: Path, tmp_path: Path, leantune: Command) -> None:
    recipe = tmp_path / "demo.yaml"
    settings = ["max_steps: 4", "save_steps: 0", "lr: 0.02", "method_options: {heads: 1, channels: 8}"]
    recipe.write_text("\n".join([f"model: {tiny.as_posix()}", "data: x", "out: y", *settings]))
    out_folder = tmp_path / "runs" / "demo"
    code, out, err = leantune("demo", "--recipe", recipe, "--data", sample, "--out", out_folder)
    assert code == 0
    assert out.count("\n  before  ") == out.count("\n  after   ") == 4
    for word in ("BLEU before", "BLEU after", "sacrebleu, 8 distinct test inputs", "all their 16 references"):
        assert word in out
    for word in ("trained", "s2ft, 4 steps", "peak memory", "run folder", "in all"):
        assert word in out
    for command in ("generate", "eval", "export"):
        assert f"leantune {command} " in out
    assert "loss" in err
    scores = json.loads((out_folder / "run.json").read_text(encoding="utf-8"))["evaluation"]["files"]
    assert list(scores) == [(sample / "test.jsonl").as_posix()]


def test_outside_a_checkout_it_says_what_is_missing(
    leantune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_ROOT", tmp_path)
    code, _, err = leantune("demo")
    assert code == 1
    assert "examples/recipes/demo.yaml" in err
    assert "checkout" in err


@pytest.mark.parametrize("name", ["demo.yaml", "demo-full.yaml"])
def test_the_recipes_are_valid_and_their_rows_are_there(name: str) -> None:
    config = RunConfig.from_yaml(RECIPES / name)
    assert (config.model, config.method) == ("smollm2-135m", "s2ft")
    assert (RECIPES.parents[1] / config.data).is_file()
    assert config.overwrite
