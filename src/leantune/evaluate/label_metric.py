"""Metrics of predicted labels: accuracy, F1 and MCC by scikit-learn, Pearson and Spearman correlation by scipy.

The libraries compute the values that are reported. The bootstrap computes the same numbers thousands of times, so it
has short formulas of its own; tests hold them equal to the libraries'.
"""

from __future__ import annotations

import numpy as np

from leantune.core.errors import require
from leantune.evaluate.interval import Additive, Sampled, Statistic


def _counts(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each class: hits, true ones, predicted ones; ``sample`` is (inputs, 2) of true and predicted class numbers."""
    true, predicted = sample[:, 0], sample[:, 1]
    classes = int(sample.max()) + 1
    hits = np.bincount(true[true == predicted], minlength=classes)
    return hits, np.bincount(true, minlength=classes), np.bincount(predicted, minlength=classes)


def _macro_f1(sample: np.ndarray) -> float:
    hits, true, predicted = _counts(sample)
    present = (true + predicted) > 0
    return float(np.mean(2 * hits[present] / (true + predicted)[present]))


def _binary_f1(sample: np.ndarray) -> float:
    true, predicted = sample[:, 0] == 1, sample[:, 1] == 1
    total = true.sum() + predicted.sum()
    return float(2 * (true & predicted).sum() / total) if total else 0.0


def _mcc(sample: np.ndarray) -> float:
    hits, true, predicted = (count.astype(np.float64) for count in _counts(sample))
    n = len(sample)
    covariance = hits.sum() * n - (true * predicted).sum()
    spread = (n * n - (true**2).sum()) * (n * n - (predicted**2).sum())
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def class_statistics(true: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, Statistic]:
    """Accuracy in per cent, F1 (of class 1 when there are two classes, else the mean over classes) and MCC.

    Args:
        true: class numbers, (inputs,).
        predicted: class numbers, (inputs,).
        classes: how many classes there are.

    Raises:
        DependencyError: scikit-learn is not installed.
    """
    require("sklearn", "eval")
    from sklearn import metrics

    hits = np.stack([true == predicted, np.ones(len(true))], axis=1).astype(np.float64)
    pairs = np.stack([true, predicted], axis=1).astype(np.int64)

    def f1(sample: np.ndarray) -> float:
        average = "binary" if classes == 2 else "macro"
        return metrics.f1_score(sample[:, 0], sample[:, 1], average=average, zero_division=0.0)

    def mcc(sample: np.ndarray) -> float:
        return metrics.matthews_corrcoef(sample[:, 0], sample[:, 1])

    return {
        "accuracy": Additive(hits, lambda sums: 100.0 * sums[..., 0] / sums[..., 1]),
        "f1": Sampled(pairs, f1, _binary_f1 if classes == 2 else _macro_f1),
        "mcc": Sampled(pairs, mcc, _mcc),
    }


def _is_flat(sample: np.ndarray) -> bool:
    return bool((np.ptp(sample, axis=0) == 0).any())


def _pearson(sample: np.ndarray) -> float:
    if _is_flat(sample):
        return 0.0
    centred = sample - sample.mean(axis=0)
    spread = np.sqrt((centred[:, 0] ** 2).sum() * (centred[:, 1] ** 2).sum())
    return float((centred[:, 0] * centred[:, 1]).sum() / spread)


def number_statistics(true: np.ndarray, predicted: np.ndarray) -> dict[str, Statistic]:
    """Pearson and Spearman correlation; 0 where one side is constant and neither is defined.

    Args:
        true: the labels, (inputs,).
        predicted: the predictions, (inputs,).

    Raises:
        DependencyError: scipy is not installed.
    """
    require("scipy", "eval")
    from scipy import stats

    pairs = np.stack([true, predicted], axis=1).astype(np.float64)

    def pearson(sample: np.ndarray) -> float:
        return 0.0 if _is_flat(sample) else stats.pearsonr(sample[:, 0], sample[:, 1]).statistic

    def spearman(sample: np.ndarray) -> float:
        return 0.0 if _is_flat(sample) else stats.spearmanr(sample[:, 0], sample[:, 1]).statistic

    def ranked(sample: np.ndarray) -> float:
        return _pearson(stats.rankdata(sample, axis=0))

    return {"pearson": Sampled(pairs, pearson, _pearson), "spearman": Sampled(pairs, spearman, ranked)}
