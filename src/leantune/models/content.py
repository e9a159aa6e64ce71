"""The content hash: which base weights an adapter was trained on.

The hash covers the weights themselves, so it survives a rename, another folder, another shard size and a PEFT
wrapper around the model, and it does not survive one flipped bit.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from leantune.core import packed_weight
from leantune.core.errors import ModelError, describe


def _unwrap(module: nn.Module) -> nn.Module:
    """The base module under PEFT's wrappers; a module of anybody else is returned as it is."""
    if "peft" not in sys.modules:  # nothing can be wrapped by a package that nobody imported
        return module
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while True:
        inner: Any
        if isinstance(module, PeftModel):
            inner = module.get_base_model()
        elif isinstance(module, BaseTuner):
            inner = module.model
        elif isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer"):
            inner = module.base_layer
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inner = module.original_module
        else:
            return module
        module = inner


def base_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of the base model, with the names they have without any adapter.

    Args:
        module: a model, wrapped by PEFT or not.
        prefix: put before every name.
    """
    module = _unwrap(module)
    if packed_weight.is_packed(module):
        # Its scales stand beside the parameter, and they decide its values as much.
        yield from packed_weight.parts(module, prefix)
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    for name, child in module._modules.items():
        if child is not None:
            yield from base_tensors(child, f"{prefix}{name}.")


def _raw_bytes(tensor: Tensor) -> memoryview:
    # A view as bytes, not as numbers: numpy has no bfloat16, and the sign of a zero counts.
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def content_hash(model: nn.Module) -> str:
    """SHA-256 over the base model's (name, dtype, shape, bytes), sorted by name.

    Of a quantised base the packed bytes and the scales count, as its library keeps them: the hash is of one format of
    one library. Adapter parameters, and the names that wrappers add, do not count. Tensors that share memory (tied
    embeddings) count once, under the first of their names. The dtype counts: the same file loaded in bfloat16
    and in float32 gives two hashes.

    Args:
        model: a model, wrapped by PEFT or not, merged or not. A merged adapter has changed the weights, so it
            changes the hash.

    Returns:
        ``"sha256:"`` and 64 hexadecimal digits.

    Raises:
        ModelError: a tensor has no memory (the meta device).
    """
    digest = hashlib.sha256()
    seen: set[tuple[object, ...]] = set()
    for name, tensor in sorted(base_tensors(model), key=lambda pair: pair[0]):
        if tensor.device.type == "meta":
            raise ModelError(
                describe(name, "on the meta device, without values", "loaded weights", "load the model first")
            )
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        header = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(header).encode() + b"\n")
        digest.update(_raw_bytes(tensor))
    return f"sha256:{digest.hexdigest()}"
