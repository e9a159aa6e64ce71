"""Layers whose weight other libraries keep packed: all that such a weight is, and how a merge is taken back exactly.

bitsandbytes keeps four bits a number in a ``Params4bit`` with its scales in a ``quant_state``, or eight bits with
scales that move from the parameter into the layer's ``state`` on first use; torchao keeps a tensor subclass that is
flattened into its parts. Nothing here imports either: who has such a layer has imported its library.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def _classes(*names: str) -> tuple[type, ...]:
    """Layer classes of bitsandbytes, where somebody has imported it."""
    package: Any = sys.modules.get("bitsandbytes")
    return tuple(getattr(package.nn, name) for name in names) if hasattr(package, "nn") else ()


def is_packed(module: nn.Module) -> bool:
    """Whether a layer's weight is packed by bitsandbytes or torchao."""
    if isinstance(module, _classes("Linear4bit", "Linear8bitLt")):
        return True
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and _is_subclass_of_parts(weight)


def _is_subclass_of_parts(tensor: Tensor) -> bool:
    return type(tensor).__module__.startswith("torchao.") and hasattr(tensor, "__tensor_flatten__")


def parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Everything a packed layer holds, scales included, as plain tensors under the names its state dict has.

    The names of torchao's parts are those of its tensors, ``weight.qdata`` and ``weight.scale``.
    """
    for name, tensor in module.state_dict().items():
        yield from _flat(prefix + name, tensor)


def _flat(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not _is_subclass_of_parts(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from _flat(f"{name}.{part}", getattr(tensor, part))


def packed_bytes(module: nn.Module) -> int:
    """Bytes of a packed layer, its scales and bias included."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in parts(module))


def steady(model: nn.Module) -> int:
    """Make bitsandbytes' layers on a CPU compute one function, in training and in evaluation; how many were changed.

    Left alone, its 4-bit layer repacks its weight for AVX512-BF16 when it is first evaluated. That cannot be undone
    by training mode, rounds to bfloat16, and has no backward pass: after the first evaluation of a run the gradient
    of every layer below would be wrong, without an error. Its 8-bit layer rounds activations to eight bits in
    evaluation and not in training, so that the model evaluated is not the one trained. On a GPU neither happens.
    """
    changed = 0
    for module in model.modules():
        layer: Any = module
        kind: Any = type(module)
        if isinstance(module, _classes("Linear4bit")) and layer.weight.device.type == "cpu":
            changed += bool(layer.support_avx512bf16_for_cpu)
            layer.support_avx512bf16_for_cpu = False
        elif kind in _classes("Linear8bitLt") and layer.weight.device.type == "cpu":
            layer.__class__ = _weight_only(kind)
            layer.train()
            changed += 1
    return changed


@cache
def _weight_only(layer: Any) -> Any:
    def train(self: Any, mode: bool = True) -> Any:
        # Its forward asks this flag alone whether activations may be rounded.
        del mode
        return super(weight_only, self).train(True)

    weight_only: Any = type(layer.__name__, (layer,), {"train": train, "__doc__": layer.__doc__})
    return weight_only


Kept = tuple[Any, dict[str, Any], Any, Any]


def keep(layer: Any) -> Kept:
    """All that writing another weight into a packed layer overwrites, to be given to :func:`put_back`."""
    weight = layer.weight
    return weight, dict(vars(weight)), copy.copy(getattr(layer, "state", None)), getattr(layer, "quant_state", None)


def put_back(layer: Any, kept: Kept) -> None:
    """Undo the writing of a weight: the very parameter again, bit for bit, with what stood on it and beside it."""
    weight, attributes, state, quant_state = kept
    # PEFT marks the old parameter as unquantised while it writes the new one; moved later, it would be packed twice.
    weight.__dict__.clear()
    weight.__dict__.update(attributes)
    layer.weight = weight
    if state is not None:
        layer.state = state
    if quant_state is not None:
        layer.quant_state = quant_state


def widen(module: nn.Module) -> None:
    """Trained parts that a host cast to 16 bits back to float32, in place, so that an optimizer still knows them."""
    for parameter in module.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
            if parameter.grad is not None:
                parameter.grad = parameter.grad.float()
