"""Tiny models of the families that are supported, made in code, with weights as after training; and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from leantune.testing.model import exact_norms, scatter_weights

VOCABULARY = 40
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 24, 20, 2, 6, 2

_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    **_TOKENS,
}
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
    **_TOKENS,
}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_DECODER))


def _mistral() -> PreTrainedModel:
    # As Mistral-Nemo: heads * head_dim is not the hidden size.
    return MistralForCausalLM(MistralConfig(**_DECODER, head_dim=6, sliding_window=None))


def _qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**_DECODER))


def _qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_DECODER, head_dim=6))


def _gemma() -> PreTrainedModel:
    # One key/value head for all, heads wider than hidden / heads.
    return GemmaForCausalLM(GemmaConfig(**{**_DECODER, "num_key_value_heads": 1}, head_dim=8))


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_inner=INTERMEDIATE,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        **_TOKENS,
    )
    return GPT2LMHeadModel(config)


def _bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**_ENCODER))


def _roberta() -> PreTrainedModel:
    return RobertaForSequenceClassification(RobertaConfig(**_ENCODER))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gpt2": _gpt2,
    "bert": _bert,
    "roberta": _roberta,
}


def model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A model of the family, the same weights for the same seed, in eval mode; in float64 its norms are exact."""
    made = FAMILIES[family]()
    scatter_weights(made, seed, dtype)
    if dtype == torch.float64:
        exact_norms(made)
    return made.eval()


def ids(rows: int = 3, length: int = 7, seed: int = 3) -> Tensor:
    """Token ids without padding, ``(rows, length)``."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def linears(base: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a plain model inside its blocks, by path (the head is none of them)."""
    return {
        name: module
        for name, module in base.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and (".layers." in name or ".h." in name or ".layer." in name)
    }
