"""Tiny models, a tokenizer of a few words, and rows, all made in code."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from leantune.core.atomic import write_bytes

WORDS = [
    *("<pad>", "</s>", "<unk>", "red", "green", "blue", "one", "two", "three", "cat", "dog", "bird"),
    *("says", "is", "and", "the", "a", "big", "small", "good", "bad", "film", "Facts", ":", "Answer"),
]
VOCABULARY = 32


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def make_llama(**options: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 1,
        "bos_token_id": None,
        "pad_token_id": 0,
        # Wide enough that a random model is far from giving every word the same chance.
        "initializer_range": 0.3,
    }
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **options}))


def make_gpt2(**options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    settings = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
    settings |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "eos_token_id": 1, "bos_token_id": 1}
    settings["initializer_range"] = 0.3
    return GPT2LMHeadModel(GPT2Config(**{**settings, **options}))


def make_gemma2() -> Gemma2ForCausalLM:
    torch.manual_seed(1)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            max_position_embeddings=64,
            # Small enough that the softcap bends the logits of a random model.
            final_logit_softcapping=2.0,
            initializer_range=0.3,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
        )
    )


CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": make_llama,
    "llama-tied": lambda: make_llama(tie_word_embeddings=True),
    "gpt2": make_gpt2,
    "gemma2": make_gemma2,
}


@pytest.fixture(params=CAUSAL)
def causal_model(request: pytest.FixtureRequest) -> Any:
    """A random causal language model in float64, one architecture at a time."""
    return CAUSAL[request.param]().double()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, as a transformers folder."""
    folder = tmp_path_factory.mktemp("llama")
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with its tokenizer."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("bert")
    BertForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows that a tiny model can learn: the answer repeats the facts."""
    rows = []
    for number in range(40):
        colour, count = WORDS[3 + number % 3], WORDS[6 + number // 3 % 3]
        beast = WORDS[9 + number // 9 % 3]
        answer = f"the {colour} {beast} is {count}" + (" and good" if number % 4 == 0 else "")
        rows.append({"prompt": f"Facts : {colour} {count} {beast} Answer :", "completion": f" {answer}"})
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


@pytest.fixture(scope="session")
def films_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with two classes, told apart by one word."""
    rows = []
    for number in range(24):
        word, label = (("good", "praise"), ("bad", "blame"))[number % 2]
        rows.append({"text": f"the {WORDS[3 + number % 3]} film is {word}" + " and big" * (number % 3), "label": label})
    return write_jsonl(tmp_path_factory.mktemp("films") / "films.jsonl", rows)


def make_examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Random rows of unequal lengths and unequal numbers of loss tokens."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(count):
        length = int(torch.randint(4, 12, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        prompt = 1 + number % 3
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "row": number})
    return examples


@pytest.fixture
def examples() -> list[dict[str, Any]]:
    """Twelve random rows."""
    return make_examples(12)


@pytest.fixture(scope="session")
def frozen() -> None:
    """Whatever is there by now is not looked at again by gc.collect(), which every Trainer calls."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def quick(frozen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without what costs them the most here: the picture, and waiting for the disk."""
    monkeypatch.setattr("leantune.train.run.draw_loss", lambda metrics, path, title: write_bytes(path, b"picture"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
