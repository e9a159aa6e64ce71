"""A run that goes on from a checkpoint is the run that was never stopped, or says why it cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import leantune
from leantune.cli import main
from leantune.core import atomic
from leantune.core.errors import RunError
from leantune.train import Run, RunConfig, fit, resume
from leantune.train.checkpoint import SEAL, checkpoints
from leantune.train.record import read_metrics, rewind_metrics
from train.resume_fixture import Killed, act_at, assert_same_run, interrupt, kill, metrics_of, tensors_of

pytestmark = pytest.mark.usefixtures("quick")

DROPOUT = {"r": 2, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.2}
# 22 rows in batches of 2 are 11 forward passes an epoch: steps of 3, 3, 3 and 2 passes, so 4 an epoch.
BASIC = {
    "limit": 22,
    "batch_size": 2,
    "gradient_accumulation": 3,
    "epochs": 3.0,
    "save_steps": 3,
    "lr": 1e-2,
    "device": "cpu",
}
LORA = {"method": "lora", "method_options": DROPOUT}
S2FT = {"method": "s2ft", "method_options": {"channels": 4, "heads": 1, "target_modules": ["o_proj", "down_proj"]}}
CASES: dict[str, dict[str, Any]] = {
    "dropout-accumulation-evaluation": {**LORA, "eval_steps": 2, "keep_checkpoints": 1},
    "by-length": {**LORA, "group_by_length": True, "schedule": "linear"},
    "s2ft-bfloat16": {**S2FT, "dtype": "bfloat16"},
    "s2ft-permuted": {**S2FT, "method_options": {**S2FT["method_options"], "permute": True}},
    "full": {"method": "full", "method_options": {}, "lr": 1e-3},
    "full-bfloat16": {"method": "full", "method_options": {}, "lr": 1e-3, "dtype": "bfloat16"},
    "head": {**LORA, "task": "classification"},
    "checkpointing": {**LORA, "gradient_checkpointing": True, "max_steps": 9},
    "s2ft-calibrated": {**S2FT, "method_options": {**S2FT["method_options"], "selection": "gradient"}},
    "packing": {**LORA, "packing": True, "max_length": 24, "max_steps": 12},
    "streaming": {**LORA, "streaming": True, "max_steps": 10, "shuffle_buffer": 7},
    "pissa": {"method": "pissa", "method_options": DROPOUT},
    "pissa-bfloat16": {"method": "pissa", "method_options": DROPOUT, "dtype": "bfloat16"},
    "lora-ga": {"method": "lora-ga", "method_options": DROPOUT},
    "dora": {"method": "dora", "method_options": DROPOUT},
    "vera": {"method": "vera", "method_options": {"r": 4, "target_modules": ["q_proj", "down_proj"]}},
    "prefix": {"method": "prefix", "method_options": {"num_virtual_tokens": 3}},
    "lisa": {"method": "lisa", "method_options": {"active_blocks": 1, "period": 2}, "lr": 1e-3},
    "lisa-blocks-alone": {
        "method": "lisa",
        "method_options": {"active_blocks": 1, "period": 3, "embeddings": False, "seed": 3},
        "lr": 1e-3,
        "gradient_checkpointing": True,
    },
    "galore": {"method": "galore", "method_options": {"rank": 4, "update_proj_gap": 3}, "lr": 1e-3},
    "galore-bfloat16": {"method": "galore", "method_options": {"rank": 4}, "lr": 1e-3, "dtype": "bfloat16"},
}


@pytest.fixture
def settings(llama_folder: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a short run with several epochs."""
    return {**BASIC, **LORA, "model": str(llama_folder), "data": rows_file, "out": tmp_path / "run"}


def run(settings: dict[str, Any], **options: Any) -> Run:
    return fit(RunConfig(**settings), progress=False, **options)


def stopped(settings: dict[str, Any], step: int, act: Any = kill, micro: int = 1) -> Path:
    """A run that did not get further than a step; its folder."""
    with pytest.MonkeyPatch.context() as patch:
        act_at(step, patch, act, micro)
        if act is kill:
            with pytest.raises(Killed):
                run(settings)
        else:
            run(settings)
    return Path(settings["out"])


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(
    settings: dict[str, Any], tmp_path: Path, rows_file: Path, films_file: Path, case: str
) -> None:
    settings |= CASES[case]
    data = films_file if settings.get("task") == "classification" else rows_file
    settings |= {"data": data, **({"eval_data": data} if "eval_steps" in settings else {})}
    run({**settings, "out": tmp_path / "whole"})
    # In the middle of an accumulation, in the second epoch, two steps behind the last checkpoint.
    folder = stopped(settings, 8, micro=2)
    assert [path.name for path in checkpoints(folder / "checkpoints")][-1] == "checkpoint-6"
    resumed = resume(folder, progress=False)
    assert_same_run(folder, tmp_path / "whole")
    assert resumed.summary["resumed"] == [{"step": 6, "notes": []}]
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_it_may_be_stopped_again_and_again(settings: dict[str, Any], tmp_path: Path) -> None:
    run({**settings, "save_steps": 1, "out": tmp_path / "whole"})
    folder = stopped({**settings, "save_steps": 1}, 2)
    # At 4 an epoch ends, at 12 the last one.
    for step in (3, 5, 6, 9, 12):
        with pytest.MonkeyPatch.context() as patch:
            act_at(step, patch, kill)
            with pytest.raises(Killed):
                resume(folder, progress=False)
    steps = [each["step"] for each in resume(folder, progress=False).summary["resumed"]]
    assert steps == [1, 2, 4, 5, 8, 11]
    assert_same_run(folder, tmp_path / "whole")


