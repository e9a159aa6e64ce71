"""What a run shows: lines where there is no terminal, a bar where there is one, nothing when asked for nothing."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from leantune.train import RunConfig, fit
from leantune.train.meter import Meter
from leantune.train.progress import Report, clock


def play(console: Console | None, steps: int, log_steps: int) -> None:
    """The events of a run whose loss at step n is n."""
    meter = Meter()
    meter.start()
    report = Report(meter, log_steps, console)
    arguments, control = TrainingArguments(use_cpu=True), TrainerControl()
    state = TrainerState(global_step=0, max_steps=steps)
    report.on_train_begin(arguments, state, control)
    for step in range(1, steps + 1):
        meter.tokens += 100
        state.global_step = step
        report.on_log(arguments, state, control, logs={"loss": float(step), "grad_norm": 1.0})
    report.on_log(arguments, state, control, logs={"eval_loss": 1.5, "eval_perplexity": 4.48, "eval_runtime": 9.0})
    report.on_log(arguments, state, control, logs={"train_runtime": 3.0})
    report.on_train_end(arguments, state, control)


def lines_of(steps: int, log_steps: int) -> list[str]:
    out = io.StringIO()
    play(Console(file=out, force_terminal=False, width=40), steps, log_steps)
    return out.getvalue().splitlines()


def test_the_first_step_has_a_line_of_its_own() -> None:
    lines = lines_of(steps=25, log_steps=10)
    assert [int(line.split("/")[0].split()[-1]) for line in lines if "/25" in line] == [1, 10, 20, 25]
    assert re.fullmatch(r"step  1/25  loss 1\.0000  [\d,]+ tokens/s  ETA \d+:\d\d(  [\d.]+ GiB)?", lines[0])


def test_a_line_has_the_mean_loss_since_the_last_one() -> None:
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines_of(steps=25, log_steps=10) if "/25" in line]
    assert losses == [1.0, sum(range(2, 11)) / 9, 15.5, 23.0]


def test_an_evaluation_has_its_line() -> None:
    assert lines_of(steps=3, log_steps=10)[-1] == "step 3  evaluation: loss 1.5  perplexity 4.48"


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    play(Console(file=out, force_terminal=True, width=120, color_system=None), steps=4, log_steps=10)
    text = out.getvalue()
    assert "step 4/4" in text
    assert "━" in text
    assert "evaluation: loss 1.5" in text
    assert "\x1b[?25h" in text, "the cursor is shown again"


def test_silence() -> None:
    play(None, steps=3, log_steps=1)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.6, "1:02"), (3599.7, "1:00:00"), (7325, "2:02:05")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def settings(llama_folder: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    options = {"r": 2, "target_modules": ["q_proj"]}
    run = {"model": str(llama_folder), "data": rows_file, "out": tmp_path / "run", "method": "lora"}
    return {**run, "method_options": options, "max_steps": 2, "batch_size": 2, "device": "cpu", "max_length": 10}


def test_a_run_says_what_it_does(
    llama_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(RunConfig(**settings(llama_folder, rows_file, tmp_path)))
    shown = capsys.readouterr()
    assert shown.out == ""
    for part in ("lora: trains", "40 rows", "rows were cut to 10 tokens", "step 1/2  loss", "complete: 2 steps in"):
        assert part in shown.err
    # The Trainer's own dictionaries and bars are not there.
    assert "{'loss'" not in shown.err
    assert "train_runtime" not in shown.err


def test_a_silent_run_is_silent(
    llama_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(RunConfig(**settings(llama_folder, rows_file, tmp_path)), progress=False)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "step" not in shown.err
