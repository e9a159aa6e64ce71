"""How good a model is: batched generation, likelihood, scores with 95% intervals, and the difference of two models."""

from __future__ import annotations

from leantune.evaluate.evaluation import TASKS, evaluate
from leantune.evaluate.generation import generate
from leantune.evaluate.interval import Score
from leantune.evaluate.likelihood import Likelihood, likelihood
from leantune.evaluate.prediction import predict
from leantune.evaluate.reference import Input, group_references
from leantune.evaluate.scores import METRICS, Metric, Scores, paired_difference
from leantune.evaluate.stream import stream

__all__ = [
    "METRICS",
    "TASKS",
    "Input",
    "Likelihood",
    "Metric",
    "Score",
    "Scores",
    "evaluate",
    "generate",
    "group_references",
    "likelihood",
    "paired_difference",
    "predict",
    "stream",
]
