"""The rows of a run: where they come from, how they were understood, which of them are held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from leantune.core.errors import DataError, describe
from leantune.data import Row, find_label_names, iter_rows
from leantune.data.report import glued
from leantune.data.source import Source, read_source
from leantune.data.split import is_held_out, split_rows
from leantune.data.template import read_template
from leantune.train.config import RunConfig

TEMPLATE = "chat_template.jinja"
# Tasks whose labels are names of classes.
CLASSES_TASKS = ("classification", "image-classification")


@dataclass
class Rows:
    """The rows of a run, checked.

    Attributes:
        train: to train on; the first alone of a file that is streamed.
        evaluation: to measure on; None without eval_data and eval_share.
        label_names: class names in the order of their numbers; None where there are no classes.
        source: how the training file was understood, for the record.
        template: the chat template that was given, as text.
    """

    train: list[Row]
    evaluation: list[Row] | None
    label_names: list[str] | None
    source: dict[str, Any] = field(default_factory=dict)
    template: str | None = None


def source_of(config: RunConfig, *, evaluation: bool = False) -> Source:
    """The training rows' source, or that of the evaluation."""
    path: Any = config.eval_data if evaluation else config.data
    split = "validation" if evaluation else "train"
    return Source(path, format=config.format, columns=config.columns, split=split)


def streamed(config: RunConfig) -> Iterator[Row]:
    """The training rows one by one, those held out left aside.

    Raises:
        DataError: at the first bad row.
    """
    for row in _every(config):
        if config.eval_share is None or not is_held_out(row, config.eval_share):
            yield row


def _every(config: RunConfig) -> Iterator[Row]:
    return iter_rows(config.data, format=config.format, columns=config.columns, limit=config.limit)


def held_out(config: RunConfig) -> list[Row]:
    """The rows of the training file that eval_share holds out.

    Raises:
        DataError: a row is bad, or none is held out.
    """
    if config.streaming:
        return _held_out_of_stream(config)
    return split_rows(read_source(source_of(config), limit=config.limit), config.eval_share or 0.0, str(config.data))[1]


def _held_out_of_stream(config: RunConfig) -> list[Row]:
    """The file may be larger than memory; what is held out of it is not."""
    return [row for row in _every(config) if is_held_out(row, config.eval_share or 0.0)]


def read_data(config: RunConfig, template: Path | None = None) -> Rows:
    """Read and check the rows and the chat template, before a model is loaded for them.

    Args:
        config: the settings.
        template: where the chat template stands; that of the settings when not given.

    Raises:
        DataError: a file or row is bad.
    """
    path = template or config.chat_template
    jinja = read_template(path) if path is not None else None
    source = source_of(config)
    train = read_source(source, limit=1 if config.streaming else config.limit)
    evaluation = None
    if config.eval_data is not None:
        evaluation = read_source(source_of(config, evaluation=True))
    elif config.eval_share is not None and config.streaming:
        evaluation = _held_out_of_stream(config)
        train = list(islice(streamed(config), 1))
        if not (train and evaluation):
            got = f"eval_share {config.eval_share:g} holds out {'every row' if evaluation else 'no row'}"
            do = "change eval_share, or name a file as eval_data"
            raise DataError(describe(source.name, got, "rows to train on and rows to evaluate on", do))
    elif config.eval_share is not None:
        train, evaluation = split_rows(train, config.eval_share, source.name)
    known = [*train, *(evaluation or [])] if config.eval_share is not None else train
    labels = find_label_names(known) if config.task in CLASSES_TASKS else None
    notes = source.notes()
    if config.task == "causal-lm" and (count := glued(train)) > len(train) / 2 and train[0].messages is None:
        notes.append(f"{count:,} prompts run into their completion without a space or line break between them")
    return Rows(train, evaluation, labels, {**source.facts(), "notes": notes}, jinja)
