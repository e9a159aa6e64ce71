"""spft, loreft, series- and parallel-adapter as a user meets them: train, eval, generate, inspect, merge, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from leantune import cli
from leantune.testing.closeness import assert_same_state

Command = Callable[..., tuple[int, str, str]]

FLAGS: dict[str, list[Any]] = {
    "spft": ["--ratio", 0.1],
    "loreft": ["--r", 4, "--positions", "f2+l2"],
    "series-adapter": ["--bottleneck-size", 8],
    "parallel-adapter": ["--bottleneck-size", 8, "--non-linearity", "gelu"],
}
REFUSED = {
    "loreft": "an edit of hidden states at some positions is no change of weights",
    "series-adapter": "a bottleneck is not linear, so that no weight of the base can hold it",
    "parallel-adapter": "a bottleneck is not linear, so that no weight of the base can hold it",
}


@pytest.fixture(scope="module", params=FLAGS)
def run(request: pytest.FixtureRequest, tiny: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run of each method."""
    name = request.param
    out = tmp_path_factory.mktemp("runs") / name
    words = ["train", "--method", name, "--model", tiny, "--data", rows, "--out", out, "--max-steps", 6]
    words += ["--batch-size", 4, "--lr", 0.02, "--save-steps", 0, *FLAGS[name]]
    with pytest.raises(SystemExit) as left:
        cli.main([str(word) for word in words])
    assert not left.value.code
    return out


def test_it_learns_and_answers(run: Path, rows: Path, leantune: Command) -> None:
    summary = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert summary["method"]["name"] == run.name
    losses = [
        entry["loss"]
        for entry in map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        if "loss" in entry
    ]
    assert losses[-1] < losses[0]
    code, out, _ = leantune("generate", run, "--prompt", "name 1:", "--max-new-tokens", 5)
    assert code == 0
    assert out.strip()
    code, out, _ = leantune("eval", run, "--data", rows, "--json", "--max-new-tokens", 4)
    assert code == 0
    tuned = json.loads(out)
    code, out, _ = leantune("inspect", "adapter", run, "--json")
    assert code == 0
    told = json.loads(out)
    assert told["method"] == run.name
    assert told["parameters"] > 0
    assert tuned


def test_merge_is_exact_or_refused_in_one_sentence(run: Path, tmp_path: Path, leantune: Command) -> None:
    code, _, err = leantune("merge", run, "--out", tmp_path / "merged")
    if run.name in REFUSED:
        assert code == 1
        assert REFUSED[run.name] in " ".join(err.split())
        assert not (tmp_path / "merged").exists()
        return
    assert code == 0
    [entry] = json.loads((run / "run.json").read_text(encoding="utf-8"))["exports"]
    assert entry["format"] == "merged"
    assert entry["parity"]["ok"]


def test_the_lora_export_is_refused_with_what_to_do(run: Path, tmp_path: Path, leantune: Command) -> None:
    code, _, err = leantune("export", run, "--out", tmp_path / "lora")
    text = " ".join(err.split())
    assert code == 1
    assert REFUSED.get(run.name, "a change of rank up to") in text
    assert ("leantune merge" if run.name == "spft" else "keep the adapter beside the base") in text
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("name", ["spft", "loreft"])
def test_resumed_in_the_middle_it_is_the_same_run(
    name: str, tiny: Path, rows: Path, tmp_path: Path, leantune: Command
) -> None:
    words: list[Any] = ["train", "--method", name, "--model", tiny, "--data", rows, "--out", tmp_path / "run"]
    words += ["--batch-size", 4, "--lr", 0.02, "--schedule", "constant", "--warmup-ratio", 0, *FLAGS[name]]
    code, _, err = leantune(*words, "--max-steps", 2, "--save-steps", 2)
    assert code == 0, err
    code, _, err = leantune("train", "--resume", tmp_path / "run", "--max-steps", 4)
    assert code == 0, err
    words[words.index(tmp_path / "run")] = tmp_path / "whole"
    assert leantune(*words, "--max-steps", 4, "--save-steps", 0)[0] == 0
    resumed, whole = (load_file(tmp_path / each / "adapter" / "adapter_model.safetensors") for each in ("run", "whole"))
    assert_same_state(resumed, whole, "adapter")
