"""A model on the rows of a file: every score of its task, in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from leantune.core.errors import ConfigError, DataError, describe, did_you_mean
from leantune.data import (
    Collator,
    Encoded,
    ImageCollator,
    MaskedTokens,
    Row,
    check_answers,
    encode,
    encode_classification,
    encode_images,
    encode_masked,
    encode_regression,
    prompt_ids,
    prompt_text,
)
from leantune.evaluate import text_metric
from leantune.evaluate.generation import Progress, generate
from leantune.evaluate.interval import RESAMPLES, Additive, Statistic, score
from leantune.evaluate.label_metric import class_statistics, number_statistics
from leantune.evaluate.likelihood import Likelihood, likelihood
from leantune.evaluate.prediction import predict
from leantune.evaluate.reference import Input, group_references
from leantune.evaluate.scores import Scores

# Of the tokens that masked-lm hides: base and tuned model must be asked for the same ones.
MASK_SEED = 0


@dataclass(frozen=True)
class _Request:
    """What :func:`evaluate` was asked, for the evaluation of each task."""

    model: Any
    tokenizer: Any
    rows: Sequence[Row]
    metrics: tuple[str, ...]
    max_new_tokens: int
    batch_size: int
    max_length: int | None
    stop: str | Sequence[str] | None
    template: str | None
    label_names: list[str] | None
    progress: Progress | None

    def collator(self) -> Collator | ImageCollator:
        if self.rows[0].image is not None:
            return ImageCollator(self.tokenizer)
        # Padding is masked, so any id will do where a tokenizer has none for it.
        return Collator(self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0)


@dataclass(frozen=True)
class _Task:
    """A task: the metrics it has, and its evaluation."""

    metrics: tuple[str, ...]
    run: Callable[[_Request], Scores]


def _likelihood_statistics(scored: Likelihood, inputs: list[Input]) -> dict[str, Statistic]:
    """Loss and perplexity, resampled by input: rows with the same prompt stay together."""
    sums = [[scored.row_nats[item.rows].sum(), scored.row_tokens[item.rows].sum()] for item in inputs]
    values = np.array(sums, dtype=np.float64)

    return {"loss": Additive(values, _nats_per_token), "perplexity": Additive(values, _perplexity)}


def _nats_per_token(totals: np.ndarray) -> np.ndarray:
    return totals[..., 0] / totals[..., 1]


def _perplexity(totals: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(_nats_per_token(totals))


def _text_statistics(
    texts: list[str], inputs: list[Input], wanted: Sequence[str]
) -> tuple[dict[str, Statistic], dict[str, str]]:
    references = [item.references for item in inputs]
    statistics: dict[str, Statistic] = {}
    signatures: dict[str, str] = {}
    if "exact_match" in wanted:
        statistics["exact_match"] = text_metric.exact_match(texts, references)
    if "bleu" in wanted:
        statistics["bleu"], signatures["bleu_signature"] = text_metric.bleu(texts, references)
    if "chrf" in wanted:
        statistics["chrf"], signatures["chrf_signature"] = text_metric.chrf(texts, references)
    return statistics, signatures


def _causal_lm(request: _Request) -> Scores:
    tokenizer, template = request.tokenizer, request.template
    check_answers(request.rows)
    inputs = group_references(request.rows)
    prompts = [prompt_text(item.row, tokenizer, template=template) for item in inputs]
    scores = Scores("causal-lm", {}, n=len(inputs), rows=len(request.rows), inputs=prompts)
    if {"loss", "perplexity"} & set(request.metrics):
        encoded = encode(request.rows, tokenizer, max_length=request.max_length, template=template)
        scored = likelihood(request.model, encoded, request.collator(), request.batch_size, progress=request.progress)
        scores.statistics |= _likelihood_statistics(scored, inputs)
        scores.tokens, scores.truncated = scored.tokens, encoded.truncated
    if {"exact_match", "bleu", "chrf"} & set(request.metrics):
        texts = generate(
            request.model,
            tokenizer,
            [prompt_ids(item.row, tokenizer, template=template) for item in inputs],
            max_new_tokens=request.max_new_tokens,
            batch_size=request.batch_size,
            stop=request.stop,
            progress=request.progress,
        )
        statistics, signatures = _text_statistics(texts, inputs, request.metrics)
        scores.statistics |= statistics
        scores.settings.update(max_new_tokens=request.max_new_tokens, stop=request.stop, decoding="greedy")
        scores.settings.update(signatures)
        scores.generations = [
            {"prompt": prompt, "text": text, "references": item.references}
            for prompt, text, item in zip(prompts, texts, inputs, strict=True)
        ]
    return scores


def _mean(values: np.ndarray) -> Additive:
    return Additive(np.stack([values, np.ones(len(values))], axis=1), lambda sums: sums[..., 0] / sums[..., 1])


def _label_scores(request: _Request, task: str, encoded: Encoded, statistics: dict[str, Statistic]) -> Scores:
    inputs = [(row.text, row.text_pair, row.label, row.image) for row in request.rows]
    scores = Scores(task, {}, n=len(encoded), rows=len(encoded), truncated=encoded.truncated, inputs=inputs)
    scores.statistics = statistics
    return scores


def _classification(request: _Request) -> Scores:
    encoded = encode_classification(
        request.rows, request.tokenizer, max_length=request.max_length, label_names=request.label_names
    )
    return _class_scores(request, "classification", encoded)


def _images(request: _Request) -> Scores:
    return _class_scores(request, "image-classification", encode_images(request.rows, label_names=request.label_names))


def _class_scores(request: _Request, task: str, encoded: Encoded) -> Scores:
    outputs = predict(request.model, encoded, request.collator(), request.batch_size, progress=request.progress)
    true = np.array([example["labels"] for example in encoded])
    names = encoded.label_names or []
    if outputs.shape[1] != len(names):
        raise DataError(
            describe(
                "label names",
                f"{len(names)} ({', '.join(names)})",
                f"{outputs.shape[1]}, as the model has outputs",
                "give label_names, or use data with the classes of the training",
            )
        )
    top = outputs.max(axis=1)
    nats = top + np.log(np.exp(outputs - top[:, None]).sum(axis=1)) - outputs[np.arange(len(true)), true]
    statistics = {"cross_entropy": _mean(nats), **class_statistics(true, outputs.argmax(axis=1), len(names))}
    scores = _label_scores(request, task, encoded, statistics)
    scores.settings["label_names"] = names
    return scores


def _regression(request: _Request) -> Scores:
    encoded = encode_regression(request.rows, request.tokenizer, max_length=request.max_length)
    outputs = predict(request.model, encoded, request.collator(), request.batch_size, progress=request.progress)[:, 0]
    true = np.array([example["labels"] for example in encoded])
    statistics = {"mse": _mean((outputs - true) ** 2), **number_statistics(true, outputs)}
    return _label_scores(request, "regression", encoded, statistics)


def _masked_lm(request: _Request) -> Scores:
    """The hidden tokens' loss under one choice of them, the same for every model."""
    encoded = encode_masked(request.rows, request.tokenizer, max_length=request.max_length)
    hidden = MaskedTokens(encoded, request.tokenizer, seed=MASK_SEED, fixed=True)
    scored = likelihood(
        request.model, hidden, request.collator(), request.batch_size, shift=False, progress=request.progress
    )
    inputs = [(row.text, row.text_pair) for row in request.rows]
    scores = Scores("masked-lm", {}, n=len(encoded), rows=len(encoded), truncated=encoded.truncated, inputs=inputs)
    sums = np.stack([scored.row_nats, scored.row_tokens], axis=1).astype(np.float64)
    scores.statistics = {"loss": Additive(sums, _nats_per_token), "pseudo_perplexity": Additive(sums, _perplexity)}
    scores.tokens = scored.tokens
    scores.settings.update(mask_share=hidden.share, mask_seed=MASK_SEED)
    return scores


