"""The examples run from top to bottom; here on a tiny base model and a few rows, so that they take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import text_fixture
from leantune.train import RunConfig

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as a user's."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tokenizer = text_fixture.byte_tokenizer()
    text_fixture.llama(len(tokenizer), positions=512).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(script: Path, *words: object, folder: Path) -> str:
    """The output of a script in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(script), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_tour(base: Path, tmp_path: Path) -> None:
    words = ["--model", base, "--out", tmp_path / "tour", "--steps", 2, "--rows", 4]
    said = run(EXAMPLES / "00_tour.py", *words, folder=tmp_path)
    assert "loss: " in said
    assert "bleu: " in said
    assert "largest weight error 0" in said
    assert (tmp_path / "tour" / "lora" / "adapter_model.safetensors").is_file()


def cells(path: Path) -> Iterator[dict[str, Any]]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5)
    for cell in notebook["cells"]:
        assert cell["id"]
        if cell["cell_type"] == "code":
            # Committed without results: they would be of one machine, on one day.
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            yield cell


@pytest.mark.slow
def test_the_notebook(base: Path, tmp_path: Path) -> None:
    code = []
    for cell in cells(EXAMPLES / "fine_tune.ipynb"):
        tags, text = cell["metadata"].get("tags", []), "".join(cell["source"])
        if "install" in tags:
            assert '-e ".[train,eval]"' in text
        elif "settings" in tags:
            code.append(f"MODEL, STEPS, ROWS = {str(base)!r}, 2, 4\nOUT = Path({str(tmp_path / 'out')!r})")
        else:
            code.append(text)
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join(code), encoding="utf-8")
    said = run(script, folder=EXAMPLES)
    assert "bleu " in said
    assert "largest weight error 0" in said
    assert said.count("before:") == said.count("after: ") > 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_configurations(path: Path, tmp_path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")
    config = RunConfig.from_yaml(path)
    written = tmp_path / "config.yaml"
    written.write_text(config.to_yaml(), encoding="utf-8")
    assert RunConfig.from_yaml(written) == config


def test_there_are_recipes() -> None:
    assert {"demo", "demo-full", "chat", "classification", "s2ft-commonsense"} <= {path.stem for path in RECIPES}
