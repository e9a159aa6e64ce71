"""Runs whose method chooses from data: which rows, what is told, and the same choice by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from leantune import S2FTConfig, initialize
from leantune.cli import main
from leantune.core.errors import ConfigError
from leantune.train import RunConfig, fit, resume
from leantune.train.calibration import draw_rows
from leantune.train.preview import dry_run
from leantune.train.setup import prepare
from train.resume_fixture import Killed, act_at, assert_same_run, kill

pytestmark = pytest.mark.usefixtures("quick")

OPTIONS = {"selection": "gradient", "heads": 1, "channels": 4}


@pytest.fixture
def settings(llama_folder: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a short run."""
    return {
        "model": str(llama_folder),
        "data": rows_file,
        "out": tmp_path / "run",
        "method_options": OPTIONS,
        "max_steps": 2,
        "batch_size": 4,
        "device": "cpu",
        "save_steps": 0,
    }


def entries(folder: Path) -> dict[str, list[int]]:
    """Path -> chosen entries of an adapter folder."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: value.tolist() for name, value in tensors.items() if name.endswith(".index")}


def test_rows_are_drawn_by_the_seed_within_bounds() -> None:
    rows = [{"input_ids": [number] * (1 + number % 7)} for number in range(70_000)]
    for share, total, count in ((0.01, 40, 32), (0.01, 20, 20), (0.01, 70_000, 512), (0.5, 200, 100), (1.0, 600, 512)):
        drawn = draw_rows(rows[:total], share, seed=0)
        assert len(drawn) == count
        assert len({row["input_ids"][0] for row in drawn}) == count
        lengths = [len(row["input_ids"]) for row in drawn]
        assert lengths == sorted(lengths, reverse=True)
    assert draw_rows(rows, 0.01, seed=0) == draw_rows(rows, 0.01, seed=0) != draw_rows(rows, 0.01, seed=1)
    # A stream cannot be drawn from.
    assert draw_rows(iter(rows), 0.01, seed=0) == rows[:32]
    packs = ({"documents": rows[first : first + 5]} for first in range(0, 100, 5))
    assert draw_rows(packs, 0.01, seed=0) == rows[:32]


@pytest.mark.parametrize("selection", ["activation", "product", "gradient"])
def test_the_run_chooses_as_initialize_does(selection: str, settings: dict[str, Any]) -> None:
    """Row by row, with transformers' own loss over all logits, and without a trainer."""
    options = {**OPTIONS, "selection": selection}
    run = fit(RunConfig(**{**settings, "method_options": options}), progress=False)
    prepared = prepare(
        RunConfig(**{**settings, "method_options": options, "out": settings["out"] / "other"}).resolved()
    )
    drawn = draw_rows(prepared.examples.train, 0.01, seed=0)
    batches = [{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} for row in drawn]
    told = initialize(prepared.model, batches)
    found = {
        name.replace(".default", ""): value.tolist()
        for name, value in prepared.model.named_buffers()
        if name.endswith(".index")
    }
    assert found == entries(run.result)
    assert {name: run.summary["calibration"][name] for name in ("rows", "tokens", "passes")} == {
        name: told[name] for name in ("rows", "tokens", "passes")
    }
    assert run.summary["calibration"]["time_s"] > 0
    assert run.summary["calibration"]["batches"] == 8


def test_calibration_does_not_touch_what_follows(settings: dict[str, Any]) -> None:
    """With every unit chosen there is nothing to choose, and the runs are the same bit for bit."""
    tensors: list[dict[str, Tensor]] = []
    for number, selection in enumerate(("random", "gradient")):
        options = {"selection": selection, "heads": 4, "channels": 32}
        out = settings["out"] / str(number)
        run = fit(RunConfig(**{**settings, "out": out, "method_options": options}), progress=False)
        tensors.append(load_file(run.result / "adapter_model.safetensors"))
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())


def test_a_classification_head(settings: dict[str, Any], bert_folder: Path, films_file: Path) -> None:
    options = {"model": str(bert_folder), "data": films_file, "task": "classification"}
    ends = {}
    for order in ("largest", "smallest"):
        method = {**OPTIONS, "channels": 16, "order": order}
        run = fit(
            RunConfig(**{**settings, **options, "out": settings["out"] / order, "method_options": method}),
            progress=False,
        )
        ends[order] = entries(run.result)
        assert run.summary["calibration"]["rows"] == 24
    name = next(name for name in ends["largest"] if "attention" not in name)
    assert sorted(ends["largest"][name] + ends["smallest"][name]) == list(range(32))


def test_the_command_says_what_it_does(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--max-steps", "1", "--save-steps", "0", "--device", "cpu", "--batch-size", "4", "--channels", "3"]
    words += ["--selection", "activation", "--order", "smallest", "--calibration-share", "0.9"]
    with pytest.raises(SystemExit) as done:
        main(
            [
                "train",
                "--model",
                settings["model"],
                "--data",
                str(settings["data"]),
                "--out",
                str(settings["out"]),
                *words,
            ]
        )
    shown = capsys.readouterr().err
    assert done.value.code == 0, shown
    assert "calibrating on 36 rows" in shown
    assert "calibrated in" in shown
    record = json.loads((settings["out"] / "run.json").read_text(encoding="utf-8"))
    assert record["calibration"]["rows"] == 36
    assert record["config"]["calibration_share"] == 0.9
    config = json.loads((settings["out"] / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["selection"], config["order"]) == ("activation", "smallest")


def test_a_random_choice_needs_no_rows(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(RunConfig(**{**settings, "method_options": {"channels": 4}}))
    assert "calibrating" not in capsys.readouterr().err
    assert "calibration" not in run.summary


def test_a_dry_run_measures_nothing(settings: dict[str, Any]) -> None:
    found = dry_run(RunConfig(**settings))
    assert found["parameters"]["trained"] == 2 * (16 * 4 + 16 * 4)


@pytest.mark.parametrize("permute", [False, True])
def test_a_run_that_goes_on_is_the_one_that_was_not_stopped(
    permute: bool, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**settings, "max_steps": 4, "save_steps": 2, "method_options": {**OPTIONS, "permute": permute}}
    whole = fit(RunConfig(**{**settings, "out": settings["out"].parent / "whole"}), progress=False)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        act_at(3, patch, kill)
        fit(RunConfig(**settings), progress=False)
    assert_same_run(resume(settings["out"], progress=False).folder, whole.folder)


def test_a_share_is_a_share(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="calibration_share: 0"):
        RunConfig(**settings, calibration_share=0)


def test_s2ft_states_when_it_needs_rows() -> None:
    from leantune.methods import get

    asked = {name: get("s2ft").needs_batches(S2FTConfig(selection=name)) for name in ("random", "weight", "gradient")}
    assert asked == {"random": False, "weight": False, "gradient": True}
    assert not get("lora").needs_batches(get("lora").config())
