"""Tiny models made in code: nothing is downloaded, and the same seed gives the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCABULARY = 32
FAMILIES = ("llama", "gpt2")
"""Models that the contract runs on: grouped-query attention; and ``Conv1D`` with a fused query-key-value layer."""


class Perceptron(nn.Module):
    """Two linear layers and a head, with nonlinearities: small enough to check every gradient number by number."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(6, 10)
        self.lin1 = nn.Linear(10, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.lin1(torch.tanh(self.lin0(x)))))


def scatter_weights(model: nn.Module, seed: int, dtype: torch.dtype) -> nn.Module:
    """Fill every parameter with noise of a size that keeps activations near one, biases and norms included.

    A fresh model has zero biases and unit norms, and tiny weights: half of the faults would not show on it.
    """
    generator = torch.Generator().manual_seed(seed)
    model.to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(noise * 0.1 + (1.0 if "norm" in name.lower() or "ln_" in name else 0.0))
    return model


def exact_norms(model: nn.Module) -> nn.Module:
    """Replace RMS norms by ones that compute in the model's dtype.

    transformers' own compute in float32 even in a float64 model, which then is exact to float32 only.
    """
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")) and not isinstance(module, nn.RMSNorm):
            weight = module.weight
            own = nn.RMSNorm(weight.shape[0], eps=float(getattr(module, "variance_epsilon", 1e-6)), dtype=weight.dtype)
            # Gemma's weight is the distance from one.
            offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
            with torch.no_grad():
                own.weight.copy_(weight + offset)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, own)
    return model


def perceptron(dtype: torch.dtype = torch.float64, seed: int = 0) -> Perceptron:
    """A perceptron with seeded weights."""
    model = Perceptron()
    scatter_weights(model, seed, dtype)
    return model


def language_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A two-layer language model with seeded weights, in eval mode; in float64 its norms are exact.

    Args:
        family: one of ``FAMILIES``.
        dtype: of all its parameters.
        seed: of its weights.
    """
    tokens: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model: PreTrainedModel
    if family == "llama":
        # head_dim is not hidden / heads: who computes it finds 4.
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            max_position_embeddings=32,
            tie_word_embeddings=False,
            **tokens,
        )
        model = LlamaForCausalLM(config)
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=16,
                n_inner=20,
                n_layer=2,
                n_head=4,
                n_positions=32,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                tie_word_embeddings=False,
                **tokens,
            )
        )
    else:
        raise AssertionError(f"family '{family}': unknown; one of {FAMILIES}")
    scatter_weights(model, seed, dtype)
    if dtype == torch.float64:
        exact_norms(model)
    return model.eval()
