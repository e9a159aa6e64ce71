"""Bases that are really quantised, by whichever library is installed; what is missing is skipped with the reason."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from leantune.models import BaseModel, load_base

WAYS = [("4bit", "bitsandbytes"), ("8bit", "bitsandbytes"), ("8bit", "torchao")]
IDS = [f"{bits}-{backend}" for bits, backend in WAYS]
TOKENS = torch.tensor([[5, 9, 13, 21, 3, 8], [7, 3, 30, 31, 2, 11]])


def need(backend: str) -> None:
    """Skip a test whose library is not here."""
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed (pip install 'leantune[quant]' brings bitsandbytes alone)")


def make_llama(**options: Any) -> LlamaForCausalLM:
    """Two blocks, each weight of many scales."""
    settings = {
        "vocab_size": 40,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **options})).eval()


def load(folder: Path, way: tuple[str, str], **options: Any) -> BaseModel:
    """The base in that folder, packed; on the CPU."""
    need(way[1])
    return load_base(folder, quantization=way[0], quantization_backend=way[1], device="cpu", **options)
