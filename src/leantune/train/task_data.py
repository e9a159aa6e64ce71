"""The rows of several tasks as one data set: each example carries the number of its task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leantune.core.errors import DataError, raise_all
from leantune.data import Encoded
from leantune.train.rows import Rows, read_data
from leantune.train.task_config import HEAD_KINDS, view

if TYPE_CHECKING:
    from leantune.train.config import RunConfig

TASK = "task_index"
"""Column of an example, and of a batch, that holds the number of each row's task."""


@dataclass
class Task:
    """One task of a run, ready to train.

    Attributes:
        name: its name, which is that of its adapter.
        config: its settings, as those of a run of its own.
        train: rows to train on.
        evaluation: rows to measure on; None without any.
        label_names: class names in the order of their numbers (classification alone).
        outputs: width of its head; 0 without one.
        content_hash: of the base with this task's fresh head, as a run of its own loads it.
        head: what the base's config says of such a head: number of labels, problem type, names.
        source: how its training file was understood.
    """

    name: str
    config: RunConfig
    train: Encoded
    evaluation: Encoded | None = None
    label_names: list[str] | None = None
    outputs: int = 0
    content_hash: str = ""
    head: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What it trains."""
        return self.config.task

    @property
    def has_head(self) -> bool:
        """Whether a head answers once a row."""
        return self.kind in HEAD_KINDS


def read_tasks(config: RunConfig, template: Path | None = None) -> dict[str, Rows]:
    """Read and check the rows of every task.

    Args:
        config: of the run.
        template: where the chat template stands; that of the settings when not given.

    Raises:
        DataError: files or rows are bad; all of them at once, each with its task.
    """
    found, problems = {}, []
    for name in config.tasks:
        try:
            found[name] = read_data(view(config, name), template)
        except DataError as error:
            problems.append(f"task '{name}': {error}")
    raise_all(problems, DataError)
    return found


def joined(parts: Sequence[Encoded | None]) -> Encoded:
    """The examples of all tasks, in their order, each with the number of its task; the counts are summed.

    Args:
        parts: of each task its rows; None where it has none.
    """
    whole = Encoded()
    for number, part in enumerate(parts):
        if part is None:
            continue
        whole.examples += [{**example, TASK: number} for example in part]
        whole.lengths += part.lengths
        whole.max_length = part.max_length
        for count in ("total_tokens", "loss_tokens", "truncated", "tokens_cut", "loss_rows_cut"):
            setattr(whole, count, getattr(whole, count) + getattr(part, count))
    return whole
