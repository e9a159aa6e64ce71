"""The result of an evaluation: values with intervals, what was generated, and what it takes to compare two of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from leantune.core.errors import DataError, describe
from leantune.evaluate.interval import RESAMPLES, Score, Statistic, difference


@dataclass(frozen=True)
class Metric:
    """How a metric is to be shown.

    Attributes:
        title: its name in tables, with the program that defines it.
        unit: unit of the value, or ``""``.
        higher_is_better: which way is up.
    """

    title: str
    unit: str
    higher_is_better: bool


METRICS: Mapping[str, Metric] = {
    "loss": Metric("loss", "nats per token", False),
    "perplexity": Metric("perplexity", "", False),
    "pseudo_perplexity": Metric("pseudo-perplexity", "", False),
    "exact_match": Metric("exact match", "%", True),
    "bleu": Metric("BLEU (sacrebleu)", "", True),
    "chrf": Metric("chrF2 (sacrebleu)", "", True),
    "cross_entropy": Metric("cross-entropy", "nats per row", False),
    "accuracy": Metric("accuracy", "%", True),
    "f1": Metric("F1", "", True),
    "mcc": Metric("MCC", "", True),
    "mse": Metric("mean squared error", "", False),
    "pearson": Metric("Pearson r", "", True),
    "spearman": Metric("Spearman r", "", True),
}


@dataclass
class Scores:
    """Scores of one model on one data set.

    Attributes:
        task: as given to :func:`leantune.evaluate.evaluate`.
        metrics: name to value with 95% interval (bootstrap over distinct inputs).
        n: distinct inputs; rows with the same prompt are one.
        rows: rows.
        tokens: tokens that carry loss (``causal-lm``).
        truncated: rows cut to ``max_length`` before they were scored.
        settings: what the numbers depend on: new tokens, stop strings, length limit, resamples, seed, signatures of
            sacrebleu.
        generations: for each input ``prompt``, ``text`` and ``references``.
        statistics: what each metric knows of each input; for :func:`paired_difference`, not part of :meth:`to_dict`.
        inputs: what was asked, to tell whether two results can be compared; not part of :meth:`to_dict`.
    """

    task: str
    metrics: dict[str, Score]
    n: int
    rows: int
    tokens: int = 0
    truncated: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    generations: list[dict[str, Any]] = field(default_factory=list)
    statistics: dict[str, Statistic] = field(default_factory=dict, repr=False)
    inputs: list[Any] = field(default_factory=list, repr=False)

    def value(self, name: str) -> float | None:
        """The value of a metric, None when it was not computed."""
        found = self.metrics.get(name)
        return None if found is None else found.value

    @property
    def loss(self) -> float | None:
        """Mean nats per token that carries loss."""
        return self.value("loss")

    @property
    def perplexity(self) -> float | None:
        """``exp(loss)``."""
        return self.value("perplexity")

    @property
    def exact_match(self) -> float | None:
        """Per cent of inputs answered with a reference, white space normalised."""
        return self.value("exact_match")

    @property
    def bleu(self) -> float | None:
        """Corpus BLEU by sacrebleu, 0 to 100."""
        return self.value("bleu")

    @property
    def bleu_signature(self) -> str | None:
        """sacrebleu's signature of :attr:`bleu`."""
        return self.settings.get("bleu_signature")

    @property
    def chrf(self) -> float | None:
        """Corpus chrF2 by sacrebleu, 0 to 100."""
        return self.value("chrf")

    def to_dict(self, *, generations: bool = True) -> dict[str, Any]:
        """As JSON.

        Args:
            generations: whether to include the generated texts.
        """
        shown = {name: {"title": METRICS[name].title, **score.to_dict()} for name, score in self.metrics.items()}
        result = {
            "task": self.task,
            "n": self.n,
            "rows": self.rows,
            "tokens": self.tokens,
            "truncated": self.truncated,
            "metrics": shown,
            "settings": self.settings,
        }
        return {**result, "generations": self.generations} if generations else result


def paired_difference(base: Scores, tuned: Scores, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Score]:
    """``tuned - base`` of every metric both have, with the 95% interval of the difference on the same inputs.

    An interval that leaves out 0 says that the difference is more than the choice of inputs.

    Args:
        base: scores of one model.
        tuned: scores of the other, on the same data.
        resamples: number of bootstrap samples.
        seed: their seed.

    Raises:
        DataError: the two were not scored on the same inputs.
    """
    if base.inputs != tuned.inputs:
        raise DataError(
            describe("comparison", "scores of different inputs", "the same rows for both", "evaluate both on one file")
        )
    shared = [name for name in base.statistics if name in tuned.statistics]
    return {
        name: difference(base.statistics[name], tuned.statistics[name], resamples=resamples, seed=seed)
        for name in shared
    }
