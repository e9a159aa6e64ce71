"""Bootstrap intervals: right in a case that can be computed, paired where they should be, the same every time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from leantune.evaluate import interval
from leantune.evaluate.interval import Additive, Sampled, difference, score


def mean(values: np.ndarray) -> Additive:
    return Additive(np.stack([values, np.ones(len(values))], axis=1), lambda sums: sums[..., 0] / sums[..., 1])


def test_interval_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    found = score(mean(values), resamples=4000, seed=3)
    assert found.value == pytest.approx(values.mean())
    # The standard error is known here; 4,000 resamples leave its bounds about 3% uncertain.
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.06 * half)


def test_sums_and_samples_agree() -> None:
    values = np.random.default_rng(1).normal(size=(30, 1))
    whole = Sampled(values, lambda sample: float(sample.mean()), lambda sample: float(sample.mean()))
    first, second = score(mean(values[:, 0])), score(whole)
    assert (first.low, first.high) == pytest.approx((second.low, second.high))


def test_seeded_and_independent_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    statistic = mean(np.arange(20.0))
    assert score(statistic, seed=1) == score(statistic, seed=1)
    assert score(statistic, seed=1) != score(statistic, seed=2)
    whole = score(statistic, seed=1)
    monkeypatch.setattr(interval, "_CHUNK_CELLS", 60)
    chunked = score(statistic, seed=1)
    assert (chunked.low, chunked.high) == pytest.approx((whole.low, whole.high))


def test_difference_is_paired() -> None:
    base = np.random.default_rng(0).normal(0.0, 100.0, size=50)
    small = difference(mean(base), mean(base + 1.0))
    # The inputs vary by a hundred, the difference never: unpaired samples would give an interval of tens.
    assert (small.value, small.low, small.high) == pytest.approx((1.0, 1.0, 1.0))
    assert difference(mean(base + 1.0), mean(base)).value == pytest.approx(-1.0)


def test_what_cannot_be_resampled() -> None:
    assert score(mean(np.array([3.0]))).low is None
    assert score(mean(np.arange(3.0)), resamples=0).high is None
    assert difference(mean(np.array([3.0])), mean(np.array([4.0]))).low is None
    with pytest.raises(ValueError, match="3 and 4 inputs"):
        difference(mean(np.arange(3.0)), mean(np.arange(4.0)))
