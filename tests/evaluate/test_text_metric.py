"""BLEU and chrF are sacrebleu's own numbers, on the whole and on every sample; exact match knows every reference."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from leantune.evaluate import text_metric

TEXTS = [
    " The Blue Spice is a coffee shop in the city centre.",
    "Loch Fyne serves French food\n\nand it is near the river. It is not kid friendly at all.",
    "",
    "One two.",
    "The Mill is a pub with a high rating; it's cheap, too.",
]
# Different numbers of references, one of them more than once.
REFERENCES = [
    ["A coffee shop in the city centre area called Blue Spice.", "Blue Spice is a coffee shop in the city centre."],
    ["Loch Fyne is a French restaurant near the river."],
    ["Something should have been said.", "Anything at all.", "Anything at all."],
    ["One two."],
    ["The Mill is a cheap pub with a high rating.", "The Mill is a pub.", "A cheap pub: The Mill.", "The Mill, a pub"],
]


def streams(references: list[list[str]]) -> list[list[str | None]]:
    most = max(map(len, references))
    return [[known[i] if i < len(known) else None for known in references] for i in range(most)]


def theirs(name: str, texts: list[str], references: list[list[str]]) -> float:
    metric = {"bleu": sacrebleu.BLEU, "chrf": sacrebleu.CHRF}[name]()
    return metric.corpus_score(texts, streams(references)).score


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_equals_sacrebleu(name: str) -> None:
    statistic, _ = getattr(text_metric, name)(TEXTS, REFERENCES)
    assert statistic.value() == pytest.approx(theirs(name, TEXTS, REFERENCES), rel=1e-12)
    first_alone = [known[:1] for known in REFERENCES]
    assert statistic.value() > theirs(name, TEXTS, first_alone) + 1, "all references should count"


def test_equals_the_function_everyone_calls() -> None:
    whole = [known + known[:1] * (4 - len(known)) for known in REFERENCES]
    found = sacrebleu.corpus_bleu(TEXTS, [list(stream) for stream in zip(*whole, strict=True)])
    statistic, _ = text_metric.bleu(TEXTS, REFERENCES)
    # A reference given twice changes nothing, so padding with the first is the same as leaving a place empty.
    assert statistic.value() == pytest.approx(found.score, rel=1e-12)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_every_sample_equals_sacrebleu(name: str) -> None:
    statistic, _ = getattr(text_metric, name)(TEXTS, REFERENCES)
    indices = np.random.default_rng(0).integers(len(TEXTS), size=(40, len(TEXTS)))
    expected = [theirs(name, [TEXTS[i] for i in sample], [REFERENCES[i] for i in sample]) for sample in indices]
    np.testing.assert_allclose(statistic.resampled(indices), expected, rtol=1e-10)
    assert len(set(expected)) > 10


WORDS = st.lists(st.sampled_from(["a", "b", "the", "cat", "sat", ".", "it's"]), max_size=8).map(" ".join)
CORPUS = st.lists(st.tuples(WORDS, st.lists(WORDS.filter(bool), min_size=1, max_size=3)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(corpus=CORPUS)
def test_equals_sacrebleu_on_degenerate_corpora(corpus: list[tuple[str, list[str]]]) -> None:
    """Texts with no match, no word, or too few words for an order: where smoothing and zeros decide."""
    texts, references = [text for text, _ in corpus], [known for _, known in corpus]
    for name in ("bleu", "chrf"):
        statistic, _ = getattr(text_metric, name)(texts, references)
        assert statistic.value() == pytest.approx(theirs(name, texts, references), rel=1e-10, abs=1e-12)


def test_signatures() -> None:
    _, bleu = text_metric.bleu(TEXTS, REFERENCES)
    _, chrf = text_metric.chrf(TEXTS, REFERENCES)
    version = sacrebleu.__version__
    assert bleu == f"sacrebleu BLEU|nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}"
    assert chrf == f"sacrebleu chrF2|nrefs:var|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{version}"
    _, even = text_metric.bleu(TEXTS, [known[:1] for known in REFERENCES])
    assert "nrefs:1|" in even


def test_exact_match() -> None:
    texts = ["  The\n Mill ", "the mill", "The Mill.", "Blue Spice"]
    references = [["x", "The Mill"], ["The Mill"], ["The Mill"], ["Blue  Spice", "y"]]
    assert text_metric.exact_match(texts, references).value() == 50.0
