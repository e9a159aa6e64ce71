"""What a person is told of the tasks of a run: before it, while it goes on, at an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def task_lines(tasks: dict[str, Any], parameters: dict[str, Any]) -> Iterator[str]:
    """A line for each task, and one on what sharing saves.

    Args:
        tasks: as the record has them.
        parameters: ``task_parameters`` of the record.
    """
    width = max(len(name) for name in tasks)
    for name, task in tasks.items():
        data, held = task["data"], task["eval_data"]
        classes = f", {len(data['label_names'])} classes" if data["label_names"] else ""
        rows = f"{data['rows']:,} rows" + (f" and {held['rows']:,} to evaluate on" if held else "")
        draws = f"{task['share']:.0%} of those drawn"
        yield f"{name:<{width}}  {task['kind']}{classes}; {rows}, {draws}; lr {task['lr']:g}, {task['schedule']}"
    yield parameters["text"]


def by_task(logs: dict[str, Any], start: str) -> dict[str, dict[str, float]]:
    """The figures of each task in a logged line, ``{task: {figure: value}}``.

    Args:
        logs: names like ``loss/cola``, ``eval_accuracy/cola``.
        start: what the names begin with; taken off.
    """
    found: dict[str, dict[str, float]] = {}
    for key, value in logs.items():
        figure, slash, task = key.partition("/")
        if slash and figure.startswith(start):
            found.setdefault(task, {})[figure.removeprefix(start)] = float(value)
    return found


def evaluation_lines(logs: dict[str, Any]) -> Iterator[str]:
    """A line for each task that was measured."""
    measured = by_task(logs, "eval_")
    width = max((len(name) for name in measured), default=0)
    for name, figures in measured.items():
        yield f"  {name:<{width}}  " + "  ".join(f"{figure} {value:.4g}" for figure, value in figures.items())


class TaskLosses:
    """The losses of each task since they were last told."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, logs: dict[str, Any]) -> None:
        """The line of a step."""
        for name, figures in by_task(logs, "").items():
            if "loss" in figures:
                self._sums.setdefault(name, []).append(figures["loss"])

    def text(self, last: int | None = None) -> str:
        """The mean of each task, over its last steps or over all; empty in a run of one task."""
        means = {name: values[-last:] if last else values for name, values in self._sums.items() if values}
        told = "  ".join(f"{name} {sum(values) / len(values):.4f}" for name, values in means.items())
        return f"  ({told})" if told else ""

    def forget(self) -> None:
        """They have been told."""
        self._sums = {name: [] for name in self._sums}
