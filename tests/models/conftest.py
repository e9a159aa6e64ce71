"""Tiny models of three architectures, with a tokenizer, built in code and saved as a user's folder would be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from leantune.models import embedded

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]


def byte_tokens() -> list[str]:
    """Special tokens, then one token a byte: a vocabulary that can spell anything."""
    return SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())


def build_tokenizer(**specials: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; ``specials`` are ``eos_token="</s>"`` and the like."""
    backend = Tokenizer(BPE(vocab={text: index for index, text in enumerate(byte_tokens())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


def build_llama(*, tied: bool = True, layers: int = 2) -> LlamaForCausalLM:
    """Hidden 64, 4 heads, 2 key/value heads: the shape of SmolLM2, a thousandth of its size."""
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def build_gpt2() -> GPT2LMHeadModel:
    """Two layers of GPT-2: Conv1D, a fused c_attn."""
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def build_bert() -> BertModel:
    """Two layers of BERT: an encoder without any head, biases everywhere."""
    config = BertConfig(
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    return BertModel(config).eval()


BUILDERS: dict[str, Callable[[], Any]] = {"llama": build_llama, "gpt2": build_gpt2, "bert": build_bert}
ALL_SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A tiny Llama with tied embeddings."""
    return build_llama()


@pytest.fixture
def build(request: pytest.FixtureRequest) -> dict[str, Callable[..., Any]]:
    """The builders by name, and ``tokenizer``."""
    return {**BUILDERS, "tokenizer": build_tokenizer}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """``saved("llama")`` writes a model and its tokenizer into a fresh folder and returns it."""

    def save(kind: str, *, model: Any = None, specials: dict[str, str] | None = None, name: str | None = None) -> Path:
        folder = tmp_path / (name or kind)
        torch.manual_seed(0)
        (BUILDERS[kind]() if model is None else model).save_pretrained(folder)
        build_tokenizer(**(ALL_SPECIALS if specials is None else specials)).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The folder of the real embedded model; fetched once, then cached."""
    return embedded.ensure()
