"""The run folder: who may write into it, and what a reader may believe of it.

    config.yaml     the settings of the latest attempt
    chat_template.jinja  the chat template it was given, if any
    metrics.jsonl   its figures, step by step; loss.png draws them
    checkpoints/    its checkpoints, each complete
    adapter/        the newest complete result (model/ when the method trains the whole model); of a run with several
                    tasks a folder of each, and tasks.json
    run.json        the record of that result

A run that replaces another leaves the older result and its record alone until its own are complete.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from leantune.adapters.folder import TASKS_NAME
from leantune.core import atomic
from leantune.core.errors import RunError, describe
from leantune.data.template import read_template
from leantune.train import checkpoint
from leantune.train.config import RunConfig
from leantune.train.lock import LOCK
from leantune.train.record import METRICS, RECORD, file_hash, plain, rewind_metrics
from leantune.train.rows import TEMPLATE

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
MODEL = "model"
PICTURE = "loss.png"
TASKS = TASKS_NAME
WEIGHTS = {ADAPTER: "adapter_model.safetensors", MODEL: "model.safetensors"}


def result_folder(folder: Path) -> Path | None:
    """The folder of a run's newest complete result: adapter/, model/, else its last checkpoint; None without any."""
    for name in (ADAPTER, MODEL):
        atomic.recover(folder / name)
        if (folder / name).is_dir():
            return folder / name
    return checkpoint.last_checkpoint(folder / CHECKPOINTS)


def template_of(folder: Path, result: Path | None = None) -> str | None:
    """The chat template that a run was trained with: beside its result, else as it was given; None without one.

    Args:
        folder: the run folder.
        result: that of one of its tasks; the run's own when not given.
    """
    result = result or result_folder(folder)
    places = [*([result / TEMPLATE] if result is not None else []), folder / TEMPLATE]
    return next((read_template(path) for path in places if path.is_file()), None)


def kept_template(config: RunConfig) -> Path | None:
    """The run's copy of the chat template it was given."""
    path = config.out / TEMPLATE
    return path if config.chat_template is not None and path.is_file() else None


def check_vacant(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds what a run must not touch.

    Raises:
        RunError: it is a file, holds files that no run wrote, or holds a result and ``overwrite`` is off.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(describe(str(folder), "a file", "a folder to write the run into", "choose another out"))
    # A run killed while it took the folder leaves the lock alone.
    if not folder.is_dir() or all(path.name == LOCK or atomic.is_left_over(path) for path in folder.iterdir()):
        return
    if not any((folder / name).exists() for name in (CONFIG, RECORD, CHECKPOINTS)):
        raise RunError(
            describe(str(folder), "holds files that are not a run's", "a new or empty folder", "choose another out")
        )
    if not overwrite and result_folder(folder) is not None:
        raise RunError(
            describe(
                str(folder),
                "holds a run already",
                "a new or empty folder",
                "choose another out, set overwrite, or go on with --resume",
            )
        )


def begin(config: RunConfig) -> None:
    """Make the folder ready for a new run; an older result and its record stay."""
    folder = config.out
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.sweep(folder)
    checkpoint.sweep(folder / CHECKPOINTS)
    for path in reversed(checkpoint.checkpoints(folder / CHECKPOINTS)):
        checkpoint.remove(path)
    # First what makes it a run's folder: whatever a kill leaves from here on does not block the next run.
    (folder / CHECKPOINTS).mkdir(exist_ok=True)
    atomic.write_text(folder / METRICS, "")
    if config.chat_template is not None:
        atomic.write_text(folder / TEMPLATE, read_template(config.chat_template))
    else:
        (folder / TEMPLATE).unlink(missing_ok=True)
    atomic.write_text(folder / CONFIG, config.to_yaml())


def go_on(config: RunConfig, point: Path, torn: list[Path]) -> None:
    """Make the folder ready for going on from a checkpoint, as it was when that one was written.

    Args:
        config: the settings; those that may differ are taken from it.
        point: the checkpoint.
        torn: newer folders that are no checkpoints any more; they lose that name and stay.
    """
    folder = config.out
    checkpoint.sweep(folder)
    checkpoint.sweep(folder / CHECKPOINTS)
    for path in torn:
        checkpoint.set_aside(path)
    state = json.loads((point / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    rewind_metrics(folder / METRICS, state["log_history"])
    atomic.write_text(folder / CONFIG, config.to_yaml())


def _fingerprint(result: Path) -> Path:
    """The file whose hash tells a result from another: the weights, or what lists those of each task by their hash."""
    return result / TASKS if (result / TASKS).is_file() else result / WEIGHTS[result.name]


def write_record(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Write run.json with the hash of the result it belongs to; returns what was written."""
    result = result_folder(folder)
    weights = _fingerprint(result) if result is not None and result.name in WEIGHTS else None
    if weights is not None and weights.exists():
        summary = {**summary, "result": {"folder": result.name if result else None, "sha256": file_hash(weights)}}
    written: dict[str, Any] = plain(summary)
    atomic.write_json(folder / RECORD, written)
    return written


def is_record_of(folder: Path, summary: dict[str, Any]) -> bool:
    """Whether a record belongs to the result beside it; not so when a kill fell between writing the two."""
    recorded, result = summary.get("result"), result_folder(folder)
    if recorded is None or result is None or result.name not in WEIGHTS:
        # A run in progress, or killed: the record of its beginning is all there is.
        return True
    weights = _fingerprint(result)
    return not weights.exists() or file_hash(weights) == recorded.get("sha256")
