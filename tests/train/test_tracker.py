"""Trackers: the run's figures and settings reach them, and a wrong name is told before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from leantune.core.errors import DependencyError, LeantuneError
from leantune.train import RunConfig, dry_run, fit
from leantune.train.tracker import check_trackers, place_logs


@pytest.fixture
def settings(llama_folder: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(llama_folder),
        "data": rows_file,
        "out": tmp_path / "seventh",
        "method_options": {"heads": 1, "channels": 4},
        "max_steps": 3,
        "batch_size": 4,
        "lr": 1e-2,
        "save_steps": 0,
    }


class Notebook(TrainerCallback):
    """A tracker as transformers has them: made without arguments, told everything by events."""

    made: ClassVar[list[Notebook]] = []

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}
        self.text = ""
        self.lines: list[tuple[int, dict[str, Any]]] = []
        Notebook.made.append(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self.arguments = args.to_dict()
        self.text = args.to_json_string()
        assert keywords["model"].peft_config

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **keywords: Any) -> None:
        self.lines.append((state.global_step, dict(logs)))


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[Notebook]:
    """The tracker, registered as transformers registers its own."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "notebook", Notebook)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["notebook"])
    monkeypatch.setattr(Notebook, "made", [])
    return Notebook


def test_a_tracker_gets_every_step_and_the_settings_of_the_run(
    settings: dict[str, Any], notebook: type[Notebook]
) -> None:
    run = fit(RunConfig(**settings, report_to=["notebook"]), progress=False)
    [tracker] = notebook.made
    steps = [step for step, logs in tracker.lines if "loss" in logs]
    assert steps == [1, 2, 3]
    assert all({"loss", "learning_rate", "grad_norm"} <= set(logs) for _, logs in tracker.lines if "loss" in logs)
    assert tracker.arguments["run_name"] == "seventh"
    assert tracker.arguments["leantune.model"] == settings["model"]
    assert tracker.arguments["leantune.method"] == "s2ft"
    assert tracker.arguments["leantune.method_options.channels"] == 4
    assert "run_settings" not in tracker.arguments
    assert json.loads(tracker.text)["leantune.data"] == settings["data"].as_posix()
    assert run.summary["config"]["report_to"] == ["notebook"]


def test_a_run_has_the_name_it_is_given(settings: dict[str, Any], notebook: type[Notebook]) -> None:
    fit(RunConfig(**settings, report_to="notebook", run_name="second try"), progress=False)
    assert notebook.made[0].arguments["run_name"] == "second try"


def test_no_tracker_is_asked_for_by_default(settings: dict[str, Any], notebook: type[Notebook]) -> None:
    fit(RunConfig(**settings), progress=False)
    assert notebook.made == []


def test_a_dry_run_tells_no_tracker(settings: dict[str, Any], notebook: type[Notebook]) -> None:
    found = dry_run(RunConfig(**settings, report_to=["notebook"]))
    assert notebook.made == []
    assert found["config"]["report_to"] == ["notebook"]


@pytest.mark.parametrize(
    ("given", "names"),
    [("none", []), (None, []), ("", []), ("wandb, mlflow", ["wandb", "mlflow"]), (["all"], ["all"]), ("all", ["all"])],
)
def test_names_are_a_list_or_one_text(given: Any, names: list[str]) -> None:
    config = RunConfig(model="m", data="d", out="o", report_to=given)
    assert config.report_to == names


def test_what_is_no_name_is_refused() -> None:
    with pytest.raises(LeantuneError, match="report_to"):
        RunConfig(model="m", data="d", out="o", report_to=7)


def test_unknown_and_missing_trackers_are_told_at_once(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Absent(TrainerCallback):
        def __init__(self) -> None:
            raise RuntimeError("WandbCallback requires wandb to be installed.")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Absent)
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", list)
    with pytest.raises(DependencyError) as caught:
        # The model is not there either: the trackers are looked at first.
        fit(RunConfig(**settings | {"model": "./nowhere"}, report_to=["wandb", "tensorbord"]), progress=False)
    text = str(caught.value)
    assert "pip install wandb" in text
    assert "did you mean 'tensorboard'?" in text
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LeantuneError, match="no tracker that transformers knows"):
        check_trackers(["tensorbord"])


def test_tensorboard_writes_into_the_run_folder_unless_told_otherwise(tmp_path: Path) -> None:
    class Board(integration_utils.TensorBoardCallback):
        def __init__(self, logging_dir: str | None) -> None:
            self.logging_dir = logging_dir

    class Host:
        def __init__(self, *callbacks: Any) -> None:
            self.callback_handler = self
            self.callbacks = callbacks

    free, told = Board(None), Board("elsewhere")
    place_logs(Host(free, told, Notebook()), tmp_path)
    assert (free.logging_dir, told.logging_dir) == (str(tmp_path / "tensorboard"), "elsewhere")
