"""Runs of XGBLoRA: resumed in the middle of a round, stopped early, cut back to their best round, from the shell."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import leantune
from boosting_fixture import layers
from leantune.adapters import merging, parity
from leantune.adapters.export import export_run, merge_run
from leantune.cli import main
from leantune.core.errors import AdapterError, MethodError
from leantune.data import read_rows
from leantune.evaluate import evaluate
from leantune.models import content_hash, load_base
from leantune.testing.closeness import assert_differs, assert_same
from leantune.train import LeanTrainer, Run, RunConfig, dry_run, fit, resume
from leantune.train.record import read_metrics
from train.conftest import VOCABULARY
from train.resume_fixture import Killed, act_at, assert_same_run, kill, tensors_of

pytestmark = pytest.mark.usefixtures("quick")

OPTIONS = {"steps_per_round": 4, "blocks_per_round": 1, "warmup_steps": 1, "r": 2}
# 22 rows in batches of 2 are 11 forward passes an epoch: steps of 3, 3, 3 and 2 passes, so 4 an epoch.
BASIC: dict[str, Any] = {
    "method": "xgblora",
    "limit": 22,
    "batch_size": 2,
    "gradient_accumulation": 3,
    "epochs": 3.5,
    "save_steps": 1,
    "lr": 1e-2,
    "device": "cpu",
}
CASES: dict[str, dict[str, Any]] = {
    "uniform": {},
    "balanced-shrunk": {"method_options": {**OPTIONS, "block_sampling": "balanced", "shrinkage": 0.5}},
    "gradient-folded-bfloat16": {
        "method_options": {**OPTIONS, "block_sampling": "gradient", "fold": True, "seed": 1},
        "dtype": "bfloat16",
    },
    "checkpointing": {"gradient_checkpointing": True, "weight_decay": 0.1},
}


@pytest.fixture
def settings(llama_folder: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of three rounds and a half."""
    return {**BASIC, "method_options": OPTIONS, "model": str(llama_folder), "data": rows_file, "out": tmp_path / "run"}


def run(settings: dict[str, Any]) -> Run:
    return fit(RunConfig(**settings), progress=False)


