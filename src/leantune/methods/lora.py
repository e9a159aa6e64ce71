"""LoRA and the variants that stock PEFT has of it, behind our interface so that comparisons run in one command.

LoRA: ``W + (alpha / r) B A``, ``B (out, r)`` zero at start, ``A (r, in)`` random. Hu et al., arXiv 2106.09685, eq. 3.
rsLoRA: ``alpha / sqrt(r)`` in place of ``alpha / r``. Kalajdzievski, arXiv 2312.03732.
DoRA: ``m (W + s B A) / ||W + s B A||``, a trained length ``m (out)`` for each row. Liu et al., arXiv 2402.09353, eq. 5.
PiSSA: ``B A`` starts at the ``r`` leading singular directions of ``W``. Meng et al., arXiv 2404.02948, eq. 2 to 4.
LoRA-GA: ``B A`` starts at singular directions of the full gradient. Wang et al., arXiv 2407.05000.

The layers are PEFT's. PiSSA and LoRA-GA keep the base as it is and take their start out in the adapter instead (see
``_offset``): their files are plain LoRA of rank ``2 r`` over the base as everybody has it. LoRA-GA's gradient comes
from ``leantune.initialize``. PEFT multiplies its ``B`` by the gradient's singular values, which the paper does not.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from leantune.core.errors import MethodError, describe
from leantune.methods._offset import FROM_DATA, OffsetLinear, start_from_gradients, starts_elsewhere
from leantune.methods._registry import Method, register


def _trainable_parameters(config: LoraConfig, out_features: int, in_features: int) -> int:
    return config.r * (out_features + in_features) + (out_features if config.use_dora else 0)


def _prepare(config: LoraConfig) -> LoraConfig:
    """A start away from zero is kept out of the base by a layer of ours, also where PEFT or TRL is given the config."""
    if starts_elsewhere(config):
        kinds: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: OffsetLinear, Conv1D: OffsetLinear}
        config._register_custom_module(kinds)
    return config


def _apply(model: nn.Module, config: LoraConfig) -> nn.Module:
    start = config.init_lora_weights
    if not starts_elsewhere(config):
        return get_peft_model(model, config)
    wrapped: Any = get_peft_model(model, _prepare(config))
    others = [name for name, each in wrapped.named_modules() if isinstance(each, LoraLayer)]
    others = [name for name in others if not isinstance(wrapped.get_submodule(name), OffsetLinear)]
    if others:
        got = f"init_lora_weights={start!r} on {others[0]}"
        raise MethodError(describe("target_modules", got, "linear layers", "leave the other ones out"))
    return wrapped


LORA = register(
    Method(
        name="lora",
        title="Low-rank adaptation (stock PEFT)",
        config=LoraConfig,
        formula="W + (alpha / r) B A",
        paper="LoRA, arXiv 2106.09685",
        trainable_parameters=_trainable_parameters,
        apply=_apply,
        default_learning_rate=1e-3,
        needs_batches=lambda config: config.init_lora_weights == FROM_DATA,
        start=start_from_gradients,
        prepare=_prepare,
        toy_options={"r": 4, "lora_alpha": 8},
    )
)
register(
    LORA.preset(
        "rslora",
        {"use_rslora": True},
        title="Rank-stabilised LoRA (stock PEFT)",
        formula="W + (alpha / sqrt(r)) B A",
        paper="rsLoRA, arXiv 2312.03732",
    )
)
register(
    LORA.preset(
        "dora",
        {"use_dora": True},
        title="Weight-decomposed LoRA (stock PEFT)",
        formula="m (W + (alpha / r) B A) / |W + (alpha / r) B A|",
        paper="DoRA, arXiv 2402.09353",
        # Over a bfloat16 base the length in float32 and the norm of the weight are not the same bits.
        identity_at_init=False,
        lora_form=False,
        gaps={
            "gradients_match_finite_differences": "the norm is a constant to the backward (paper, section 4.3)",
            "low_precision": "the norm is computed in the dtype of the base",
            "mixed_batch": "PEFT refuses adapter_names where an adapter is DoRA",
            "two_active_adapters_sum": "the second one scales what the first has made, so that they do not add up",
        },
    )
)
register(
    LORA.preset(
        "pissa",
        {"init_lora_weights": "pissa"},
        title="LoRA from the leading singular directions of W (PEFT's layer and start)",
        formula="W + (alpha / r) (B A - B0 A0), B0 A0 the rank-r part of W",
        paper="PiSSA, arXiv 2404.02948",
        identity_at_init=False,
    )
)
register(
    LORA.preset(
        "lora-ga",
        {"init_lora_weights": FROM_DATA},
        title="LoRA from singular directions of the gradient (PEFT's layer and start)",
        formula="W + (alpha / r) (B A - B0 A0), B0, A0 from the SVD of dL/dW",
        paper="LoRA-GA, arXiv 2407.05000",
        identity_at_init=False,
        # Its start takes 2 r directions of a layer.
        toy_options={"r": 2, "lora_alpha": 4},
    )
)
