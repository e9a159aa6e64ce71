"""An answer that is handed out while it is written is the answer that `generate` gives."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Any

import pytest
import torch

from leantune.core.errors import DataError
from leantune.data import text_ids
from leantune.evaluate import generate, stream
from text_fixture import byte_tokenizer, llama

TOKENIZER = byte_tokenizer()
PROMPT = "user: hello there"
IDS = text_ids(PROMPT, TOKENIZER)


@pytest.fixture
def model() -> Any:
    return llama(len(TOKENIZER))


def calls_of(model: Any) -> list[int]:
    """Counts forward passes, from here on."""
    calls: list[int] = []
    model.register_forward_pre_hook(lambda module, words: calls.append(1))
    return calls


def test_the_pieces_are_the_answer(model: Any) -> None:
    pieces = list(stream(model, TOKENIZER, IDS, max_new_tokens=24))
    assert len(pieces) > 1
    assert ["".join(pieces)] == generate(model, TOKENIZER, [PROMPT], max_new_tokens=24)


def test_draws_depend_on_the_seed_alone(model: Any) -> None:
    def drawn(seed: int) -> str:
        torch.rand(seed + 1)
        return "".join(stream(model, TOKENIZER, IDS, max_new_tokens=24, temperature=3.0, top_p=0.9, seed=seed))

    state = torch.random.get_rng_state()
    list(stream(model, TOKENIZER, IDS, max_new_tokens=4, temperature=3.0, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert drawn(1) == drawn(1) != drawn(2)
    [sampled] = generate(
        model, TOKENIZER, [PROMPT], max_new_tokens=8, do_sample=True, temperature=3.0, top_p=0.9, seed=1
    )
    assert drawn(1).startswith(sampled)


def test_closing_it_ends_the_generation(model: Any) -> None:
    calls, threads = calls_of(model), threading.active_count()
    model.train()
    with closing(stream(model, TOKENIZER, IDS, max_new_tokens=200)) as pieces:
        next(pieces)
    assert 0 < len(calls) < 150
    assert threading.active_count() == threads
    assert model.training


def test_an_interrupt_while_reading_ends_it_too(model: Any) -> None:
    calls = calls_of(model)
    with pytest.raises(KeyboardInterrupt):
        for _ in (answer := stream(model, TOKENIZER, IDS, max_new_tokens=200)):
            answer.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert len(calls) < 150


def test_the_published_settings_do_not_count_and_come_back(model: Any) -> None:
    plain = "".join(stream(model, TOKENIZER, IDS, max_new_tokens=12))
    published = model.generation_config
    published.repetition_penalty, published.do_sample, published.temperature = 5.0, True, 9.0
    assert "".join(stream(model, TOKENIZER, IDS, max_new_tokens=12)) == plain
    assert model.generation_config is published


def test_the_end_of_text_ends_it(model: Any) -> None:
    first = int(model(torch.tensor([IDS])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = first
    assert "".join(stream(model, TOKENIZER, IDS, max_new_tokens=12)) == ""


def test_what_fails_in_the_other_thread_is_raised_here(model: Any) -> None:
    def fail(module: Any, words: Any) -> None:
        raise ZeroDivisionError("in the model")

    model.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError, match="in the model"):
        list(stream(model, TOKENIZER, IDS))


def test_an_answer_fits_into_the_positions_that_are_left() -> None:
    small = llama(len(TOKENIZER), positions=len(IDS) + 3)
    calls = calls_of(small)
    list(stream(small, TOKENIZER, IDS, max_new_tokens=50))
    assert len(calls) == 3
    full = llama(len(TOKENIZER), positions=len(IDS))
    with pytest.raises(DataError, match="fewer than the model's"):
        list(stream(full, TOKENIZER, IDS))
