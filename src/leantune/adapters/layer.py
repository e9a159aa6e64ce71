"""The adapted modules of a model, and the exact LoRA factors that each one offers."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera.layer import VeraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from leantune.core import packed_weight
from leantune.core.errors import AdapterError, describe


def _base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapters_of(layer: BaseTunerLayer) -> set[str]:
    """The names of the adapters that live on a layer."""
    names: set[str] = set()
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        container: Any = getattr(layer, attribute, None)
        if hasattr(container, "keys"):
            names.update(container.keys())
    return names


def adapted_modules(model: nn.Module, adapter_name: str) -> list[tuple[str, BaseTunerLayer]]:
    """Path in the plain base model and layer, for every module that the adapter changes."""
    inner = _base_of(model)
    found: list[tuple[str, BaseTunerLayer]] = []
    wrapped = [name for name, module in inner.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    for name, module in inner.named_modules():
        if not isinstance(module, BaseTunerLayer) or adapter_name not in adapters_of(module):
            continue
        if any(name.startswith(f"{other}.") for other in wrapped):
            continue
        found.append((name, module))
    return found


def extra_modules(model: nn.Module, adapter_name: str) -> list[str]:
    """Paths of the modules that the adapter replaces as a whole (``modules_to_save``, trained tokens)."""
    inner = _base_of(model)
    return [
        name
        for name, module in inner.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters
    ]


def plain_module_names(model: nn.Module) -> list[str]:
    """Module paths as the plain base model has them, whatever adapters are on it."""
    inner = _base_of(model)
    names: list[str] = []
    inside: list[str] = []
    for name, module in inner.named_modules():
        if not name or any(name.startswith(f"{other}.") for other in inside):
            continue
        names.append(name)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inside.append(name)
    return names


def strip(model: nn.Module) -> None:
    """Put every wrapped module back in its place, as if no adapter had ever been on the model."""
    done: list[str] = []
    for name, module in list(model.named_modules()):
        if any(name.startswith(f"{other}.") for other in done):
            continue
        if isinstance(module, BaseTunerLayer):
            plain = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            plain = module.original_module
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
        done.append(name)


def is_conv1d(layer: BaseTunerLayer) -> bool:
    """Whether the wrapped module is GPT-2's ``Conv1D``, whose weight is stored as ``(in, out)``."""
    return isinstance(layer.get_base_layer(), Conv1D)


def kernel_of(layer: BaseTunerLayer) -> tuple[int, ...]:
    """``(kh, kw)`` of a wrapped convolution; empty for a linear module."""
    base = layer.get_base_layer()
    return tuple(base.weight.shape[2:]) if isinstance(base, nn.Conv2d) else ()


def shape_of(layer: BaseTunerLayer) -> tuple[int, int]:
    """``(out, in)`` of the wrapped linear module."""
    base: Any = layer.get_base_layer()
    if isinstance(base, nn.Linear):
        return base.out_features, base.in_features
    if isinstance(base, Conv1D):
        return int(base.weight.shape[1]), int(base.weight.shape[0])
    out_features, in_features = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if out_features is None or in_features is None:
        return int(base.weight.shape[0]), int(base.weight.shape[1])
    return int(out_features), int(in_features)


def lora_factors(path: str, layer: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
    """``(B, A)`` with ``B A`` the layer's change of its weight: ``B (out, k)``, ``A (k, in)``, scaling in ``B``.

    Raises:
        AdapterError: the layer has no such form.
    """
    if callable(getattr(layer, "lora_factors", None)):
        B, A = layer.lora_factors(adapter_name)
        return B.detach(), A.detach()
    if _is_stock_lora(layer) and adapter_name in layer.lora_A:
        refuse_lora_variant(path, layer, adapter_name)
        return _stock_factors(layer, adapter_name)
    if isinstance(layer, VeraLayer):
        return _vera_factors(layer, adapter_name)
    raise AdapterError(
        describe(
            f"module {path}",
            f"a {type(layer).__name__} layer has no LoRA form",
            "a linear layer with lora_factors, or stock PEFT LoRA or VeRA on one",
            "merge the adapter into the base instead (leantune merge)",
        )
    )


def _stock_factors(layer: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
    A: Tensor = layer.lora_A[adapter_name].weight.detach()
    B: Tensor = layer.lora_B[adapter_name].weight.detach()
    # Reduced precision is widened first: folding the scaling into bfloat16 factors would round them again.
    wide = torch.promote_types(A.dtype, torch.float32)
    return B.to(wide) * layer.scaling[adapter_name], A.to(wide)


def _vera_factors(layer: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
    """``diag(b) B diag(d)`` and ``A``, cut to the layer's size."""
    A: Tensor = layer.vera_A[adapter_name][:, : layer.in_features]
    B: Tensor = layer.vera_B[adapter_name][: layer.out_features]
    rows, columns = layer.vera_lambda_b[adapter_name].detach(), layer.vera_lambda_d[adapter_name].detach()
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows[:, None].to(wide) * B.to(wide) * columns.to(wide), A.to(wide).contiguous()


def _is_stock_lora(layer: Any) -> bool:
    """Stock LoRA on a linear layer; PEFT has other classes for a base that bitsandbytes packed."""
    over_packed = isinstance(layer, LoraLayer) and packed_weight.is_packed(layer.get_base_layer())
    return isinstance(layer, LoraLinear) or over_packed


def refuse_lora_variant(path: str, layer: Any, adapter_name: str) -> None:
    """Raise where stock LoRA is more than ``B A``.

    Raises:
        AdapterError: it is a variant (DoRA and the like) or has a bias of its own.
    """
    variant: Any = getattr(layer, "lora_variant", {}).get(adapter_name)
    got = None
    if variant is not None:
        got = f"a LoRA variant ({getattr(variant, '__name__', type(variant).__name__)})"
    elif getattr(layer, "lora_bias", {}).get(adapter_name):
        got = "a LoRA with a bias of its own"
    if got:
        raise AdapterError(
            describe(
                f"module {path}",
                got,
                "plain B A",
                "merge the adapter into the base instead (leantune merge)",
            )
        )


def delta_weight(layer: Any, adapter_name: str) -> Tensor:
    """The layer's own account of its change, as ``(out, in)``, computed by its own code and not from the factors."""
    delta = layer.get_delta_weight(adapter_name).detach()
    # PEFT answers in the layout of the stored weight, and so do our layers.
    return delta.T if is_conv1d(layer) or getattr(layer, "fan_in_fan_out", False) else delta
