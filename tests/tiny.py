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
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
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


def _phi3() -> PreTrainedModel:
    # Query, key and value in one layer, gate and up in another.
    return Phi3ForCausalLM(Phi3Config(**_DECODER))


def _neox() -> PreTrainedModel:
    # Query, key and value side by side in each head; a quarter of a head rotates.
    config = {**_DECODER, "num_key_value_heads": None, "hidden_size": 48, "rotary_pct": 0.25}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**config))


def _opt() -> PreTrainedModel:
    # ReLU, biases everywhere, the head tied to the embedding.
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=32,
        dropout=0.0,
        **_TOKENS,
    )
    return OPTForCausalLM(config)


def _t5() -> PreTrainedModel:
    # Heads wider than hidden / heads, a gated feed-forward network, biases of position that all blocks share.
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=6,
        d_ff=INTERMEDIATE,
        num_layers=LAYERS,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def _vit() -> PreTrainedModel:
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=5,
    )
    return ViTForImageClassification(config)


CHANNELS = 16
"""Of an expert: torch's grouped product wants rows of a multiple of 16 bytes."""


def _mixtral() -> PreTrainedModel:
    settings = {**_DECODER, "intermediate_size": CHANNELS}
    return MixtralForCausalLM(MixtralConfig(**settings, num_local_experts=4, num_experts_per_tok=2))


def _qwen2_moe() -> PreTrainedModel:
    # Beside its experts a shared one, of linear layers.
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **_DECODER,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=12,
        )
    )


def _gpt_oss() -> PreTrainedModel:
    # Transposed weights, gate and up rows interleaved, biases, a clamped gate.
    settings = {**_DECODER, "intermediate_size": CHANNELS, "num_local_experts": 3, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**settings, head_dim=4, layer_types=["full_attention"] * LAYERS))


EXPERTS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "gpt_oss": _gpt_oss,
}
"""Models with experts as 3-D parameters."""

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

# Those with one more thing that a test must know: fused layers, tied embeddings, two stacks, pixels.
FURTHER: dict[str, Callable[[], PreTrainedModel]] = {
    "phi3": _phi3,
    "neox": _neox,
    "opt": _opt,
    "t5": _t5,
    "vit": _vit,
}


EVERY = (*FAMILIES, *FURTHER)


def model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A model of the family, the same weights for the same seed, in eval mode; in float64 its norms are exact."""
    made = {**FAMILIES, **FURTHER, **EXPERTS}[family]()
    scatter_weights(made, seed, dtype)
    if dtype == torch.float64:
        exact_norms(made)
        # The grouped kernel for experts takes no float64.
        made.set_experts_implementation("eager")
    return made.eval()


def ids(rows: int = 3, length: int = 7, seed: int = 3) -> Tensor:
    """Token ids without padding, ``(rows, length)``."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def inputs(family: str, rows: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Arguments of a forward of the family's model."""
    if family == "vit":
        generator = torch.Generator().manual_seed(3)
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)}
    if family == "t5":
        return {"input_ids": ids(rows), "decoder_input_ids": ids(rows, length=5, seed=4)}
    return {"input_ids": ids(rows)}


def answer(made: nn.Module, family: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """The logits of a family's model on its inputs."""
    logits: Tensor = made(**inputs(family, dtype=dtype)).logits
    return logits


def quiet(made: nn.Module, family: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same without gradients."""
    with torch.no_grad():
        return answer(made, family, dtype)


def linears(base: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a plain model inside its blocks, by path (the head is none of them)."""
    return {
        name: module
        for name, module in base.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and (".layers." in name or ".h." in name or ".layer." in name)
    }
