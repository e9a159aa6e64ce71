"""Prefix tuning: every attention layer sees ``n`` trained keys and values in front of those of the text.

``softmax(q [P_k; K]^T) [P_v; V]`` with ``P_k, P_v (n, kv width)`` trained for each layer; no weight changes. Li and
Liang, arXiv 2101.00190, eq. 3, without the network that their training reparametrises the prefix by
(``prefix_projection`` brings it back).

The prefix is PEFT's. It is put in the cache of keys and values, which gradient checkpointing has no use for. PEFT
starts it from a normal distribution of width one, which no model has seen the like of: on the embedded model the loss
goes from 2.3 to 7 and is at 3.4 after 30 steps. Here it starts at the keys and values that the model itself has for a
text: the token that begins one, and tokens drawn at random (1.7 after those steps; from zeros 2.1).
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PrefixTuningConfig, get_peft_model, initialize_kv_prefix_from_past_key_values
from torch import nn

from leantune.core.errors import ConfigError, MethodError, describe
from leantune.methods._registry import Method, register

TOKENS = 10
"""How long a prefix is where nothing is said: what the paper has for E2E and WebNLG table-to-text (5 and 10)."""

_NO_TARGETS = "a prefix has no target modules: it stands beside the whole model"
_GAPS = {
    **dict.fromkeys(
        (
            "gradients_match_finite_differences",
            "checkpointed_layer",
            "low_precision",
            "trained_dtype",
            "empty_batch",
            "trained_count_is_the_stated_one",
            "all_linear_twice",
            "deep_copy",
            "config_survives_its_file",
            "pickle",
        ),
        _NO_TARGETS,
    ),
    "gradient_checkpointing": "a checkpointed layer takes no cache, which is where the prefix stands",
    "unload_restores_the_base": "PEFT has nothing to unload: the base was never touched",
    "several_adapters_switch": "PEFT leaves a prefix trainable that is not active",
    "mixed_batch": "PEFT takes no adapter_names for a prefix",
    "reference_copy": "PEFT warns of an adapter called ref, which is part of the name prefix_tuning",
    "modules_to_save": "PEFT leaves modules trained whole on when the prefix is off",
}


def _trainable_parameters(config: PrefixTuningConfig, out_features: int, in_features: int) -> int:
    # Of a key or value projection of that size: what stands in front of its output.
    del in_features
    return config.num_virtual_tokens * out_features


def _prepare(config: PrefixTuningConfig) -> PrefixTuningConfig:
    if config.num_virtual_tokens is None:
        config.num_virtual_tokens = TOKENS
    if config.num_virtual_tokens < 1:
        got = repr(config.num_virtual_tokens)
        raise ConfigError(describe("num_virtual_tokens", got, "at least 1", f"the default is {TOKENS}"))
    return config


def _apply(model: nn.Module, config: PrefixTuningConfig) -> nn.Module:
    task = str(getattr(config.task_type, "value", config.task_type))
    if task != "CAUSAL_LM":
        got = f"task_type {config.task_type}, for which nothing would put the prefix in front"
        raise MethodError(describe("method prefix", got, "a causal language model", "choose another method"))
    wrapped: Any = get_peft_model(model, _prepare(config))
    if next(model.parameters()).dtype == torch.float64:
        # PEFT's is float32 over any base.
        wrapped.prompt_encoder.to(torch.float64)
    if config.init_weights is None and not config.prefix_projection:
        ids = starting_text(model, config.num_virtual_tokens).to(next(model.parameters()).device)
        was_training = model.training
        with torch.no_grad():
            read = model.eval()(input_ids=ids, use_cache=True)
        model.train(was_training)
        initialize_kv_prefix_from_past_key_values(wrapped, past_key_values=read.past_key_values)
    return wrapped


def starting_text(model: Any, count: int) -> torch.Tensor:
    """The tokens whose keys and values a prefix starts at, ``(1, count)``: the same of a model each time."""
    config = model.config.get_text_config()
    ids = torch.randint(config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    if isinstance(config.bos_token_id, int):
        ids[0, 0] = config.bos_token_id
    return ids


register(
    Method(
        name="prefix",
        title="Prefix tuning (stock PEFT)",
        config=PrefixTuningConfig,
        formula="softmax(q [P_k; K]^T) [P_v; V]",
        paper="Prefix-Tuning, arXiv 2101.00190",
        trainable_parameters=_trainable_parameters,
        apply=_apply,
        mergeable=False,
        identity_at_init=False,
        lora_form=False,
        cannot_merge="a prefix is keys and values in front of the text and no change of weights",
        default_learning_rate=1e-2,
        prepare=_prepare,
        toy_options={"num_virtual_tokens": 3},
        gaps=_GAPS,
    )
)
