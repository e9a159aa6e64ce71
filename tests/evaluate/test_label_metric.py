"""Metrics of labels: the libraries' values, and the bootstrap's own formulas equal to them on every sample."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from leantune.evaluate.interval import Sampled
from leantune.evaluate.label_metric import class_statistics, number_statistics


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("classes", [2, 4])
def test_classes(classes: int, generator: np.random.Generator) -> None:
    true = generator.integers(classes, size=60)
    predicted = np.where(generator.random(60) < 0.6, true, generator.integers(classes, size=60))
    found = class_statistics(true, predicted, classes)
    average = "binary" if classes == 2 else "macro"
    assert found["accuracy"].value() == pytest.approx(100 * metrics.accuracy_score(true, predicted))
    assert found["f1"].value() == pytest.approx(metrics.f1_score(true, predicted, average=average))
    assert found["mcc"].value() == pytest.approx(metrics.matthews_corrcoef(true, predicted))
    for name in ("f1", "mcc"):
        statistic = found[name]
        assert isinstance(statistic, Sampled)
        indices = generator.integers(60, size=(20, 60))
        expected = [statistic.point(statistic.values[sample]) for sample in indices]
        np.testing.assert_allclose(statistic.resampled(indices), expected, rtol=1e-12)


@pytest.mark.parametrize(("true", "predicted"), [([0, 0, 0], [0, 0, 0]), ([0, 1, 0], [0, 0, 0]), ([1, 1], [1, 1])])
def test_degenerate_classes(true: list[int], predicted: list[int]) -> None:
    for classes in (2, 3):
        for statistic in class_statistics(np.array(true), np.array(predicted), classes).values():
            if isinstance(statistic, Sampled):
                with warnings.catch_warnings():
                    # scikit-learn remarks on a sample of one class.
                    warnings.simplefilter("ignore")
                    assert statistic.value() == pytest.approx(statistic.score(statistic.values))


def test_numbers(generator: np.random.Generator) -> None:
    true = generator.integers(6, size=50).astype(float)
    predicted = true + generator.normal(size=50)
    found = number_statistics(true, predicted)
    assert found["pearson"].value() == pytest.approx(stats.pearsonr(true, predicted).statistic)
    assert found["spearman"].value() == pytest.approx(stats.spearmanr(true, predicted).statistic)
    indices = generator.integers(50, size=(20, 50))
    for name, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        expected = [function(true[sample], predicted[sample]).statistic for sample in indices]
        np.testing.assert_allclose(found[name].resampled(indices), expected, rtol=1e-10)


def test_a_constant_prediction_has_no_correlation() -> None:
    for statistic in number_statistics(np.array([1.0, 2.0, 3.0]), np.zeros(3)).values():
        assert statistic.value() == 0.0
        assert statistic.resampled(np.array([[0, 1, 2]])).tolist() == [0.0]
