"""A base whose linear weights are eight bits a number, as far as PEFT and TRL ask about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from leantune.methods import _base


class PackedLinear(nn.Linear):
    """Int8 rows with a scale each, dequantised in the forward."""

    scale: Tensor

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        weight = plain.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def dense(self) -> Tensor:
        return self.weight.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense())


class Backend:
    """What PEFT's quantisation backends offer to a layer that is not merged."""

    supports_merge = False
    backend_name, layer_type = "packed", "linear"

    def get_base_weight(self, base_layer: PackedLinear) -> Tensor:
        return base_layer.dense()


def pack_linears(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``model`` with the linear layers of its blocks packed, and PEFT told what they are."""
    monkeypatch.setattr(
        _base,
        "resolve_quantization_backend",
        lambda layer, **options: Backend() if isinstance(layer, PackedLinear) else None,
    )
    for path, layer in tiny.linears(model).items():
        parent, _, leaf = path.rpartition(".")
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), leaf, PackedLinear(layer))
    model.is_loaded_in_8bit = True
    return model
