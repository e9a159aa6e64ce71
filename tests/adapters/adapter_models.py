"""Tiny bases with a tokenizer, made in code, and what tests ask of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 40
WORDS = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(VOCABULARY - 3))]
PROMPTS = [[5, 9, 13, 21], [7, 3], [30, 31, 32, 33, 34, 35, 11]]
SPECIAL = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def make_llama(**options: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        # Wide enough that a random model prefers some words over others.
        "initializer_range": 0.3,
        **SPECIAL,
    }
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **options})).eval()


def make_gpt2(**options: Any) -> GPT2LMHeadModel:
    settings = {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_inner": 24,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.3,
        **SPECIAL,
    }
    torch.manual_seed(2)
    return GPT2LMHeadModel(GPT2Config(**{**settings, **options})).eval()


MAKERS: dict[str, Callable[..., Any]] = {"llama": make_llama, "gpt2": make_gpt2}
TARGETS = {"llama": ["q_proj", "o_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def fill(model: torch.nn.Module, std: float = 0.2) -> None:
    """Fill everything that trains with noise, as training would leave it."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


def answers(model: torch.nn.Module) -> list[torch.Tensor]:
    """Logits on the prompts."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([prompt])).logits[0] for prompt in PROMPTS]


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor, and of what trains."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state |= {f"{name} trains": torch.tensor(p.requires_grad) for name, p in model.named_parameters()}
    return state | {"training": torch.tensor(model.training)}
