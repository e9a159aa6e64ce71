"""Base and tuned model on the same rows, side by side: what `eval` and `demo` show."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from leantune.core import atomic

if TYPE_CHECKING:
    from leantune.data import Row
    from leantune.evaluate import Score, Scores
    from leantune.train import Run

Progress = Callable[[str, int, int], None]


@dataclass
class Comparison:
    """Scores of both models on the same inputs, and the paired difference (tuned minus base)."""

    base: Scores
    tuned: Scores
    difference: dict[str, Score]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without the generated texts."""
        return {
            "base": self.base.to_dict(generations=False),
            "tuned": self.tuned.to_dict(generations=False),
            "difference": {name: score.to_dict() for name, score in self.difference.items()},
        }


@contextmanager
def base_of(run: Run) -> Iterator[Any]:
    """The base model of a loaded run: the adapter switched off, or the base loaded again where all of it trained."""
    if run.config.chosen_method.is_adapter:
        with run.model.disable_adapter():
            yield run.model
        return
    from leantune.models import load_base

    labels = (run.summary.get("data") or {}).get("label_names")
    yield load_base(
        run.config.model,
        task=run.config.task,
        num_labels=len(labels) if labels else None,
        dtype=run.config.dtype,
        revision=run.config.revision,
    ).model


def compare(run: Run, rows: Sequence[Row], *, progress: Progress | None = None, **settings: Any) -> Comparison:
    """Score a loaded run and its base on the same rows.

    Args:
        run: a run with its model loaded.
        rows: what to score on.
        progress: called as ``progress(stage, done, total)``.
        settings: passed on to :func:`leantune.evaluate.evaluate`.
    """
    from leantune.evaluate import evaluate, paired_difference

    def of(name: str) -> Progress | None:
        return None if progress is None else lambda stage, done, total: progress(f"{name}: {stage}", done, total)

    settings = {"task": run.config.task, "label_names": (run.summary.get("data") or {}).get("label_names"), **settings}
    tuned = evaluate(run.model, run.tokenizer, rows, progress=of("tuned"), **settings)
    with base_of(run) as model:
        base = evaluate(model, run.tokenizer, rows, progress=of("base"), **settings)
    return Comparison(base, tuned, paired_difference(base, tuned))


def table(comparison: Comparison) -> Table:
    """The comparison as a table; a difference whose interval leaves out zero is coloured."""
    from leantune.evaluate import METRICS

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("metric", no_wrap=True)
    for title in ("base", "tuned", "tuned - base"):
        shown.add_column(title, justify="right", no_wrap=True)
    for name, difference in comparison.difference.items():
        metric = METRICS[name]
        title = metric.title.removesuffix(" (sacrebleu)") + (" %" if metric.unit == "%" else "")
        shown.add_row(
            title,
            interval(comparison.base.metrics[name]),
            interval(comparison.tuned.metrics[name]),
            Text(interval(difference, sign=True), style=_style(difference, metric.higher_is_better)),
        )
    return shown


def interval(score: Score, *, sign: bool = False) -> str:
    """``12.34 [11.90, 12.80]``."""
    bounds = "" if score.low is None else f" [{_number(score.low)}, {_number(score.high)}]"
    return _number(score.value, sign) + bounds


def _number(value: float | None, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "inf"
    size = abs(value)
    digits = 2 if 0.1 <= size < 1000 or size == 0 else 4 if 1e-4 <= size < 0.1 else None
    return f"{value:{'+' if sign else ''}.3g}" if digits is None else f"{value:{'+' if sign else ''}.{digits}f}"


def _style(difference: Score, higher_is_better: bool) -> str:
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return ""
    return "green" if (difference.low > 0) == higher_is_better else "red"


def note(run: Run, data: Path, comparison: Comparison, split: str = "validation") -> None:
    """Write the comparison into the run's run.json, under ``evaluation``, beside what is there already.

    Of a run with several tasks it stands under the task's own ``files``.

    Args:
        run: the run.
        data: what was scored on.
        comparison: the scores.
        split: of a folder, the files that were scored.
    """
    from leantune.data import data_hash

    path = run.folder / "run.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else dict(run.summary)
    part = summary if run.task is None else summary["tasks"][run.task]
    evaluation = part.get("evaluation") or {}
    files = evaluation.get("files") or {}
    files[data.as_posix()] = {"hash": data_hash(data, split=split), **comparison.to_dict()}
    part["evaluation"] = {**evaluation, "files": files}
    atomic.write_json(path, summary)
