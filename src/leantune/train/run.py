"""A run from its configuration to its folder: :func:`fit`, and :class:`Run` to read what it left."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from leantune import adapters
from leantune.core import atomic
from leantune.core.errors import LeantuneError, RunError, describe
from leantune.models import BaseModel
from leantune.train import distributed, task_result
from leantune.train import folder as run_folder
from leantune.train import summary as summaries
from leantune.train.calibration import calibrate, time_share
from leantune.train.card import card
from leantune.train.config import RunConfig
from leantune.train.failure import told
from leantune.train.folder import ADAPTER, CONFIG, MODEL, PICTURE
from leantune.train.interrupt import Interrupt
from leantune.train.lock import Lock
from leantune.train.meter import reset_peak_memory
from leantune.train.plot import draw_loss
from leantune.train.progress import Report, clock
from leantune.train.record import METRICS, RECORD, MetricsFile, read_metrics
from leantune.train.resumption import Resumption, find
from leantune.train.setup import load_model, prepare
from leantune.train.task_config import unknown_task, view
from leantune.train.task_result import summary_of
from leantune.train.trainer import LeanTrainer


@dataclass
class Run:
    """A run and what it left in its folder.

    Attributes:
        folder: the run folder.
        config: the settings of the result in it.
        summary: run.json; of a run that was killed, what is known of it.
        model: the trained model, after :func:`fit` or :meth:`load`.
        tokenizer: that of the base model (an image model's image processor), likewise.
        base: the base model, likewise.
        task: which of a run's tasks this is, seen as a run of its own; None for a whole run.
    """

    folder: Path
    config: RunConfig
    summary: dict[str, Any] = field(repr=False)
    model: Any = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    base: BaseModel | None = field(default=None, repr=False)
    task: str | None = None

    @property
    def result(self) -> Path:
        """The folder of the newest complete result: adapter/, model/, else the last checkpoint.

        Raises:
            RunError: the run has none.
        """
        found = run_folder.result_folder(self.folder)
        if found is None:
            got = "no adapter and no checkpoint"
            raise RunError(describe(str(self.folder), got, "a run that got that far", "train it again"))
        return found / self.task if self.task is not None else found

    def of_task(self, name: str) -> Run:
        """One of this run's tasks as a run of its own: with its rows, its kind and its adapter.

        Raises:
            RunError: the run has no such task.
        """
        if name not in self.config.tasks:
            known = self.config.tasks
            got = unknown_task(name, known) if known else "a run of one task; it has no other adapter"
            raise RunError(got if known else describe(str(self.folder), got, "no --adapter", "leave it out"))
        return Run(self.folder, view(self.config, name), summary_of(self.summary, name), task=name)

    @classmethod
    def open(cls, folder: str | Path, task: str | None = None) -> Run:
        """Read a run folder, whole or left by a kill.

        Args:
            folder: of the run.
            task: of a run with several, the one to look at (:meth:`of_task`).

        Raises:
            RunError: the folder is no run folder, or cannot be read, or has no such task.
        """
        if task is not None:
            return cls.open(folder).of_task(task)
        path = Path(folder)
        config_path, record_path = path / CONFIG, path / RECORD
        if not config_path.is_file() and not record_path.is_file():
            got = "not a run folder" if path.exists() else "not there"
            raise RunError(describe(str(path), got, f"a folder with {CONFIG}", "check the path, or train into it"))
        try:
            summary = json.loads(record_path.read_text(encoding="utf-8")) if record_path.is_file() else {}
            is_its_record = bool(summary) and run_folder.is_record_of(path, summary)
            config = RunConfig(**summary["config"]) if is_its_record else RunConfig.from_yaml(config_path)
        except (OSError, ValueError, KeyError, TypeError, LeantuneError) as error:
            got = f"cannot be read ({error})"
            raise RunError(describe(str(path), got, "the files of a run", "train it again")) from error
        return cls(path, config, summary if is_its_record else {**summary, "status": "unrecorded"})

    def load(self) -> tuple[BaseModel, Any]:
        """The base model and the trained model (for an adapter: the base with the adapter on it), in evaluation mode.

        Raises:
            LeantuneError: there is no result, or it and its base do not go together; or the run has several tasks.
        """
        if self.config.tasks:
            got = f"a run of {len(self.config.tasks)} tasks ({', '.join(self.config.tasks)})"
            raise RunError(describe(str(self.folder), got, "one of them", "name it: --adapter TASK"))
        result = self.result
        labels = (self.summary.get("data") or {}).get("label_names")
        if self.config.chosen_method.is_adapter:
            self.base = load_model(self.config, self.config.model, labels)
            self.model = adapters.load(self.base, result)
        else:
            self.base = load_model(self.config, str(result), labels)
            self.model = self.base.model
        self.model.eval()
        self.tokenizer = self.base.encoder
        template = run_folder.template_of(self.folder, result)
        if template is not None and not isinstance(self.tokenizer.chat_template, dict):
            # What it was trained with, whatever the base's tokenizer has by now.
            self.tokenizer.chat_template = template
        return self.base, self.model


def resume(folder: str | Path, *, progress: bool = True, anyway: bool = False, **changes: Any) -> Run:
    """Go on with the run in a folder, with its own settings.

    Args:
        folder: the run folder.
        progress: show on stderr what happens.
        anyway: also under other versions of the libraries or on another device: bits may differ then.
        changes: settings that may differ, e.g. ``save_steps``; :func:`fit` refuses others.

    Returns:
        The run, with the trained model.

    Raises:
        LeantuneError: see :func:`fit`.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        got = f"no {CONFIG}" if path.exists() else "not there"
        raise RunError(describe(str(path), got, "a run to go on with", "check the path"))
    settings = RunConfig.from_yaml(path / CONFIG).model_dump()
    return fit(RunConfig(**{**settings, **changes, "out": path}), progress=progress, resume=True, resume_anyway=anyway)


def fit(config: RunConfig, *, progress: bool = True, resume: bool = False, resume_anyway: bool = False) -> Run:
    """Train as the configuration says, and leave the run folder.

    Args:
        config: the settings.
        progress: show on stderr what happens.
        resume: go on from the newest checkpoint in the run folder. On a CPU the result is, bit for bit, that of the
            run that was never stopped.
        resume_anyway: the same, also under other versions of the libraries or on another device.

    Returns:
        The run, with the trained model.

    Raises:
        LeantuneError: the data, the model, the method's options or the run folder are not as they must be, the loss
            is no longer finite, or the disk failed. An older result in the folder is then still there.
    """
    config = config.resolved()
    with told(config.out), Lock(config.out) as lock:
        point = find(config, anyway=resume_anyway) if resume or resume_anyway else None
        return _run(config, point, lock, progress)


def _run(config: RunConfig, point: Resumption | None, lock: Lock, progress: bool) -> Run:
    began = time.perf_counter()
    reset_peak_memory()
    prepared = prepare(config, resume=point is not None)
    base, examples, model, trainer = prepared.base, prepared.examples, prepared.model, prepared.trainer
    summary = summaries.before(config, base, model, examples, trainer.plan)
    if prepared.tasks:
        summary |= task_result.before(prepared)

    is_main = distributed.is_main()
    report = Report(trainer.meter, config.log_steps, Console(stderr=True) if progress and is_main else None)
    if is_main:
        lock.take()
    if point is not None:
        _go_on(config, point, trainer, summary, report)
    elif is_main:
        run_folder.begin(config)
        if run_folder.result_folder(config.out) is None:
            run_folder.write_record(config.out, summary)
    distributed.wait_for_all()
    report.announce(summary, load_time_s=time.perf_counter() - began)
    # Also before going on from a checkpoint, which holds what was chosen: the base may be in an order of its own.
    # Of packs the rows: a measurement has no use for the way they are put together.
    rows = trainer.train_dataset if examples.packs is None else examples.train
    summary |= calibrate(config, trainer, rows, report.say)
    trainer.record = summary
    trainer.meter.preparing += time.perf_counter() - began
    outcome = _train(config, trainer, report, point)
    status = outcome["status"]
    # What asked the run to stop will not wait for an evaluation.
    if examples.evaluation is not None and status == "complete" and not trainer.evaluated_last_step:
        report.say(f"evaluating on {len(examples.evaluation):,} rows")
        trainer.evaluate()
    summary = {**summary, **outcome, **summaries.after(trainer), "time_s": trainer.meter.total_seconds}
    summary |= time_share(summary)

    if prepared.tasks:
        summary["tasks"] = task_result.after(summary, trainer.state.log_history)
    state = distributed.gathered(model, everything=not config.chosen_method.is_adapter)
    if is_main:
        if prepared.tasks:
            task_result.save_tasks(config, base, model, prepared.tasks, summary)
        else:
            _save_result(config, base, model, summary, state)
        summary = run_folder.write_record(config.out, summary)
        draw_loss(read_metrics(config.out / METRICS), config.out / PICTURE, summaries.title(summary))
    distributed.wait_for_all()
    run = Run(config.out, config, summary, model.eval(), base.encoder, base)
    report.say(f"{status}: {summary['steps']:,} steps in {clock(summary['train_time_s'])}, saved in {run.result}")
    return run


def _go_on(config: RunConfig, point: Resumption, trainer: LeanTrainer, summary: dict[str, Any], report: Report) -> None:
    """Hold what was loaded to the checkpoint, and bring folder and counts back to its step."""
    point.check(summary, trainer.args.device.type)
    point.check_processes(trainer.args.world_size)
    summary["resumed"] = [*(point.record.get("resumed") or []), {"step": point.step, "notes": point.notes}]
    if distributed.is_main():
        run_folder.go_on(config, point.path, [path for path, _ in point.torn])
    trainer.meter.go_on(point.meter)
    for line in point.lines():
        report.say(line)


def _train(config: RunConfig, trainer: LeanTrainer, report: Report, point: Resumption | None) -> dict[str, Any]:
    """Train; the status is "complete" or, after Ctrl-C or a preemption, "interrupted"."""
    trainer.add_callback(MetricsFile(config.out / METRICS, trainer.meter))
    trainer.add_callback(report)
    try:
        with Interrupt(report.say) as interrupt:
            trainer.add_callback(interrupt)
            if point is None or not trainer.finish_from(point.path):
                trainer.train(resume_from_checkpoint=None if point is None else str(point.path))
    finally:
        report.stop()
    if trainer.state.global_step == 0:
        raise RunError(describe(str(config.out), "no step was taken", "at least one", "check epochs and the data"))
    # A method's own callback may end training early, and that run is complete.
    if interrupt.signal is None or trainer.state.global_step >= trainer.state.max_steps:
        return {"status": "complete"}
    return {"status": "interrupted", "signal": interrupt.signal.name}


def _save_result(
    config: RunConfig, base: BaseModel, model: Any, summary: dict[str, Any], state: dict[str, Any] | None
) -> None:
    """Write the adapter folder (or the whole model) in one step; an older one is there until then."""
    if config.chosen_method.is_adapter:
        adapters.save(
            model, config.out / ADAPTER, base=base, tokenizer=base.encoder, card=card(summary), state_dict=state
        )
        return
    with atomic.new_folder(config.out / MODEL) as temporary:
        model.save_pretrained(temporary, state_dict=state)
        base.encoder.save_pretrained(temporary)
