"""Batched generation: the same tokens as one prompt at a time, in the order given, and nothing left behind."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from leantune.core.errors import DataError
from leantune.data import Row, prompt_ids, text_ids
from leantune.evaluate import generate, generation
from leantune.testing.model import scatter_weights
from text_fixture import CHATML, byte_tokenizer, llama, piece_tokenizer

TOKENIZER = byte_tokenizer(template=CHATML)
# Of very different lengths, and not in their order.
PROMPTS = [
    "Facts: name[Blue Spice], area[city centre]\nSentence:",
    "a",
    "one two three four one two three",
    "user: hello there",
    "bcd",
    "Loch Fyne serves French food. The Blue Spice is in the city centre. one",
    "x",
]


@pytest.fixture
def model() -> torch.nn.Module:
    return llama(len(TOKENIZER))


def one_by_one(model: torch.nn.Module, ids: list[int], new_tokens: int, ends: list[int]) -> list[int]:
    """Greedy decoding with no cache, no padding and no batch."""
    made: list[int] = []
    while len(made) < new_tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + made]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        made.append(token)
    return made


def plain(model: torch.nn.Module, prompts: list[str], new_tokens: int, ends: list[int] | None = None) -> list[str]:
    end = [TOKENIZER.eos_token_id] if ends is None else ends
    return [TOKENIZER.decode(one_by_one(model, text_ids(p, TOKENIZER), new_tokens, end)) for p in prompts]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("stretch", [1, 5, 100])
def test_batched_is_one_by_one(
    model: torch.nn.Module, batch_size: int, stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_STRETCH_TOKENS", stretch)
    expected = plain(model, PROMPTS, 12)
    assert len(set(expected)) == len(PROMPTS), "the texts should differ, or their order cannot be checked"
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=12, batch_size=batch_size) == expected


def test_rows_end_at_different_times(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_STRETCH_TOKENS", 3)
    free = [one_by_one(model, text_ids(p, TOKENIZER), 12, []) for p in PROMPTS]
    # Make a token that stands at different places of several texts the one that ends them.
    token = max({t for ids in free for t in ids}, key=lambda t: len({ids.index(t) for ids in free if t in ids}))
    places = {ids.index(token) for ids in free if token in ids}
    assert len(places) >= 2
    model.generation_config.eos_token_id = [token]
    ends = [token, TOKENIZER.eos_token_id]
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=12) == plain(model, PROMPTS, 12, ends)


def test_gpt2_with_learned_positions() -> None:
    # Padding on the left would shift learned positions, unless they are counted from the first real token.
    config = GPT2Config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=None)
    config.eos_token_id = None
    model = scatter_weights(GPT2LMHeadModel(config), 0, torch.float64).eval()
    short = PROMPTS[1:5]
    assert generate(model, TOKENIZER, short, max_new_tokens=8) == plain(model, short, 8)


def test_an_adapter_counts() -> None:
    model = llama(len(TOKENIZER))
    before = generate(model, TOKENIZER, PROMPTS, max_new_tokens=6)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned = tuned.to(torch.float64)
    after = generate(tuned, TOKENIZER, PROMPTS, max_new_tokens=6)
    tuned.eval()
    assert after == plain(tuned, PROMPTS, 6)
    assert after != before
    with tuned.disable_adapter():
        assert generate(tuned, TOKENIZER, PROMPTS, max_new_tokens=6) == before


def test_the_cache_is_used_across_stretches(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_STRETCH_TOKENS", 3)
    widths: list[int] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    generate(model, TOKENIZER, PROMPTS[:2], max_new_tokens=8)
    assert widths == [len(text_ids(PROMPTS[0], TOKENIZER)), *[1] * 7]


def test_ended_rows_leave_the_batch(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_STRETCH_TOKENS", 2)
    texts = plain(model, PROMPTS, 2)
    rows: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    cut = generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, stop=texts[0])
    assert cut[0] == ""
    assert rows[:2] == [len(PROMPTS)] * 2
    assert rows[-1] < len(PROMPTS)


def test_stop_strings(model: torch.nn.Module) -> None:
    full = generate(model, TOKENIZER, PROMPTS, max_new_tokens=12)
    mark = full[0][len(full[0]) // 2 :][:2]
    other = full[1][3]
    expected = [text.split(mark)[0].split(other)[0] for text in full]
    assert expected != full
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=12, stop=[mark, other]) == expected
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=12, stop=mark) == [t.split(mark)[0] for t in full]


def test_the_space_before_the_first_new_word_is_kept() -> None:
    tokenizer = piece_tokenizer()
    model = llama(len(tokenizer))
    prompts = ["Sentence:", "one two", "Loch", "hello there"]
    texts = generate(model, tokenizer, prompts, max_new_tokens=4)
    ends = [tokenizer.eos_token_id]
    for prompt, text in zip(prompts, texts, strict=True):
        ids = text_ids(prompt, tokenizer)
        assert prompt + text == tokenizer.decode(ids + one_by_one(model, ids, 4, ends), skip_special_tokens=True)
    assert any(text.startswith(" ") for text in texts), "no text begins with a word, so the test shows nothing"


def test_token_ids_are_taken_as_they_stand(model: torch.nn.Module) -> None:
    tokenizer = byte_tokenizer(opening=True, template=CHATML)
    row = Row(where="f:1", messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}])
    ids = prompt_ids(row, tokenizer)
    (text,) = generate(model, tokenizer, [ids], max_new_tokens=6)
    assert text == tokenizer.decode(one_by_one(model, ids, 6, [tokenizer.eos_token_id]), skip_special_tokens=True)
    (other,) = generate(model, tokenizer, [tokenizer.decode(ids)], max_new_tokens=6)
    assert other != text, "a text gets the opening token that ids from a template lack"


def test_published_settings_do_not_count(model: torch.nn.Module) -> None:
    expected = generate(model, TOKENIZER, PROMPTS, max_new_tokens=8)
    published = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1, num_beams=2, max_length=3
    )
    model.generation_config = published
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=8) == expected
    assert model.generation_config is published


def test_model_and_tokenizer_are_left_as_they_were(model: torch.nn.Module) -> None:
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    TOKENIZER.padding_side = "right"
    generate(model, TOKENIZER, PROMPTS[:2], max_new_tokens=2)
    assert [module.training for module in model.modules()] == flags
    assert TOKENIZER.padding_side == "right"
    assert torch.is_grad_enabled()
    model(torch.tensor([[1, 2]])).logits.sum().backward()


def test_flags_come_back_after_an_error(model: torch.nn.Module) -> None:
    model.train()
    with pytest.raises(IndexError):
        generate(model, TOKENIZER, [[10_000]], max_new_tokens=2)
    assert all(module.training for module in model.modules())


@pytest.fixture
def transformers_log() -> Iterator[list[str]]:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep(level=logging.WARNING)
    logging.getLogger("transformers").addHandler(handler)
    yield lines
    logging.getLogger("transformers").removeHandler(handler)


@pytest.mark.parametrize("do_sample", [False, True])
def test_no_warnings(model: torch.nn.Module, do_sample: bool, transformers_log: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, TOKENIZER, PROMPTS, max_new_tokens=3, do_sample=do_sample, temperature=0.7, top_p=0.9)
    assert transformers_log == []


def test_sampling_is_seeded_and_leaves_the_random_state(model: torch.nn.Module) -> None:
    def draw(seed: int) -> list[str]:
        return generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, do_sample=True, temperature=3.0, seed=seed)

    state = torch.random.get_rng_state()
    first = draw(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert draw(1) == first
    assert draw(2) != first
    assert first != generate(model, TOKENIZER, PROMPTS, max_new_tokens=8)


def test_a_prompt_too_long_is_named(model: torch.nn.Module) -> None:
    model.config.max_position_embeddings = 40
    with pytest.raises(
        DataError, match=r"prompt 2: 35 tokens; at most 32: the model has 40 positions, and 8 are to come"
    ):
        generate(model, TOKENIZER, [[1, 2], [3] * 35], max_new_tokens=8)
    assert len(generate(model, TOKENIZER, [[3] * 32], max_new_tokens=8)) == 1


def test_progress_and_nothing_to_do(model: torch.nn.Module) -> None:
    calls: list[tuple[str, int, int]] = []
    generate(model, TOKENIZER, PROMPTS, max_new_tokens=1, batch_size=3, progress=lambda *call: calls.append(call))
    assert calls == [("generate", 3, 7), ("generate", 6, 7), ("generate", 7, 7)]
    assert generate(model, TOKENIZER, []) == []
