"""The dry run says what the run then does, meets its errors, and leaves nothing behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from leantune.core.errors import LeantuneError, RunError
from leantune.train import RunConfig, dry_run, fit
from leantune.train.preview import parameter_groups
from leantune.train.record import METRICS, read_metrics


@pytest.fixture
def settings(llama_folder: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(llama_folder),
        "data": rows_file,
        "eval_data": rows_file,
        "out": tmp_path / "run",
        "method": "s2ft",
        "method_options": {"heads": 1, "channels": 4},
        "epochs": 1.5,
        "batch_size": 4,
        "gradient_accumulation": 3,
        "lr": 1e-2,
        "warmup_ratio": 0.2,
        "save_steps": 2,
        "seed": 5,
    }


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def test_it_says_what_the_run_then_does_and_writes_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    before = tree(tmp_path)
    found = dry_run(RunConfig(**settings))
    assert tree(tmp_path) == before
    json.dumps(found, allow_nan=False)

    run = fit(RunConfig(**settings), progress=False)
    summary, lines = run.summary, [line for line in read_metrics(run.folder / METRICS) if "loss" in line]
    assert found["steps"]["steps"] == summary["steps"] == 6
    assert found["steps"]["epochs"] == pytest.approx(1.5)
    assert found["steps"]["batches_an_epoch"] == 10
    assert found["steps"]["rows_a_step"] == 12
    assert found["parameters"]["trained"] == summary["trainable_parameters"]
    assert found["parameters"]["total"] == summary["total_parameters"]
    assert found["data"] == summary["data"]
    assert found["eval_data"]["rows"] == 40
    # The first epoch is four steps: 40 rows in ten batches, three a step.
    assert found["steps"]["counted_all_of_first_epoch"]
    assert found["steps"]["tokens"] == lines[3]["tokens"]
    assert found["steps"]["loss_tokens"] == lines[3]["loss_tokens"]
    rates = {point["step"]: point["rate"] for point in found["learning_rate"]["points"]}
    assert len(rates) == 4
    assert {step: lines[step - 1]["learning_rate"] for step in rates} == pytest.approx(rates)
    assert max(rates.values()) == found["learning_rate"]["peak"] == 1e-2
    assert found["learning_rate"]["warmup_steps"] == 2
    for entry in found["writes"]:
        assert Path(entry["path"]).exists()
    named = {Path(entry["path"]).name for entry in found["writes"]}
    assert {path.name for path in run.folder.iterdir()} <= named


def test_padding_of_a_whole_epoch_is_that_of_the_run(settings: dict[str, Any]) -> None:
    settings |= {"epochs": 1.0, "gradient_accumulation": 1, "save_steps": 0, "eval_data": None}
    found = dry_run(RunConfig(**settings))
    shares = [found["steps"]["padding_share"], fit(RunConfig(**settings), progress=False).summary["padding_share"]]
    assert shares[0] == shares[1] > 0
    assert "checkpoints" not in {Path(entry["path"]).name for entry in found["writes"]}
    settings |= {"group_by_length": True, "overwrite": True}
    assert dry_run(RunConfig(**settings))["steps"]["padding_share"] < shares[0]


def test_what_trains_is_grouped_over_blocks(settings: dict[str, Any]) -> None:
    numbers = dry_run(RunConfig(**settings))["parameters"]
    groups = {group["name"]: group for group in numbers["groups"]}
    down = groups["model.layers.*.mlp.down_proj.s2ft_slice"]
    assert (down["count"], down["each"], down["parameters"], down["dtype"]) == (2, 64, 128, "float32")
    assert sum(group["parameters"] for group in numbers["groups"]) == numbers["trained"]
    assert all(group["count"] == 2 for group in groups.values())


def test_names_of_adapters_and_experts_are_folded() -> None:
    from torch import nn

    model = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 3) for _ in range(4)), "head": nn.Linear(2, 2)})
    model.head.bias.requires_grad_(False)
    found = {group["name"]: (group["count"], tuple(group["shape"])) for group in parameter_groups(model)}
    assert found == {"experts.*": (4, (3, 2)), "experts.*.bias": (4, (3,)), "head": (1, (2, 2))}


def test_a_method_without_an_adapter(settings: dict[str, Any]) -> None:
    found = dry_run(RunConfig(**{**settings, "method": "full", "method_options": {}}))
    assert found["parameters"]["trained"] == found["parameters"]["total"]
    assert "model" in {Path(entry["path"]).name for entry in found["writes"]}
    assert found["bytes"]["optimizer"] == 2 * found["bytes"]["trained"]


def test_the_rate_of_the_method_is_said_to_be_its_own(settings: dict[str, Any]) -> None:
    assert not dry_run(RunConfig(**settings))["learning_rate"]["is_default"]
    rate = dry_run(RunConfig(**{**settings, "lr": None}))["learning_rate"]
    assert rate["is_default"]
    assert rate["peak"] == RunConfig(**settings).chosen_method.default_learning_rate


FAULTS: dict[str, dict[str, Any]] = {
    "no data": {"data": "nowhere.jsonl"},
    "no model": {"model": "./nowhere"},
    "no evaluation data": {"eval_data": "nowhere.jsonl"},
    "rows of another task": {"task": "classification"},
    "no loss": {"max_length": 4},
    "no such module": {"method": "lora", "method_options": {"target_modules": ["nothing"]}},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_it_meets_the_errors_of_a_run(fault: str, settings: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig(**{**settings, **FAULTS[fault]})
    with pytest.raises(LeantuneError) as dry:
        dry_run(config)
    assert tree(tmp_path) == {}
    with pytest.raises(LeantuneError) as real:
        fit(config, progress=False)
    assert str(dry.value) == str(real.value)


def test_an_occupied_folder_is_refused_as_by_a_run(settings: dict[str, Any]) -> None:
    folder = settings["out"]
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(RunError, match="not a run's"):
        dry_run(RunConfig(**settings))
    assert list(tree(folder)) == ["thesis.tex"]


def test_a_folder_that_cannot_be_written_is_found(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def refuse(path: Path, mode: int) -> bool:
        asked.append(path)
        return False

    monkeypatch.setattr(os, "access", refuse)
    with pytest.raises(RunError, match="cannot be written"):
        dry_run(RunConfig(**settings))
    assert asked == [settings["out"].parent]
