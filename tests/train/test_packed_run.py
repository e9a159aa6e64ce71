"""A run over a base in 4 and 8 bits: from its settings to its record, evaluation between the steps included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_tokenizer
from leantune.core.errors import ConfigError
from leantune.models import content_hash
from leantune.train import Run, RunConfig, fit
from leantune.train.record import read_metrics
from packed_fixture import IDS, WAYS, make_llama, need

TARGETS = ["o_proj", "down_proj"]


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    make_llama(initializer_range=0.05).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def settings(folder: Path, rows: Path, out: Path, **options: Any) -> dict[str, Any]:
    common = {"model": str(folder), "data": rows, "out": out, "max_steps": 12, "batch_size": 8, "lr": 2e-2}
    method = {"method": "s2ft", "method_options": {"heads": 1, "channels": 16, "target_modules": TARGETS}}
    return {**common, **method, "device": "cpu", "save_steps": 0, **options}


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_it_learns_and_is_read_back_over_the_same_base(
    wide_folder: Path, rows_file: Path, tmp_path: Path, way: tuple[str, str]
) -> None:
    need(way[1])
    chosen = {"quantization": way[0], "quantization_backend": way[1], "eval_data": rows_file, "eval_steps": 4}
    run = fit(RunConfig(**settings(wide_folder, rows_file, tmp_path / "run", **chosen)), progress=False)
    lines = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert lines[-1]["loss"] < 0.85 * lines[0]["loss"]
    evaluated = [line["eval_loss"] for line in read_metrics(tmp_path / "run/metrics.jsonl") if "eval_loss" in line]
    assert len(evaluated) == 3
    assert evaluated[-1] < evaluated[0]
    facts = run.summary["base"]["quantization"]
    assert (f"{facts['bits']}bit", facts["backend"]) == way
    assert facts["base_bytes"] < facts["dense_bytes"]
    assert "when it was loaded" in run.summary["base"]["note"]
    plain = sum(each.numel() for each in make_llama().parameters())
    assert run.summary["total_parameters"] == plain + run.summary["trainable_parameters"]
    assert {each.dtype for each in run.model.parameters() if each.requires_grad} == {torch.float32}
    assert run.base is not None
    assert content_hash(run.model) == run.base.content_hash
    opened = Run.open(tmp_path / "run")
    assert opened.config.quantization_backend == way[1]
    base, model = opened.load()
    assert base.quantisation == run.base.quantisation
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, run.model(input_ids=ids).logits)


def test_the_backend_is_settled_when_the_run_begins(wide_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    need("bitsandbytes")
    config = RunConfig(**settings(wide_folder, rows_file, tmp_path / "run", quantization="4bit"))
    assert config.quantization_backend == "auto"
    assert config.resolved().quantization_backend == "bitsandbytes"
    assert RunConfig(**settings(wide_folder, rows_file, tmp_path / "run")).resolved().quantization_backend == "auto"


def test_what_contradicts_a_packed_base(wide_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    wrong = {"quantization": "4bit", "method": "full", "method_options": {}, "dtype": "float64"}
    with pytest.raises(ConfigError) as caught:
        RunConfig(**settings(wide_folder, rows_file, tmp_path / "run", **wrong))
    assert "trains the base weights themselves" in str(caught.value)
    assert "dtype: float64 with quantization '4bit'" in str(caught.value)
