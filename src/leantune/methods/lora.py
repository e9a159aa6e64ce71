"""LoRA, the baseline everybody knows: ``W + (alpha / r) B A`` with ``B (out, r)`` zero at start and ``A (r, in)``.

Source: Hu et al., arXiv 2106.09685, eq. 3. The layer is stock PEFT's; it stands here behind the same interface
so that comparisons run in one command.
"""

from __future__ import annotations

from peft import LoraConfig, get_peft_model
from torch import nn

from leantune.methods._registry import Method, register


def _trainable_parameters(config: LoraConfig, out_features: int, in_features: int) -> int:
    return config.r * (out_features + in_features)


def _apply(model: nn.Module, config: LoraConfig) -> nn.Module:
    return get_peft_model(model, config)


register(
    Method(
        name="lora",
        title="Low-rank adaptation (stock PEFT)",
        config=LoraConfig,
        formula="W + (alpha / r) B A",
        paper="LoRA, arXiv 2106.09685",
        trainable_parameters=_trainable_parameters,
        apply=_apply,
        default_learning_rate=1e-3,
        toy_options={"r": 4, "lora_alpha": 8},
    )
)
