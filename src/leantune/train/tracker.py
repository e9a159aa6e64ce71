"""Experiment trackers: TensorBoard, Weights & Biases, Trackio, MLflow and whatever else transformers knows by name.

transformers has a callback for each; here a wrong or missing one is told before anything is loaded, and the run's own
settings go along with the Trainer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import integration_utils
from typing_extensions import override

from leantune.core.errors import DependencyError, LeantuneError, describe, did_you_mean, raise_all
from leantune.train.record import plain

ALL = "all"
LOGS = "tensorboard"
# What pip calls a tracker, where it is not the name itself.
_PIP = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit", "kubeflow": "kubeflow-training"}


@dataclass
class RunArguments(TrainingArguments):
    """The Trainer's arguments, which tell every tracker the run's own settings too (``leantune.model``, ...).

    Attributes:
        run_settings: the run's configuration, by name.
    """

    run_settings: dict[str, Any] | None = field(default=None, metadata={"help": "The run's configuration."})

    @override
    def to_dict(self) -> dict[str, Any]:
        """As transformers gives it, and the run's settings flat: trackers take flat tables best."""
        values = super().to_dict()
        settings = dict(values.pop("run_settings", None) or {})
        options = settings.pop("method_options", None) or {}
        flat = settings | {f"method_options.{name}": value for name, value in options.items()}
        return values | {f"leantune.{name}": plain(value) for name, value in flat.items()}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed, all of them at once.

    Args:
        names: as in ``report_to``.

    Raises:
        DependencyError: one is not installed; the line to type is in the text.
        LeantuneError: one is unknown.
    """
    known = integration_utils.INTEGRATION_TO_CALLBACK
    installed = integration_utils.get_available_reporting_integrations() if names else []
    problems, missing = [], False
    for name in names:
        where = f"report_to '{name}'"
        if name == ALL or name in installed:
            continue
        if name not in known:
            problems.append(
                describe(
                    where, "no tracker that transformers knows", did_you_mean(name, [*known, ALL]), "mend the name"
                )
            )
            continue
        try:
            # Its own constructor has the last word: some are not in the list of installed ones.
            known[name]()
        except Exception as error:
            missing = True
            reason = " ".join(str(error).split()) or type(error).__name__
            problems.append(describe(where, f"cannot be used here ({reason})", "its package", _fix(name)))
    raise_all(problems, DependencyError if missing else LeantuneError)


def _fix(name: str) -> str:
    return f"pip install {_PIP.get(name, name)}, or leave it out of report_to"


def place_logs(trainer: Any, folder: Path) -> None:
    """Have TensorBoard write below the run folder, where ``TENSORBOARD_LOGGING_DIR`` names no other place."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, integration_utils.TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder / LOGS)