def test_times_add_up(settings: dict[str, Any]) -> None:
    folder = stopped(settings, 8)
    before = json.loads((folder / "checkpoints" / "checkpoint-6" / SEAL).read_text(encoding="utf-8"))["meter"]
    summary = resume(folder, progress=False).summary
    assert summary["train_time_s"] > before["seconds"] > 0
    assert summary["time_s"] > summary["train_time_s"] + before["preparing"]
    times = [line["time_s"] for line in read_metrics(folder / "metrics.jsonl")]
    assert times == sorted(times), "the clock of a run goes on, it does not begin anew"


def test_evaluating_more_often_changes_no_trained_bit(settings: dict[str, Any], rows_file: Path) -> None:
    out = settings["out"]
    run({**settings, "out": out / "never"})
    run({**settings, "out": out / "often", "eval_data": rows_file, "eval_steps": 1})
    for name, tensor in tensors_of(out / "never").items():
        assert tensor.equal(tensors_of(out / "often")[name]), name


def test_what_may_differ_may_differ(settings: dict[str, Any], rows_file: Path, tmp_path: Path) -> None:
    run({**settings, "out": tmp_path / "whole"})
    folder = stopped(settings, 8)
    moved = tmp_path / "moved"
    folder.rename(moved)
    copied = shutil.copy(rows_file, tmp_path / "copy.jsonl")
    free = {"save_steps": 1, "keep_checkpoints": 5, "eval_data": rows_file, "eval_steps": 4, "data": copied}
    resume(moved, progress=False, **free)
    names = [path.name for path in checkpoints(moved / "checkpoints")]
    assert names == [f"checkpoint-{step}" for step in (8, 9, 10, 11, 12)], "the new interval counts"
    for name, tensor in tensors_of(tmp_path / "whole").items():
        assert tensor.equal(tensors_of(moved)[name]), name
    assert Run.open(moved).config.save_steps == 1


