"""Every score of a task in one call, checked against its parts."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from torch.nn import functional
from transformers import LlamaForSequenceClassification

from leantune.core.errors import ConfigError, DataError
from leantune.data import Collator, Row, encode
from leantune.evaluate import METRICS, TASKS, evaluate, generate, group_references, likelihood, paired_difference
from leantune.testing.model import exact_norms, scatter_weights
from text_fixture import CHATML, byte_tokenizer, llama

TOKENIZER = byte_tokenizer(template=CHATML)
ROWS = [
    Row(where=f"f:{i}", prompt=prompt, completion=answer, references=more)
    for i, (prompt, answer, more) in enumerate(
        [
            ("Facts: a", " A.", []),
            ("one two", " three four, one", ["three"]),
            ("Facts: a", " A it is, one two.", []),
            ("bcd", " The Blue Spice", []),
            ("one two", " three four, one", []),
        ]
    )
]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return llama(len(TOKENIZER))


def test_rows_that_ask_the_same_are_one_input() -> None:
    inputs = group_references(ROWS)
    assert [item.row.prompt for item in inputs] == ["Facts: a", "one two", "bcd"]
    assert [item.references for item in inputs] == [
        [" A.", " A it is, one two."],
        [" three four, one", "three"],
        [" The Blue Spice"],
    ]
    assert [item.rows for item in inputs] == [[0, 2], [1, 4], [3]]


def test_conversations_are_grouped_by_what_was_asked() -> None:
    def talk(question: str, answer: str, **extra: Any) -> Row:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Row(where="f", messages=turns, extra=extra)

    tool = [{"type": "function"}]
    rows = [talk("a", "1"), talk("b", "2"), talk("a", "3"), talk("a", "4", tools=tool), talk("a", "5", note="x")]
    assert [item.references for item in group_references(rows)] == [["1", "3", "5"], ["2"], ["4"]]


def test_scores_of_a_language_model(model: torch.nn.Module) -> None:
    scores = evaluate(model, TOKENIZER, ROWS, max_new_tokens=6, batch_size=2, resamples=50)
    assert (scores.n, scores.rows, scores.task) == (3, 5, "causal-lm")
    scored = likelihood(model, encode(ROWS, TOKENIZER, max_length=None), Collator(0))
    assert scores.loss == pytest.approx(scored.loss)
    assert scores.perplexity == pytest.approx(math.exp(scored.loss))
    assert scores.tokens == scored.tokens
    texts = generate(model, TOKENIZER, ["Facts: a", "one two", "bcd"], max_new_tokens=6)
    assert [item["text"] for item in scores.generations] == texts
    assert scores.generations[1]["references"] == [" three four, one", "three"]
    streams = [[" A.", " three four, one", " The Blue Spice"], [" A it is, one two.", "three", None]]
    assert scores.bleu == pytest.approx(sacrebleu.corpus_bleu(texts, streams).score)
    assert scores.chrf == pytest.approx(sacrebleu.corpus_chrf(texts, streams).score)
    assert scores.exact_match == 0.0
    assert scores.bleu_signature is not None
    assert scores.bleu_signature.startswith("sacrebleu BLEU|nrefs:var|")
    for name, found in scores.metrics.items():
        assert found.low is not None, name
        assert found.high is not None, name
        assert found.low <= found.value <= found.high, name


def test_a_model_that_knows_the_answers(model: torch.nn.Module) -> None:
    texts = generate(model, TOKENIZER, ["Facts: a", "one two"], max_new_tokens=6)
    rows = [
        Row(where="f", prompt="Facts: a", completion="wrong"),
        Row(where="f", prompt="Facts: a", completion=texts[0]),
    ]
    assert evaluate(model, TOKENIZER, rows, max_new_tokens=6, metrics=["exact_match"]).exact_match == 100.0


def test_json(model: torch.nn.Module) -> None:
    scores = evaluate(model, TOKENIZER, ROWS, max_new_tokens=3, resamples=10, stop="\n")
    found = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert found["metrics"]["bleu"]["title"] == "BLEU (sacrebleu)"
    assert found["metrics"]["loss"]["value"] == scores.loss
    assert found["settings"]["stop"] == "\n"
    assert found["settings"]["max_new_tokens"] == 3
    assert found["settings"]["max_length"] == 256
    assert len(found["generations"]) == 3
    assert "generations" not in scores.to_dict(generations=False)


def test_an_infinite_perplexity_is_no_json_number() -> None:
    model = llama(len(TOKENIZER))
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    scores = evaluate(model, TOKENIZER, ROWS, metrics=["loss", "perplexity"], resamples=5)
    assert scores.perplexity == math.inf
    assert json.loads(json.dumps(scores.to_dict(), allow_nan=False))["metrics"]["perplexity"]["value"] is None
    found = paired_difference(scores, scores)["perplexity"].to_dict()
    assert found == {"value": None, "low": None, "high": None}


def test_only_what_is_asked_is_computed(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from leantune.evaluate import evaluation

    monkeypatch.setattr(evaluation, "generate", None)
    scores = evaluate(model, TOKENIZER, ROWS, metrics=["loss"])
    assert list(scores.metrics) == ["loss"]
    assert scores.bleu is None
    monkeypatch.undo()
    monkeypatch.setattr(evaluation, "likelihood", None)
    assert list(evaluate(model, TOKENIZER, ROWS, metrics=["chrf"], max_new_tokens=2).metrics) == ["chrf"]


def test_intervals_resample_inputs_not_rows(model: torch.nn.Module) -> None:
    """The same input a hundred times over is still one input, and says nothing of others."""
    once = evaluate(model, TOKENIZER, ROWS[:2], metrics=["loss"])
    copies = evaluate(model, TOKENIZER, [*ROWS[:1] * 100, *ROWS[1:2] * 100], metrics=["loss"])
    assert copies.n == once.n == 2
    assert (copies.metrics["loss"].low, copies.metrics["loss"].high) == pytest.approx(
        (once.metrics["loss"].low, once.metrics["loss"].high)
    )


def test_truncation_is_counted(model: torch.nn.Module) -> None:
    whole = evaluate(model, TOKENIZER, ROWS, metrics=["loss"])
    cut = evaluate(model, TOKENIZER, ROWS, metrics=["loss"], max_length=7)
    assert whole.truncated == 0
    assert cut.truncated > 0
    assert cut.tokens < whole.tokens


def test_paired_difference(model: torch.nn.Module) -> None:
    other = llama(len(TOKENIZER), seed=1)
    options: dict[str, Any] = {"max_new_tokens": 4, "resamples": 20}
    base, tuned = evaluate(model, TOKENIZER, ROWS, **options), evaluate(other, TOKENIZER, ROWS, **options)
    found = paired_difference(base, tuned, resamples=200)
    assert list(found) == list(TASKS["causal-lm"].metrics)
    for name, score in found.items():
        assert score.value == pytest.approx(tuned.metrics[name].value - base.metrics[name].value)
    same = paired_difference(base, base)
    assert {(score.value, score.low, score.high) for score in same.values()} == {(0.0, 0.0, 0.0)}
    fewer = evaluate(model, TOKENIZER, ROWS[:3], **options)
    with pytest.raises(DataError, match="scores of different inputs; the same rows for both"):
        paired_difference(base, fewer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "clasification"}, "'clasification'; a known task; did you mean 'classification'?"),
        ({"metrics": ["blue"]}, "'blue'; a metric of causal-lm; did you mean 'bleu'?"),
        ({"metrics": ["accuracy"]}, "'accuracy'; a metric of causal-lm; known: bleu"),
    ],
)
def test_unknown_names(model: torch.nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluate(model, TOKENIZER, ROWS, **options)
    assert message in str(caught.value)


def test_no_rows(model: torch.nn.Module) -> None:
    with pytest.raises(DataError, match="no rows; at least one row to score"):
        evaluate(model, TOKENIZER, [])


def test_rows_of_another_task(model: torch.nn.Module) -> None:
    with pytest.raises(DataError, match="f:1: a text with a label"):
        evaluate(model, TOKENIZER, [Row(where="f:1", text="a", label=1)], metrics=["bleu"])


def test_every_metric_can_be_shown() -> None:
    assert {name for task in TASKS.values() for name in task.metrics} == set(METRICS)
    assert "sacrebleu" in METRICS["bleu"].title
    assert "sacrebleu" in METRICS["chrf"].title


# Heads.

LABELLED = [
    Row(where=f"f:{i}", text=text, label=label)
    for i, (text, label) in enumerate(
        [("one two three four", "b"), ("a", "a"), ("hello there", "c"), ("bcd bcd", "a"), ("Loch Fyne", "c")]
    )
]


def head(outputs: int) -> LlamaForSequenceClassification:
    config = llama(len(TOKENIZER)).config
    config.num_labels = outputs
    config.pad_token_id = TOKENIZER.pad_token_id
    model = LlamaForSequenceClassification(config)
    exact_norms(scatter_weights(model, 0, torch.float64))
    return model.eval()


def outputs_of(model: torch.nn.Module, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model(torch.tensor([TOKENIZER(text)["input_ids"]])).logits[0] for text in texts])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_classification(batch_size: int) -> None:
    model = head(3)
    scores = evaluate(model, TOKENIZER, LABELLED, task="classification", batch_size=batch_size, resamples=30)
    outputs = outputs_of(model, [row.text or "" for row in LABELLED])
    true = torch.tensor([1, 0, 2, 0, 2])
    assert scores.value("accuracy") == pytest.approx(100 * (outputs.argmax(1) == true).double().mean().item())
    assert scores.value("cross_entropy") == pytest.approx(functional.cross_entropy(outputs, true).item())
    assert list(scores.metrics) == ["cross_entropy", "accuracy", "f1", "mcc"]
    assert scores.settings["label_names"] == ["a", "b", "c"]
    assert scores.n == 5


def test_given_label_names_decide_the_order() -> None:
    model = head(3)
    found = evaluate(model, TOKENIZER, LABELLED, task="classification", label_names=["c", "b", "a"], resamples=0)
    outputs = outputs_of(model, [row.text or "" for row in LABELLED])
    expected = functional.cross_entropy(outputs, torch.tensor([1, 2, 0, 2, 0])).item()
    assert found.value("cross_entropy") == pytest.approx(expected)


def test_classes_and_outputs_must_fit() -> None:
    with pytest.raises(DataError, match=r"label names: 3 \(a, b, c\); 4, as the model has outputs; give label_names"):
        evaluate(head(4), TOKENIZER, LABELLED, task="classification")


def test_regression() -> None:
    model = head(1)
    rows = [Row(where=row.where, text=row.text, label=float(i)) for i, row in enumerate(LABELLED)]
    scores = evaluate(model, TOKENIZER, rows, task="regression", batch_size=2, resamples=30)
    outputs = outputs_of(model, [row.text or "" for row in rows])[:, 0].numpy()
    assert scores.value("mse") == pytest.approx(np.mean((outputs - np.arange(5.0)) ** 2))
    assert scores.value("pearson") == pytest.approx(np.corrcoef(outputs, np.arange(5.0))[0, 1])
