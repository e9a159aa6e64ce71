"""Runs with several tasks: what they leave, what goes on from it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from leantune.core.errors import ConfigError, DataError, LeantuneError, RunError
from leantune.data import read_rows
from leantune.evaluate import evaluate
from leantune.train import Run, RunConfig, dry_run, fit, resume
from leantune.train.record import read_metrics
from train.multi_task_fixture import causal_tasks, head_tasks, settings
from train.resume_fixture import Killed, act_at, interrupt, kill, metrics_of, state_of

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(params=["decoder", "encoder"])
def given(request: pytest.FixtureRequest, llama_folder: Path, bert_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of three tasks: language modelling, or heads."""
    if request.param == "decoder":
        return settings(llama_folder, "llama", causal_tasks(tmp_path), tmp_path / "run")
    return settings(bert_folder, "bert", head_tasks(tmp_path), tmp_path / "run")


@pytest.fixture
def decoder(llama_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of three language tasks."""
    return settings(llama_folder, "llama", causal_tasks(tmp_path), tmp_path / "run")


@pytest.fixture
def encoder(bert_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of two classifications and a regression."""
    return settings(bert_folder, "bert", head_tasks(tmp_path), tmp_path / "run")


def run(values: dict[str, Any], **options: Any) -> Run:
    return fit(RunConfig(**values), progress=False, **options)


def test_it_leaves_an_adapter_and_the_figures_of_each_task(given: dict[str, Any]) -> None:
    done = run({**given, "max_steps": 12})
    folder, names = done.folder, list(given["tasks"])
    assert sorted(path.name for path in (folder / "adapter").iterdir() if path.is_dir()) == sorted(names)
    listed = json.loads((folder / "adapter" / "tasks.json").read_text())["tasks"]
    record = json.loads((folder / "run.json").read_text())
    lines = read_metrics(folder / "metrics.jsonl")
    for name in names:
        facts = record["tasks"][name]
        assert listed[name]["kind"] == facts["kind"]
        assert facts["data"]["rows"] == len((Path(given["tasks"][name]["data"])).read_text().splitlines())
        assert facts["steps"] == sum(f"loss/{name}" in line for line in lines) > 0
        assert facts["evaluation"]["loss"] == lines[-1][f"eval_loss/{name}"]
        assert (folder / "adapter" / name / "README.md").is_file()
    assert record["data"]["rows"] == sum(record["tasks"][name]["data"]["rows"] for name in names)
    assert record["task_parameters"]["total"] < record["task_parameters"]["separate"]
    factors = sum(task["trainable_parameters"] for task in record["tasks"].values())
    assert record["trainable_parameters"] == factors


def test_the_metrics_are_those_of_the_kind(encoder: dict[str, Any]) -> None:
    record = run(encoder).summary["tasks"]
    assert record["pair"]["evaluation"].keys() == {"loss", "accuracy", "f1", "mcc"}
    assert record["stars"]["evaluation"].keys() == {"loss", "mean_absolute_error", "pearson", "spearman"}


def test_a_task_of_the_run_is_a_run_of_its_own(given: dict[str, Any]) -> None:
    done = run(given)
    for name, task in given["tasks"].items():
        one = Run.open(done.folder, name)
        one.load()
        rows = read_rows(task["eval_data"])
        labels = one.summary["data"]["label_names"]
        scores = evaluate(one.model, one.tokenizer, rows, task=one.config.task, label_names=labels, resamples=0)
        found = done.summary["tasks"][name]["evaluation"]["loss"]
        metric = {"causal-lm": "loss", "classification": "cross_entropy", "regression": "mse"}[one.config.task]
        assert scores.value(metric) == pytest.approx(found, rel=1e-5)
        assert one.result == done.folder / "adapter" / name


def test_resume_is_bit_equal(given: dict[str, Any], tmp_path: Path) -> None:
    values = {**given, "gradient_accumulation": 2, "max_steps": 7, "save_steps": 2, "task_sampling": "uniform"}
    run({**values, "out": tmp_path / "whole"})
    with pytest.MonkeyPatch.context() as patch:
        act_at(5, patch, kill, micro=2)
        with pytest.raises(Killed):
            run(values)
    resume(given["out"], progress=False)
    assert_same_tasks(given["out"], tmp_path / "whole", list(given["tasks"]))


def assert_same_tasks(one: Path, other: Path, names: list[str]) -> None:
    """Adapters, state of the newest checkpoint and figures are the same, bit for bit."""
    for name in names:
        found, wanted = (load_file(each / "adapter" / name / "adapter_model.safetensors") for each in (one, other))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert state_of(one) == state_of(other)
    assert metrics_of(one) == metrics_of(other)
    records = [json.loads((each / "run.json").read_text())["tasks"] for each in (one, other)]
    assert records[0] == records[1]


def test_ctrl_c_keeps_every_task(decoder: dict[str, Any], tmp_path: Path) -> None:
    run({**decoder, "out": tmp_path / "whole"})
    with pytest.MonkeyPatch.context() as patch:
        act_at(2, patch, interrupt)
        stopped = run(decoder)
    assert stopped.summary["status"] == "interrupted"
    assert (stopped.folder / "adapter" / "beta" / "adapter_config.json").is_file()
    resume(decoder["out"], progress=False)
    assert_same_tasks(decoder["out"], tmp_path / "whole", list(decoder["tasks"]))