TASKS = {
    "causal-lm": _Task(("loss", "perplexity", "exact_match", "bleu", "chrf"), _causal_lm),
    "classification": _Task(("cross_entropy", "accuracy", "f1", "mcc"), _classification),
    "regression": _Task(("mse", "pearson", "spearman"), _regression),
    "masked-lm": _Task(("loss", "pseudo_perplexity"), _masked_lm),
    "image-classification": _Task(("cross_entropy", "accuracy", "f1", "mcc"), _images),
}


def _check(task: str, metrics: Sequence[str] | None, rows: Sequence[Row]) -> tuple[_Task, tuple[str, ...]]:
    if task not in TASKS:
        raise ConfigError(describe("task", f"'{task}'", "a known task", did_you_mean(task, TASKS)))
    known = TASKS[task].metrics
    for name in metrics or ():
        if name not in known:
            raise ConfigError(describe("metrics", f"'{name}'", f"a metric of {task}", did_you_mean(name, known)))
    if not rows:
        raise DataError(describe("data", "no rows", "at least one row to score", "give some"))
    if metrics is None and task == "causal-lm" and all(row.is_plain_text for row in rows):
        # Nothing is asked in a plain text, so there is no answer to compare.
        return TASKS[task], ("loss", "perplexity")
    return TASKS[task], known if metrics is None else tuple(metrics)


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    task: str = "causal-lm",
    max_new_tokens: int = 48,
    batch_size: int = 32,
    max_length: int | None = None,
    metrics: Sequence[str] | None = None,
    stop: str | Sequence[str] | None = None,
    template: str | None = None,
    label_names: list[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Score a model.

    ``causal-lm``: loss and perplexity of every row's answer, and, of what the model writes greedily for each distinct
    input, exact match, BLEU and chrF against all answers of that input. A text ends at the end-of-text token or after
    ``max_new_tokens``, and all of it is scored. A base model that runs on after its first sentence is thus scored on
    everything it wrote: that is what a user would get, and what fine-tuning mends, but part of its distance to a tuned
    model is only knowing where to stop. ``stop="\\n"`` scores both on their first line alone; say which was used.

    Args:
        model: the model, or a PeftModel over it. Its training flags are left as they were.
        tokenizer: its tokenizer.
        rows: rows of one layout.
        task: ``causal-lm``, ``classification``, ``regression``, ``masked-lm`` or ``image-classification``, for which
            ``tokenizer`` is the image processor.
        max_new_tokens: most new tokens an input.
        batch_size: rows or prompts at once.
        max_length: cut rows to so many tokens for the likelihood or the head; None: as many as the model has positions.
        metrics: names of the metrics wanted; None: all of the task. Without exact_match, bleu and chrf nothing is
            generated.
        stop: a string or strings to end generation at besides the end-of-text token.
        template: Jinja chat template that overrides the tokenizer's (messages alone).
        label_names: class names in the order of the model's outputs; found in the rows when not given.
        resamples: bootstrap samples of the 95% intervals; 0 for none.
        seed: their seed.
        progress: called as ``progress(stage, done, total)``; the stages are ``likelihood``, ``generate``, ``predict``.

    Raises:
        ConfigError: the task or a metric is unknown.
        DataError: there is no row, or rows cannot be encoded, or a prompt does not fit the model.
        DependencyError: a metric needs a package that is not installed.
    """
    chosen, wanted = _check(task, metrics, rows)
    if max_length is None:
        max_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = getattr(tokenizer, "model_max_length", None)
        if max_length is not None and longest is not None:
            # RoBERTa's first two positions belong to padding.
            max_length = min(max_length, longest)
    request = _Request(
        model, tokenizer, rows, wanted, max_new_tokens, batch_size, max_length, stop, template, label_names, progress
    )
    scores = chosen.run(request)
    scores.settings.update(max_length=max_length, resamples=resamples, seed=seed)
    scores.statistics = {name: scores.statistics[name] for name in wanted}
    scores.metrics = {name: score(known, resamples=resamples, seed=seed) for name, known in scores.statistics.items()}
    return scores
