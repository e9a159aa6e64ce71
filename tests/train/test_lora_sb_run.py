"""Runs that start from the optimizer's first step: which step, which rows, what is told, and the same start by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from leantune import initialize
from leantune.cli import main
from leantune.core.errors import MethodError
from leantune.testing.closeness import assert_close
from leantune.testing.subject import own_layers
from leantune.train import RunConfig, fit, resume
from leantune.train.calibration import draw_rows, first_rate
from leantune.train.record import read_metrics
from leantune.train.setup import prepare
from train.resume_fixture import Killed, act_at, assert_same_run, kill

pytestmark = pytest.mark.usefixtures("quick")

PREFIX = "base_model.model."


@pytest.fixture
def settings(llama_folder: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a short run."""
    return {
        "model": str(llama_folder),
        "data": rows_file,
        "out": tmp_path / "run",
        "method": "lora-sb",
        "method_options": {"r": 3},
        "max_steps": 4,
        "batch_size": 4,
        "device": "cpu",
        "save_steps": 0,
        "lr": 0.02,
    }


@pytest.mark.parametrize(
    ("schedule", "warmup", "steps"), [("cosine", 0.5, 8), ("linear", 0.75, 4), ("constant", 0.5, 4), ("cosine", 0.0, 4)]
)
def test_the_step_is_the_runs_own(schedule: str, warmup: float, steps: int, settings: dict[str, Any]) -> None:
    """The rate of the first step that moves anything, as the Trainer itself takes it."""
    run = fit(
        RunConfig(**{**settings, "schedule": schedule, "warmup_ratio": warmup, "max_steps": steps}), progress=False
    )
    rates = [line["learning_rate"] for line in read_metrics(run.folder / "metrics.jsonl") if "learning_rate" in line]
    first = next(rate for rate in rates if rate > 0)
    assert run.summary["calibration"]["step_size"] == pytest.approx(first, rel=1e-9)
    assert first == pytest.approx(0.02 / (warmup * steps) if warmup else 0.02, rel=1e-9)


def test_steps_are_counted_in_the_runs_batches(settings: dict[str, Any]) -> None:
    """Not in batches of the estimation, as in the authors' code: 40 rows, 8 a step, 4 epochs, half of it warm-up."""
    config = RunConfig(
        **{**settings, "max_steps": None, "epochs": 4, "gradient_accumulation": 2, "warmup_ratio": 0.5}
    ).resolved()
    trainer = prepare(config).trainer
    before = torch.get_rng_state()
    assert first_rate(trainer) == pytest.approx(0.02 / 10)
    assert torch.equal(torch.get_rng_state(), before)
    assert trainer.lr_scheduler is None


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_the_run_starts_as_initialize_does(optimizer: str, settings: dict[str, Any]) -> None:
    """From the same rows, one by one, with transformers' own loss over all logits; the factors stay as they are."""
    settings = {**settings, "optimizer": optimizer}
    run = fit(RunConfig(**settings), progress=False)
    prepared = prepare(RunConfig(**{**settings, "out": settings["out"] / "other"}).resolved())
    drawn = draw_rows(prepared.examples.train, 0.001, seed=0)
    assert len(drawn) == 32
    batches = [{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} for row in drawn]
    told = initialize(prepared.model, batches, 0.02, optimizer=optimizer)
    facts = run.summary["calibration"]
    for name in ("rows", "tokens", "passes", "optimizer", "step_size"):
        assert facts[name] == told[name]
    assert facts["captured"] == pytest.approx(told["captured"], rel=1e-3)
    assert facts["epoch_share"] == 32 / 40
    assert facts["epoch_time_share"] > 0
    stored = load_file(run.result / "adapter_model.safetensors")
    for path, layer in own_layers(prepared.model).items():
        core = layer.own("default")
        B, A = stored[f"{PREFIX}{path}.loraxs_core.B"], stored[f"{PREFIX}{path}.loraxs_core.A"]
        # Directions by their projections; the loss is summed in another order, in float32.
        assert_close(B @ B.t(), (core.B @ core.B.t()).double(), torch.float32, 2**12, 64, what=path)
        assert_close(A.t() @ A, (core.A.t() @ core.A).double(), torch.float32, 2**12, 64, what=path)


def test_the_command_says_what_the_start_was(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--method", "lora-sb", "--r", "auto", "--rank-budget", "3", "--sketch", "6", "--alpha", "2"]
    words += ["--max-steps", "2", "--save-steps", "0", "--device", "cpu", "--batch-size", "4", "--warmup-ratio", "0"]
    words += ["--lr", "0.02", "--model", settings["model"], "--data", str(settings["data"])]
    with pytest.raises(SystemExit) as done:
        main(["train", *words, "--out", str(settings["out"])])
    shown = " ".join(capsys.readouterr().err.split())
    assert done.value.code == 0, shown
    assert "calibrating on 32 rows" in shown
    assert "as many rows as 80.00% of an epoch" in shown
    assert "first step of adamw_torch at 0.02" in shown
    assert "of it captured" in shown
    assert "4 of 14 layers sketched: subspaces agree to" in shown
    record = json.loads((settings["out"] / "run.json").read_text(encoding="utf-8"))
    assert record["config"]["calibration_share"] == 0.001
    config = json.loads((settings["out"] / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["sketch"], config["init_weights"]) == ("auto", 6, "update_svd")
    trained = sum(rank**2 for rank in config["ranks"].values())
    assert record["trainable_parameters"] == trained <= 14 * 9


def test_lora_xs_asks_for_no_rows(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(RunConfig(**{**settings, "method": "lora-xs", "max_steps": 2}))
    assert "calibrating" not in capsys.readouterr().err
    assert "calibration" not in run.summary
    assert run.summary["method"]["name"] == "lora-xs"


def test_an_optimizer_without_a_known_step_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match="optimizer 'stable_adamw'"):
        fit(RunConfig(**{**settings, "optimizer": "stable_adamw"}), progress=False)


@pytest.mark.parametrize("rank", [3, "auto"])
def test_a_run_that_goes_on_is_the_one_that_was_not_stopped(
    rank: int | str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"r": rank} | ({"rank_budget": 3} if rank == "auto" else {})
    settings = {**settings, "save_steps": 2, "method_options": options}
    whole = fit(RunConfig(**{**settings, "out": settings["out"].parent / "whole"}), progress=False)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        act_at(3, patch, kill)
        fit(RunConfig(**settings), progress=False)
    assert_same_run(resume(settings["out"], progress=False).folder, whole.folder)
