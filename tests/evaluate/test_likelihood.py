"""Likelihood: equal to the plain computation over all logits, whatever the batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from leantune.core.errors import DataError
from leantune.data import NO_LOSS, Collator, Row, encode
from leantune.evaluate import Likelihood, likelihood
from text_fixture import byte_tokenizer, llama

TOKENIZER = byte_tokenizer()
# The padding id is the end-of-text id, as in SmolLM2: a mask made from ids would lose real tokens.
COLLATOR = Collator(TOKENIZER.eos_token_id)


@pytest.fixture
def examples() -> list[dict[str, Any]]:
    pairs = [("Facts: a", " A."), ("b", " one two three four, one two"), ("one two three four", "c"), ("", "bcd")]
    rows = [Row(where=f"f:{i}", prompt=prompt, completion=answer) for i, (prompt, answer) in enumerate(pairs)]
    return encode(rows, TOKENIZER, max_length=None).examples


@pytest.fixture
def model() -> torch.nn.Module:
    return llama(len(TOKENIZER))


def plain(model: torch.nn.Module, examples: list[dict[str, Any]]) -> tuple[list[float], list[int]]:
    """Nats and tokens of each example: one at a time, every logit, one position after the other."""
    nats, tokens = [], []
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example["input_ids"]])).logits[0].double()
        total, count = 0.0, 0
        for position, label in enumerate(example["labels"]):
            if label != NO_LOSS:
                total -= float(torch.log_softmax(logits[position - 1], dim=-1)[label])
                count += 1
        nats.append(total)
        tokens.append(count)
    return nats, tokens


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_equals_the_plain_computation(model: torch.nn.Module, examples: list[dict[str, Any]], batch_size: int) -> None:
    nats, tokens = plain(model, examples)
    found = likelihood(model, examples, COLLATOR, batch_size)
    # Float64 throughout: only the order of sums differs.
    np.testing.assert_allclose(found.row_nats, nats, rtol=1e-10)
    assert found.row_tokens.tolist() == tokens
    assert found.tokens == sum(tokens)
    assert found.loss == pytest.approx(sum(nats) / sum(tokens), rel=1e-10)
    assert found.perplexity == pytest.approx(math.exp(sum(nats) / sum(tokens)), rel=1e-9)
    # Every token weighs the same; a mean over rows would be another number.
    assert found.loss != pytest.approx(np.mean(np.array(nats) / np.array(tokens)), rel=1e-3)


def test_logits_are_formed_where_loss_is_alone(model: torch.nn.Module, examples: list[dict[str, Any]]) -> None:
    shapes: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, output: shapes.append(output.numel() // output.shape[-1]))
    found = likelihood(model, examples, COLLATOR, batch_size=4)
    assert shapes == [found.tokens]
    assert not model.lm_head._forward_pre_hooks, "the hook should be gone"


def test_a_model_that_hides_its_output_layer(
    model: torch.nn.Module, examples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = likelihood(model, examples, COLLATOR)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert likelihood(model, examples, COLLATOR).loss == pytest.approx(expected.loss, rel=1e-12)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["lm_head"]])
def test_an_adapter_counts(model: torch.nn.Module, examples: list[dict[str, Any]], targets: list[str]) -> None:
    base = likelihood(model, examples, COLLATOR).loss
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).double().eval()
    nats, tokens = plain(tuned, examples)
    found = likelihood(tuned, examples, COLLATOR).loss
    assert found == pytest.approx(sum(nats) / sum(tokens), rel=1e-10)
    assert abs(found - base) > 1e-3


def test_dropout_is_off_and_flags_come_back(examples: list[dict[str, Any]]) -> None:
    model = llama(len(TOKENIZER))
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    first = likelihood(model, examples, COLLATOR).loss
    assert first == likelihood(model, examples, COLLATOR).loss
    assert all(module.training for module in model.modules())


def test_half_precision_is_summed_in_full(examples: list[dict[str, Any]]) -> None:
    model = llama(len(TOKENIZER), dtype=torch.bfloat16)
    nats, tokens = plain(model, examples)
    # The logits are bf16 either way; batch and padding change their rounding: 8 bits of mantissa, logits of size ten.
    assert likelihood(model, examples, COLLATOR).loss == pytest.approx(sum(nats) / sum(tokens), rel=0.02)


def test_an_untrained_uniform_model_has_the_vocabulary_as_perplexity(examples: list[dict[str, Any]]) -> None:
    model = llama(len(TOKENIZER))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert likelihood(model, examples, COLLATOR).perplexity == pytest.approx(len(TOKENIZER))


def test_no_loss_and_huge_loss() -> None:
    silent = [{"input_ids": [1, 2], "labels": [NO_LOSS, NO_LOSS]}]
    with pytest.raises(DataError, match="no token carries loss"):
        likelihood(llama(len(TOKENIZER)), silent, COLLATOR)
    assert Likelihood(1e4, 1, np.zeros(1), np.ones(1)).perplexity == math.inf


def test_progress(model: torch.nn.Module, examples: list[dict[str, Any]]) -> None:
    calls: list[tuple[str, int, int]] = []
    likelihood(model, examples, COLLATOR, 3, progress=lambda *call: calls.append(call))
    assert calls == [("likelihood", 3, 4), ("likelihood", 4, 4)]
