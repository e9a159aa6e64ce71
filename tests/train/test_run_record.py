"""The figures of a run: the metrics file, the record, the picture, the card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from leantune.train.card import card
from leantune.train.meter import Meter, peak_memory, reset_peak_memory
from leantune.train.plot import draw_loss, smooth
from leantune.train.record import file_hash, loss_facts, parameter_counts, plain, read_metrics


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_the_last_loss_is_a_mean_of_ten() -> None:
    lines = [{"loss": float(number)} for number in range(20)] + [{"eval_loss": 99.0}]
    assert loss_facts(lines) == {"first_loss": 0.0, "last_loss": 14.5, "last_loss_over_steps": 10}
    assert loss_facts(lines[:3])["last_loss"] == 1.0
    assert loss_facts([])["first_loss"] is None


def test_tied_parameters_count_once() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, bias=False), "b": torch.nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    model["c"] = torch.nn.Linear(3, 2).requires_grad_(False)
    assert parameter_counts(model) == {"trainable_parameters": 9, "total_parameters": 17}


def test_anything_becomes_json() -> None:
    config = peft.LoraConfig(r=4, target_modules=["b", "a"])
    value = plain(
        {"nan": math.nan, "inf": [math.inf, 1.5], "config": config.to_dict(), 3: torch.tensor([1, 2]), "set": {2, 1}}
    )
    again = json.loads(json.dumps(value, allow_nan=False))
    assert again["nan"] is None
    assert again["inf"] == [None, 1.5]
    assert again["config"]["target_modules"] == ["a", "b"]
    assert again["config"]["peft_type"] == "LORA"
    assert again["3"] == [1, 2]
    assert plain(torch.tensor(2.0)) == 2.0
    assert plain(Path("a/b")) == str(Path("a/b"))


def test_the_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(tmp_path / "a") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_smoothing_has_no_pull_towards_its_start() -> None:
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smooth([1.0, 2.0], keep=0.5) == pytest.approx([1.0, (0.5 * 0.5 * 1 + 0.5 * 2) / 0.75])
    assert smooth([]) == []


def test_a_picture_of_any_run(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": step, "loss": 3 - step / 10} for step in range(1, 11)]
    sizes = []
    for number, metrics in enumerate(([], lines[:1], lines, [*lines, {"step": 10, "eval_loss": 2.2}])):
        draw_loss(metrics, tmp_path / f"{number}.png", "s2ft on a model")
        data = (tmp_path / f"{number}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        sizes.append(len(data))
    assert len(set(sizes)) == 4, "each has something of its own to show"


def test_a_meter_stops() -> None:
    meter = Meter()
    assert meter.padding == 0.0
    meter.start()
    meter.stop()
    assert meter.seconds == meter.seconds


def test_the_peak_is_of_what_came_after_the_reset() -> None:
    if peak_memory(torch.device("cpu")) is None:
        pytest.skip("this system does not tell")
    reset_peak_memory()
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(64 * 2**20 // 4)
    after = peak_memory(torch.device("cpu"))
    assert before is not None
    assert after is not None
    assert after - before > 48 * 2**20
    assert float(block[0]) == 1.0


def summary_of_a_run(**changes: Any) -> dict[str, Any]:
    return {
        "status": "complete",
        "base": {"name": "smollm2-135m", "note": "a copy"},
        "method": {"name": "s2ft", "title": "S2FT", "config": {}},
        "data": {
            "rows": 2000,
            "loss_tokens": 30,
            "total_tokens": 100,
            "truncated": 3,
            "hash": "sha256:ab",
        },
        "config": {
            "data": "data/e2e.jsonl",
            "method_options": {"heads": 1},
            "packing": False,
            "task": "causal-lm",
            "max_length": 64,
            "batch_size": 8,
            "gradient_accumulation": 2,
            "lr": 2e-3,
            "schedule": "cosine",
            "warmup_ratio": 0.05,
            "seed": 4,
        },
        "environment": {"versions": {"leantune": "0.1.0"}},
        "trainable_parameters": 2211840,
        "total_parameters": 134515008,
        "steps": 150,
        "planned_steps": 200,
        "train_time_s": 285.2,
        "peak_memory_bytes": 3 * 2**30,
        "first_loss": 2.5,
        "last_loss": 1.25,
        "last_loss_over_steps": 10,
        "evaluation": {"loss": 1.3},
        **changes,
    }


def test_the_card_has_the_numbers_of_the_run() -> None:
    parts = card(summary_of_a_run())
    text = json.dumps(parts)
    for fact in ("smollm2-135m", "2,211,840", "2,000 rows", "heads=1", "0.002, cosine", "3 at 64", "2.5000", "1.2500"):
        assert fact in text, fact
    assert parts["sections"]["Result"]["training time"] == "4:45"
    assert parts["sections"]["Result"]["peak memory"] == "3.00 GiB"
    assert parts["sections"]["Result"]["evaluation: loss"] == 1.3
    assert "interrupted" not in text
    stopped = card(summary_of_a_run(status="interrupted", evaluation=None, peak_memory_bytes=None, first_loss=None))
    assert stopped["sections"]["Result"]["steps"] == "150 of 200 (interrupted)"
