"""Metrics of generated text against its references: exact match, and BLEU and chrF by sacrebleu.

BLEU and chrF are sacrebleu's with its default settings. Its statistics of each input are kept, so that a corpus score
on any sample of the inputs costs a sum; the scores formed from the sums are sacrebleu's formulas, and tests hold them
equal to its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from leantune.core.errors import require
from leantune.evaluate.interval import Additive

_BLEU_ORDER = 4
_CHRF_ORDER = 6
_CHRF_BETA_SQUARED = 4


def _normal(text: str) -> str:
    return " ".join(text.split())


def _share(sums: np.ndarray) -> np.ndarray:
    return 100.0 * sums[..., 0] / sums[..., 1]


def exact_match(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Additive:
    """Per cent of texts that equal one of their references, white space normalised, case and punctuation kept."""
    hits = [_normal(text) in {_normal(right) for right in known} for text, known in zip(texts, references, strict=True)]
    return Additive(np.stack([np.array(hits, dtype=np.float64), np.ones(len(hits))], axis=1), _share)


def _bleu(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU with sacrebleu's default (``exp``) smoothing from (..., 10) sums: lengths, matches, totals."""
    ours, theirs = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2 : 2 + _BLEU_ORDER], sums[..., 2 + _BLEU_ORDER :]
    # The j-th order without a match counts as half to the power of j matches.
    missing = np.cumsum(matches == 0, axis=-1)
    smoothed = np.where(matches == 0, 0.5**missing, matches)
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = smoothed / totals
        brevity = np.where(ours < theirs, np.exp(1 - theirs / ours), 1.0)
        found = 100.0 * brevity * np.exp(np.log(precisions).mean(axis=-1))
    is_zero = (matches.sum(axis=-1) == 0) | (totals == 0).any(axis=-1)
    return np.where(is_zero, 0.0, found)


def _chrf(sums: np.ndarray) -> np.ndarray:
    """Corpus chrF2 from (..., 18) sums: n-grams of the texts, of their best references, and matches, for each order."""
    counts = sums.reshape(*sums.shape[:-1], _CHRF_ORDER, 3)
    texts, known, matches = counts[..., 0], counts[..., 1], counts[..., 2]
    counted = (texts > 0) & (known > 0)
    orders = np.maximum(counted.sum(axis=-1), 1)
    precision = np.where(counted, matches / np.maximum(texts, 1), 0.0).sum(axis=-1) / orders
    recall = np.where(counted, matches / np.maximum(known, 1), 0.0).sum(axis=-1) / orders
    weighted = _CHRF_BETA_SQUARED * precision + recall
    with np.errstate(divide="ignore", invalid="ignore"):
        found = 100.0 * (1 + _CHRF_BETA_SQUARED) * precision * recall / weighted
    return np.where(weighted > 0, found, 0.0)


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References as sacrebleu takes them: the first of each input, the second, ...; None where an input has no more."""
    most = max(len(known) for known in references)
    return [[known[i] if i < len(known) else None for known in references] for i in range(most)]


def _statistics(metric: Any, texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    # sacrebleu's own significance tests are built on this method; it has no public one for chrF.
    return np.array(metric._extract_corpus_statistics(list(texts), _streams(references)), dtype=np.float64)


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Additive, str]:
    """Corpus BLEU (sacrebleu, default settings) with all references of each text.

    Args:
        texts: generated texts.
        references: the references of each; their number may differ.

    Returns:
        The statistic (0 to 100) and sacrebleu's signature.

    Raises:
        DependencyError: sacrebleu is not installed.
    """
    require("sacrebleu", "eval")
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    statistics = _statistics(metric, texts, references)
    return Additive(statistics, _bleu), f"sacrebleu BLEU|{metric.get_signature().format()}"


def chrf(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Additive, str]:
    """Corpus chrF2 (sacrebleu, default settings). Arguments, result and errors as of :func:`bleu`."""
    require("sacrebleu", "eval")
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    statistics = _statistics(metric, texts, references)
    return Additive(statistics, _chrf), f"sacrebleu chrF2|{metric.get_signature().format()}"
