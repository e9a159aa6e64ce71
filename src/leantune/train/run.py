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
from leantune.train import folder as run_folder
from leantune.train import summary as summaries
from leantune.train.card import card
from leantune.train.config import RunConfig
from leantune.train.folder import ADAPTER, CONFIG, MODEL, PICTURE
from leantune.train.interrupt import Interrupt
from leantune.train.meter import reset_peak_memory
from leantune.train.plot import draw_loss
from leantune.train.progress import Report, clock
from leantune.train.record import METRICS, RECORD, MetricsFile, read_metrics
from leantune.train.setup import load_model, prepare
from leantune.train.trainer import LeanTrainer


@dataclass
class Run:
    """A run and what it left in its folder.

    Attributes:
        folder: the run folder.
        config: the settings of the result in it.
        summary: run.json; of a run that was killed, what is known of it.
        model: the trained model, after :func:`fit` or :meth:`load`.
        tokenizer: that of the base model, likewise.
        base: the base model, likewise.
    """

    folder: Path
    config: RunConfig
    summary: dict[str, Any] = field(repr=False)
    model: Any = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    base: BaseModel | None = field(default=None, repr=False)

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
        return found

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Read a run folder, whole or left by a kill.

        Raises:
            RunError: the folder is no run folder, or cannot be read.
        """
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
            LeantuneError: there is no result, or it and its base do not go together.
        """
        result = self.result
        labels = (self.summary.get("data") or {}).get("label_names")
        if self.config.chosen_method.is_adapter:
            self.base = load_model(self.config, self.config.model, labels)
            self.model = adapters.load(self.base, result)
        else:
            self.base = load_model(self.config, str(result), labels)
            self.model = self.base.model
        self.model.eval()
        self.tokenizer = self.base.tokenizer
        return self.base, self.model


def fit(config: RunConfig, *, progress: bool = True) -> Run:
    """Train as the configuration says, and leave the run folder.

    Args:
        config: the settings.
        progress: show on stderr what happens.

    Returns:
        The run, with the trained model.

    Raises:
        LeantuneError: the data, the model, the method's options or the run folder are not as they must be, or the
            loss is no longer finite. An older result in the folder is then still there.
    """
    began = time.perf_counter()
    config = config.model_copy(update={"lr": config.learning_rate})
    reset_peak_memory()
    prepared = prepare(config)
    base, examples, model, trainer = prepared.base, prepared.examples, prepared.model, prepared.trainer
    summary = summaries.before(config, base, model, examples)

    run_folder.begin(config)
    if run_folder.result_folder(config.out) is None:
        run_folder.write_record(config.out, summary)
    report = Report(trainer.meter, config.log_steps, Console(stderr=True) if progress else None)
    report.announce(summary, load_time_s=time.perf_counter() - began)
    status = _train(config, trainer, report)
    if examples.evaluation is not None and not trainer.evaluated_last_step:
        report.say(f"evaluating on {len(examples.evaluation):,} rows")
        trainer.evaluate()
    summary |= {"status": status, **summaries.after(trainer), "time_s": time.perf_counter() - began}

    _save_result(config, base, model, summary)
    summary = run_folder.write_record(config.out, summary)
    draw_loss(read_metrics(config.out / METRICS), config.out / PICTURE, summaries.title(summary))
    run = Run(config.out, config, summary, model.eval(), base.tokenizer, base)
    report.say(f"{status}: {summary['steps']:,} steps in {clock(summary['train_time_s'])}, saved in {run.result}")
    return run


def _train(config: RunConfig, trainer: LeanTrainer, report: Report) -> str:
    """Train; the status is "complete" or, after Ctrl-C, "interrupted"."""
    trainer.add_callback(MetricsFile(config.out / METRICS, trainer.meter))
    trainer.add_callback(report)
    try:
        with Interrupt(report.say) as interrupt:
            trainer.add_callback(interrupt)
            trainer.train()
    finally:
        report.stop()
    if trainer.state.global_step == 0:
        raise RunError(describe(str(config.out), "no step was taken", "at least one", "check epochs and the data"))
    # A method's own callback may end training early, and that run is complete.
    return "interrupted" if interrupt.requested and trainer.state.global_step < trainer.state.max_steps else "complete"


def _save_result(config: RunConfig, base: BaseModel, model: Any, summary: dict[str, Any]) -> None:
    """Write the adapter folder (or the whole model) in one step; an older one is there until then."""
    if config.chosen_method.is_adapter:
        adapters.save(model, config.out / ADAPTER, base=base, tokenizer=base.tokenizer, card=card(summary))
        return
    with atomic.new_folder(config.out / MODEL) as temporary:
        model.save_pretrained(temporary)
        base.tokenizer.save_pretrained(temporary)