# Stopping on request


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_checkpoint_and_adapter(
    settings: dict[str, Any], tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    run({**settings, "out": tmp_path / "whole"})
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        act_at(5, patch, lambda: signal.raise_signal(number), micro=2)
        halted = fit(RunConfig(**{**settings, "save_steps": 0}))
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (halted.summary["status"], halted.summary["signal"]) == ("interrupted", number.name)
    assert "stopping after this step and saving" in capsys.readouterr().err
    folder = settings["out"]
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["checkpoint-5"], "also without save_steps"
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    resume(folder, progress=False, save_steps=3)
    assert_same_run(folder, tmp_path / "whole")


def cli(*words: Any) -> int:
    """The exit code of `leantune train` with these words."""
    with pytest.raises(SystemExit) as ended:
        main(["train", *(str(word) for word in words)])
    return int(ended.value.code or 0)


def test_the_command_line_resumes_a_folder_and_a_recipe(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run({**settings, "out": tmp_path / "whole"})
    config = RunConfig(**settings)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        act_at(5, patch, interrupt)
        assert cli(recipe) == 130
    assert f"train --resume {config.out}" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        act_at(7, patch, interrupt)
        assert cli("--resume", config.out) == 130
    with pytest.MonkeyPatch.context() as patch:
        act_at(9, patch, lambda: signal.raise_signal(signal.SIGTERM))
        assert cli(recipe, "--resume", "--log-steps", "5") == 143
    assert cli("--resume", "--out", config.out) == 0
    for name, tensor in tensors_of(tmp_path / "whole").items():
        assert tensor.equal(tensors_of(config.out)[name]), name
    assert metrics_of(config.out) == metrics_of(tmp_path / "whole")


def test_the_command_line_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in (
        (("--resume", tmp_path / "absent"), "not there"),
        (("--resume", tmp_path), "no config.yaml"),
        ((tmp_path,), "add --resume"),
    ):
        assert cli(*words) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert text in line


def test_ctrl_c_twice_is_130_too(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RunConfig(**settings).to_yaml(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        act_at(5, patch, lambda: (interrupt(), interrupt()))
        assert cli(recipe) == 130
    assert "train --resume" in capsys.readouterr().err


# Refusals


def refusal(folder: Path, **changes: Any) -> str:
    """What a resume is refused with; nothing in the folder changes by it."""
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    with pytest.raises(RunError) as caught:
        resume(folder, progress=False, **changes)
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before
    return str(caught.value)


@pytest.fixture(scope="module")
def half(llama_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run killed in its eighth step, to be copied."""
    out = tmp_path_factory.mktemp("half") / "run"
    return stopped({**BASIC, **LORA, "model": str(llama_folder), "data": rows_file, "out": out}, 8)


@pytest.fixture
def folder(half: Path, tmp_path: Path) -> Path:
    """A run killed in its eighth step, with checkpoints 3 and 6."""
    return Path(shutil.copytree(half, tmp_path / "run"))


def test_other_settings_are_refused_by_name_with_both_values(folder: Path) -> None:
    text = refusal(folder, lr=0.5, batch_size=3, epochs=4.0, seed=8)
    for line in (
        "lr: 0.5 now, 0.01 in the checkpoint",
        "batch_size: 3 now, 2 in the checkpoint",
        "epochs: 4.0 now, 3.0 in the checkpoint",
        "seed: 8 now, 0 in the checkpoint",
    ):
        assert line in text
    assert "method_options: {'r': 3" in refusal(folder, method_options={**DROPOUT, "r": 3})


def test_other_rows_are_refused(folder: Path, rows_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    text = rows_file.read_text(encoding="utf-8")
    other.write_text(text.replace("green", "blue"), encoding="utf-8")
    assert re.search(
        r"data .*other\.jsonl: other rows \(sha256.*\) than the run began with", refusal(folder, data=other)
    )


def test_another_base_is_refused(folder: Path, llama_folder: Path, tmp_path: Path) -> None:
    base = leantune.load_base(str(llama_folder))
    with torch.no_grad():
        next(iter(base.model.parameters()))[0, 0] += 1
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    text = refusal(folder, model=str(tmp_path / "base"))
    assert "other weights (sha256:" in text
    assert str(llama_folder) in text


def test_another_tokenizer_is_refused(folder: Path, llama_folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama_folder, tmp_path / "base"))
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    del tokenizer["model"]["vocab"]["Facts"]
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "total_tokens" in refusal(folder, model=str(base))


def edit_seal(folder: Path, change: Any) -> None:
    """Change the record in every checkpoint."""
    for path in (folder / "checkpoints").glob(f"checkpoint-*/{SEAL}"):
        facts = json.loads(path.read_text(encoding="utf-8"))
        change(facts)
        path.write_text(json.dumps(facts), encoding="utf-8")


def test_other_versions_are_refused_unless_anyway(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    def older(facts: dict[str, Any]) -> None:
        facts["run"]["environment"]["versions"].update(torch="2.0.0", numpy="1.0.0")
        facts["meter"]["device"] = "cuda"

    edit_seal(folder, older)
    text = refusal(folder)
    assert f"torch: {torch.__version__.split('+')[0]}" in text
    assert "2.0.0 before" in text
    assert "--resume-anyway" in text
    assert "numpy" not in text, "it decides no number here"
    summary = resume(folder, progress=False, anyway=True).summary
    notes = summary["resumed"][0]["notes"]
    assert len(notes) == 2
    assert all("bits may differ" in note for note in notes)
    assert "cpu now, cuda before" in notes[1]


def test_other_threads_and_cpus_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def other(facts: dict[str, Any]) -> None:
        facts["run"]["environment"].update(threads=16, cpu="ABACUS")

    edit_seal(folder, other)
    resume(folder)
    shown = capsys.readouterr().err
    assert "1 threads now, 16 before" in shown
    assert "OMP_NUM_THREADS=16" in shown
    assert "ABACUS before" in shown
    assert "going on from step 6" in shown


def test_another_default_of_the_method_is_refused(folder: Path) -> None:
    edit_seal(folder, lambda facts: facts["run"]["method"]["config"].update(lora_alpha=99))
    assert re.search(r"lora_alpha \d+ now, 99 in the checkpoint", refusal(folder))


def test_another_number_of_processes_is_refused(folder: Path) -> None:
    edit_seal(folder, lambda facts: facts["meter"].update(processes=4))
    assert "processes: 1 now, 4 before" in refusal(folder)


def test_a_run_that_still_runs_is_left_alone(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # The process that runs the tests has a parent, which is alive.
        patch.setattr("leantune.core.atomic.os.getpid", os.getppid)
        owner = atomic.owner()
    lock = folder / ".lock"
    lock.write_text(owner, encoding="utf-8")
    assert f"process {os.getppid()} is writing into it" in refusal(folder)
    for stale in ("99999999-" + owner.partition("-")[2], f"{os.getppid()}-00000000", "torn"):
        lock.write_text(stale, encoding="utf-8")
        run_again = Path(shutil.copytree(folder, folder.with_name(f"run-{stale[:8]}")))
        assert resume(run_again, progress=False).summary["status"] == "complete"
        assert not (run_again / ".lock").exists()


# What there is to go on from


def test_no_run_and_no_checkpoint(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not there"):
        run(settings, resume=True)
    (tmp_path / "run").mkdir()
    with pytest.raises(RunError, match="not a run folder"):
        run(settings, resume=True)
    folder = stopped(settings, 2)
    assert "no checkpoint to go on from" in refusal(folder)


def test_a_complete_run_says_so(settings: dict[str, Any]) -> None:
    run({**settings, "max_steps": 4})
    text = refusal(settings["out"])
    assert "complete: 4 steps, result in" in text
    shutil.rmtree(settings["out"] / "checkpoints")
    assert "complete: 4 steps" in refusal(settings["out"])
    # The rate of a cosine has come down by the planned end: more steps would have been another run.
    run({**settings, "max_steps": 4, "overwrite": True})
    assert "only at a constant rate" in refusal(settings["out"], max_steps=8)


def test_a_constant_rate_goes_on_for_longer(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"schedule": "constant", "warmup_ratio": 0}
    run({**settings, "max_steps": 9, "out": tmp_path / "whole"})
    run({**settings, "max_steps": 5})
    resume(settings["out"], progress=False, max_steps=9)
    assert_same_run(settings["out"], tmp_path / "whole")


def test_a_result_that_was_not_written_is_made_from_the_last_checkpoint(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Six of eight steps of two epochs: transformers by itself would train a seventh.
    settings["max_steps"] = 6
    run({**settings, "out": tmp_path / "whole"})
    monkeypatch.setattr("leantune.train.run._save_result", lambda *_: kill())
    with pytest.raises(Killed):
        run(settings)
    monkeypatch.undo()
    assert resume(settings["out"], progress=False).summary["steps"] == 6
    assert_same_run(settings["out"], tmp_path / "whole")


def test_an_attempt_to_replace_a_result_is_resumed(settings: dict[str, Any], tmp_path: Path) -> None:
    run({**settings, "max_steps": 2, "seed": 5})
    run({**settings, "out": tmp_path / "whole"})
    folder = stopped({**settings, "overwrite": True}, 8)
    assert Run.open(folder).summary["steps"] == 2, "the older result is there until then"
    resume(folder, progress=False)
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "seal", "foreign"])
def test_a_torn_checkpoint_gives_way_to_the_one_before(
    folder: Path, damage: str, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], tmp_path: Path
) -> None:
    newest = folder / "checkpoints" / "checkpoint-6"
    file = newest / {"bit": "adapter_model.safetensors", "seal": SEAL, "foreign": SEAL}.get(damage, "optimizer.pt")
    data = bytearray(file.read_bytes())
    if damage in ("gone", "foreign"):
        file.unlink()
    elif damage == "bit":
        data[-1] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[: len(data) // 2])
    assert resume(folder).summary["resumed"] == [{"step": 3, "notes": []}]
    assert "checkpoint-6 is torn (" in capsys.readouterr().err
    assert (folder / "checkpoints" / "checkpoint-6.torn").is_dir(), "nothing is thrown away"
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["checkpoint-9", "checkpoint-12"]
    run({**settings, "out": tmp_path / "whole"})
    assert_same_run(folder, tmp_path / "whole")


def test_all_torn_is_said(folder: Path) -> None:
    for path in (folder / "checkpoints").iterdir():
        (path / "scheduler.pt").unlink()
    text = refusal(folder)
    assert "no whole checkpoint" in text
    assert "checkpoint-6 (scheduler.pt is missing), checkpoint-3 (scheduler.pt is missing)" in text


def test_lost_lines_of_metrics_are_brought_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = [{"step": step, "loss": float(step), "epoch": 0.5} for step in (1, 2, 3)]
    history.append({"step": 3, "eval_loss": 7.0})
    history.append({"step": 3, "train_runtime": 1.0})
    lines = [{"step": 1, "loss": 1.0, "time_s": 9.0}, {"step": 2, "loss": 99.0, "time_s": 9.5}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo', encoding="utf-8")
    rewind_metrics(path, history)
    assert read_metrics(path) == [lines[0], *history[1:4]]
    longer = [*history[:2], {"step": 3, "loss": 5.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in longer), encoding="utf-8")
    rewind_metrics(path, history[:2])
    assert read_metrics(path) == history[:2]