def rounds_of(folder: Path) -> list[int]:
    return [line["round"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumed_in_a_round_is_the_uninterrupted_one(settings: dict[str, Any], tmp_path: Path, case: str) -> None:
    settings |= CASES[case]
    run({**settings, "out": tmp_path / "whole"})
    assert rounds_of(tmp_path / "whole") == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    blocks = [line["blocks"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert len({tuple(each) for each in blocks}) == 2, "rounds differ in their blocks"
    # Going on with the third step of a round, with its last, and with its first.
    for number, step in enumerate((7, 8, 9) if case == "uniform" else (7, 9)):
        folder = tmp_path / f"part-{number}"
        with pytest.MonkeyPatch.context() as patch:
            act_at(step, patch, kill, micro=2)
            with pytest.raises(Killed):
                run({**settings, "out": folder})
        resume(folder, progress=False)
        assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "more", "rounds"),
    [
        ({"shrinkage": 0.5}, {}, 4),
        ({"num_boost_round": 2}, {}, 2),
        ({"early_stopping_rounds": 2}, {"lr": 2.0, "epochs": 30.0}, None),
    ],
)
def test_a_run_killed_after_its_last_step_ends_as_the_uninterrupted_one(
    settings: dict[str, Any],
    rows_file: Path,
    tmp_path: Path,
    options: dict[str, Any],
    more: dict[str, Any],
    rounds: int | None,
) -> None:
    settings |= {"method_options": {**OPTIONS, **options}, "eval_data": rows_file, **more}
    whole = run({**settings, "out": tmp_path / "whole"})
    with pytest.MonkeyPatch.context() as patch:
        genuine = LeanTrainer.train

        def ending(trainer: Any, *arguments: Any, **keywords: Any) -> Any:
            genuine(trainer, *arguments, **keywords)
            raise Killed

        patch.setattr(LeanTrainer, "train", ending)
        with pytest.raises(Killed):
            run(settings)
    resumed = resume(settings["out"], progress=False)
    assert_same_run(settings["out"], tmp_path / "whole")
    assert resumed.summary["results"] == whole.summary["results"]
    assert rounds in (None, resumed.summary["results"]["num_boosted_rounds"])


def test_the_base_is_what_it_was_and_the_adapter_is_merged_and_exported(
    settings: dict[str, Any], llama_folder: Path, tmp_path: Path
) -> None:
    settings |= {"method_options": {**OPTIONS, "fold": True}, "dtype": "bfloat16"}
    done = run(settings)
    wanted = load_base(llama_folder, dtype="bfloat16")
    assert content_hash(done.model.get_base_model()) == wanted.content_hash
    assert {layer.booster("default").working for layer in layers(done.model).values()} == {None}
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    expected = done.model(input_ids=ids).logits
    assert_same(done.load()[1](input_ids=ids).logits, expected, "logits of the loaded adapter")
    assert_differs(wanted.model(input_ids=ids).logits, expected, "logits")
    # The layer's own delta, which the factors are held to, is rounded to float32.
    assert leantune.convert_to_lora(settings["out"], tmp_path / "lora").max_abs_error < 1e-7
    state = {name: value for name, value in tensors_of(settings["out"]).items() if "kept" in name}
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_early_stopping_keeps_all_rounds_and_predicts_with_the_best(settings: dict[str, Any], rows_file: Path) -> None:
    # At this rate what follows the first rounds makes the held-out loss worse.
    settings |= {"eval_set": rows_file, "epochs": 30.0, "lr": 2.0, "save_steps": 0}
    settings["method_options"] = {**OPTIONS, "early_stopping_rounds": 2}
    done = run(settings)
    losses = [line["eval_loss"] for line in read_metrics(settings["out"] / "metrics.jsonl") if "eval_loss" in line]
    found = done.summary["results"]
    best = min(range(len(losses) - 1), key=lambda number: losses[number])
    assert (found["best_iteration"], found["best_score"]) == (best, losses[best])
    assert found["num_boosted_rounds"] == best + 3
    assert done.summary["steps"] == 4 * (best + 3)
    assert done.summary["status"] == "complete"
    assert found["iteration_range"] == [0, best + 1]
    assert done.summary["evaluation"]["loss"] == losses[-1] == losses[best], "measured again, with the best"
    config = json.loads((settings["out"] / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["best_iteration"], config["iteration_range"]) == (best, [0, best + 1])
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    expected = done.model(input_ids=ids).logits
    model = done.load()[1]
    assert_same(model(input_ids=ids).logits, expected, "logits of the loaded adapter")
    model.set_iteration_range(None)
    assert_differs(model(input_ids=ids).logits, expected, "logits of all rounds")


def test_a_resumed_run_stops_as_early(settings: dict[str, Any], rows_file: Path, tmp_path: Path) -> None:
    settings |= {"eval_data": rows_file, "epochs": 30.0, "lr": 2.0}
    settings["method_options"] = {**OPTIONS, "early_stopping_rounds": 2}
    whole = run({**settings, "out": tmp_path / "whole"})
    with pytest.MonkeyPatch.context() as patch:
        act_at(whole.summary["steps"] - 2, patch, kill)
        with pytest.raises(Killed):
            run(settings)
    resumed = resume(settings["out"], progress=False)
    assert_same_run(settings["out"], tmp_path / "whole")
    assert resumed.summary["results"] == whole.summary["results"]


def test_what_cannot_be_is_refused_before_anything_is_written(settings: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match="leave compile out"):
        run({**settings, "compile": True})
    assert [each.name for each in settings["out"].iterdir()] == ["checkpoints"], "the trainer's empty folder"


def test_the_record_tells_what_trains_in_a_step(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    done = fit(RunConfig(**{**settings, "max_steps": 1}))
    blocks = list(layers(done.model))
    assert len({path.split(".")[2] for path in blocks}) == 2
    assert done.summary["trained_at_once"] * 2 == done.summary["trainable_parameters"]
    assert f"at most {done.summary['trained_at_once']:,} in a step" in capsys.readouterr().err
    found = dry_run(RunConfig(**{**settings, "out": settings["out"].with_name("dry")}))
    assert found["bytes"]["optimizer"] == 2 * 4 * found["parameters"]["at_once"]
    assert found["parameters"]["at_once"] == done.summary["trained_at_once"]


def test_the_first_rounds_of_a_run_by_every_command(
    settings: dict[str, Any], rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"method_options": {**OPTIONS, "num_boost_round": 3}, "lr": 0.05}
    done = run(settings)
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    done.model.set_iteration_range((0, 2))
    wanted = done.model(input_ids=ids).logits

    def typed(*words: Any) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        assert not ended.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    typed("export", settings["out"], "--format", "native", "--rounds", 2, "--out", tmp_path / "two")
    two = leantune.load(None, tmp_path / "two")
    assert_same(two(input_ids=ids).logits, wanted, "logits of the first two rounds")
    assert (two.num_boosted_rounds(), two.peft_config["default"].num_boosted_rounds) == (2, 2)
    sizes = [(each / "adapter_model.safetensors").stat().st_size for each in (done.result, tmp_path / "two")]
    assert sizes[1] < sizes[0]
    assert done.load()[1].num_boosted_rounds() == 3, "the run is as it was"

    scores = json.loads(
        typed("eval", settings["out"], "--data", rows_file, "--rounds", 2, "--metrics", "loss", "--json")
    )
    whole = json.loads(typed("eval", settings["out"], "--data", rows_file, "--metrics", "loss", "--json"))
    same = evaluate(two, done.tokenizer, read_rows(rows_file), metrics=["loss"], resamples=10).to_dict()
    assert scores["tuned"]["metrics"]["loss"]["value"] == same["metrics"]["loss"]["value"]
    assert scores["tuned"]["metrics"]["loss"]["value"] != whole["tuned"]["metrics"]["loss"]["value"]
    typed("generate", settings["out"], "--prompt", "Facts : one red cat Answer :", "--rounds", 1, "--max-new-tokens", 4)


@pytest.mark.parametrize("export", [export_run, merge_run])
def test_the_first_rounds_are_what_is_exported_and_merged(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: Any
) -> None:
    """What is written, and what it is held to, is the adapter of the first rounds."""
    settings |= {"method_options": {**OPTIONS, "num_boost_round": 3}, "lr": 0.05}
    done = run(settings)
    held: list[int] = []

    def compared(model: Any, *arguments: Any, **keywords: Any) -> Any:
        held.append(model.num_boosted_rounds())
        raise Killed

    monkeypatch.setattr(parity, "compare", compared)
    monkeypatch.setattr(merging, "compare", compared)
    with pytest.raises(Killed):
        export(settings["out"], tmp_path / "out", rounds=1)
    assert held == [1]
    for rounds in (0, 4):
        with pytest.raises(AdapterError, match=f"{rounds} rounds: the adapter has 3; 1 to 3"):
            export(settings["out"], tmp_path / "out", rounds=rounds)
    lora = run({**settings, "method": "lora", "method_options": {}, "out": tmp_path / "lora"})
    with pytest.raises(AdapterError, match="1 rounds: a run of lora; an adapter that is trained in rounds"):
        export(lora.folder, tmp_path / "out", rounds=1)
    assert done.model.num_boosted_rounds() == 3


def test_evaluation_every_few_rounds(settings: dict[str, Any], rows_file: Path) -> None:
    settings |= {"eval_data": rows_file, "epochs": 5.0}
    settings["method_options"] = {**OPTIONS, "eval_rounds": 2}
    done = run(settings)
    steps = [line["step"] for line in read_metrics(settings["out"] / "metrics.jsonl") if "eval_loss" in line]
    assert steps == [8, 16, 20], "and once at the end"
    assert "best_iteration" not in done.summary["results"]


def test_early_stopping_without_rows_to_evaluate_on_is_refused(settings: dict[str, Any]) -> None:
    settings["method_options"] = {**OPTIONS, "early_stopping_rounds": 2}
    with pytest.raises(MethodError, match="early_stopping_rounds needs a validation loss; rows to evaluate on; set"):
        run(settings)


def test_from_the_command_line(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shell"
    words = ["--method", "xgblora", "--model", settings["model"], "--data", settings["data"], "--out", out]
    words += ["--steps-per-round", 2, "--num-boost-round", 3, "--block-sampling", "balanced", "--r", 1]
    words += [
        "--eval-set",
        settings["data"],
        "--eval-rounds",
        1,
        "--batch-size",
        4,
        "--log-steps",
        1,
        "--device",
        "cpu",
    ]
    with pytest.raises(SystemExit) as ended:
        main(["train", *(str(word) for word in words)])
    assert not ended.value.code
    screen = capsys.readouterr().err
    for number in range(3):
        assert re.search(f"round {number}: blocks [01]\\n", screen)
    assert screen.count("evaluation: loss") == 3
    assert rounds_of(out) == [0, 0, 1, 1, 2, 2]
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert (record["status"], record["results"]) == ("complete", {"num_boosted_rounds": 3})
