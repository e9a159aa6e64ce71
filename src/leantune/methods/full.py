"""Full fine-tuning, the other baseline: every parameter of the base trains, and a whole model is saved."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from leantune.methods._registry import Method, register


@dataclass
class FullConfig:
    """Full fine-tuning has no options: every parameter of the base model trains."""


def _trainable_parameters(config: FullConfig, out_features: int, in_features: int) -> int:
    del config
    return out_features * in_features


def _apply(model: nn.Module, config: FullConfig) -> nn.Module:
    del config
    model.requires_grad_(True)
    return model


register(
    Method(
        name="full",
        title="Full fine-tuning",
        config=FullConfig,
        formula="W + dW",
        paper="-",
        trainable_parameters=_trainable_parameters,
        apply=_apply,
        is_adapter=False,
        mergeable=False,
        lora_form=False,
        default_learning_rate=1e-4,
    )
)
