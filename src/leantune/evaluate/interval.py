"""Scores with 95% intervals, by resampling the inputs with replacement (the percentile bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

RESAMPLES = 1000
_TAIL = 0.025
_CHUNK_CELLS = 2_000_000


@dataclass(frozen=True)
class Score:
    """A value and its 95% interval; the bounds are None when there are fewer than two inputs to resample."""

    value: float
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, float | None]:
        """As JSON; what JSON cannot write (an infinite perplexity) becomes None."""
        return {"value": _finite(self.value), "low": _finite(self.low), "high": _finite(self.high)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


class Statistic(Protocol):
    """What one metric needs to know of each input to be computed on any sample of the inputs."""

    def __len__(self) -> int: ...

    def value(self) -> float:
        """The metric on all inputs."""

    def resampled(self, indices: np.ndarray) -> np.ndarray:
        """The metric on each sample; ``indices`` is (samples, inputs)."""


@dataclass(frozen=True)
class Additive:
    """A metric of sums over the inputs, as BLEU and mean loss are.

    Attributes:
        values: (inputs, k) sufficient statistics.
        score: (..., k) sums to (...) scores.
    """

    values: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return len(self.values)

    def value(self) -> float:
        """The metric on all inputs."""
        return float(self.score(self.values.sum(axis=0)))

    def resampled(self, indices: np.ndarray) -> np.ndarray:
        """The metric on each sample, from how often each input was drawn."""
        n = len(self)
        offsets = np.arange(len(indices))[:, None] * n
        drawn = np.bincount((indices + offsets).ravel(), minlength=len(indices) * n).reshape(len(indices), n)
        return self.score(drawn.astype(np.float64) @ self.values)


@dataclass(frozen=True)
class Sampled:
    """A metric that must see the whole sample, as a rank correlation must.

    Attributes:
        values: (inputs, k) what is known of each input.
        point: all inputs' values to the metric, by the library that defines it.
        score: (inputs, k) of one sample to the metric; the same number as ``point``, fast.
    """

    values: np.ndarray
    point: Callable[[np.ndarray], float]
    score: Callable[[np.ndarray], float]

    def __len__(self) -> int:
        return len(self.values)

    def value(self) -> float:
        """The metric on all inputs."""
        return float(self.point(self.values))

    def resampled(self, indices: np.ndarray) -> np.ndarray:
        """The metric on each sample."""
        return np.array([self.score(self.values[sample]) for sample in indices])


def samples(inputs: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Seeded samples with replacement, in chunks of (samples, inputs); every metric is given the same."""
    generator = np.random.default_rng(seed)
    size = max(1, _CHUNK_CELLS // inputs)
    for start in range(0, resamples, size):
        yield generator.integers(inputs, size=(min(size, resamples - start), inputs))


def _bounds(drawn: list[np.ndarray]) -> tuple[float | None, float | None]:
    """The values at 2.5% and 97.5%; none when a sample has no value (the difference of two infinite perplexities)."""
    values = np.sort(np.concatenate(drawn))
    if np.isnan(values[-1]):
        return None, None
    # No interpolation: between infinite values it has no answer.
    last = len(values) - 1
    return float(values[round(_TAIL * last)]), float(values[round((1 - _TAIL) * last)])


def score(statistic: Statistic, *, resamples: int = RESAMPLES, seed: int = 0) -> Score:
    """The metric and its 95% interval over the inputs.

    Args:
        statistic: what is known of each input.
        resamples: number of bootstrap samples; 0 for no interval.
        seed: their seed.
    """
    if len(statistic) < 2 or resamples == 0:
        return Score(statistic.value(), None, None)
    drawn = [statistic.resampled(indices) for indices in samples(len(statistic), resamples, seed)]
    return Score(statistic.value(), *_bounds(drawn))


def difference(base: Statistic, tuned: Statistic, *, resamples: int = RESAMPLES, seed: int = 0) -> Score:
    """``tuned - base`` on the same inputs and its 95% interval; each sample draws the same inputs for both.

    Raises:
        ValueError: they are of different numbers of inputs.
    """
    if len(base) != len(tuned):
        raise ValueError(f"{len(base)} and {len(tuned)} inputs cannot be paired")
    value = tuned.value() - base.value()
    if len(base) < 2 or resamples == 0:
        return Score(value, None, None)
    with np.errstate(invalid="ignore"):
        drawn = [tuned.resampled(index) - base.resampled(index) for index in samples(len(base), resamples, seed)]
    return Score(value, *_bounds(drawn))
