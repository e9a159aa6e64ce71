"""Doubts about an adapter folder, each cleared before the adapter is believed.

Nothing here changes a model. Functions that find several problems return them all; the caller raises once.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from leantune import methods
from leantune.adapters import layer as layers
from leantune.adapters import record
from leantune.core.errors import AdapterError, LeantuneError, describe, did_you_mean
from leantune.methods._factor_file import FactorConfig

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
_UNPACKED = "not quantised"


def read_config(folder: Path) -> PeftConfig:
    """The config of an adapter folder.

    Raises:
        AdapterError: unreadable, or of a method that nobody registered.
    """
    methods.names()
    path = folder / CONFIG_NAME
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(
            describe(str(path), f"cannot be read ({error.strerror})", "the adapter's config", "copy the folder again")
        ) from error
    except ValueError as error:
        raise AdapterError(
            describe(str(path), f"not JSON ({error})", "the adapter's config", "copy the folder again")
        ) from error
    peft_type = value.get("peft_type") if isinstance(value, dict) else None
    if not isinstance(peft_type, str):
        raise AdapterError(describe(str(path), "no peft_type", "the name of a method", "copy the folder again"))
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if isinstance(config, FactorConfig):
            config.read_from = folder
        return config
    except KeyError as error:
        known = [member.value for member in PeftType]
        raise AdapterError(
            describe(
                str(path),
                f"peft_type {peft_type!r} is a method that nothing here knows",
                did_you_mean(peft_type.upper(), known),
                "import the package that registers it, or update leantune and peft",
            )
        ) from error
    except (TypeError, ValueError, LeantuneError) as error:
        raise AdapterError(describe(str(path), str(error), f"a config of {peft_type}", "mend that field")) from error


def read_tensors(folder: Path, name: str = WEIGHTS_NAME) -> dict[str, Tensor]:
    """Every tensor of a file in an adapter folder, by its key.

    Raises:
        AdapterError: no safetensors file, only a pickle, or a torn file.
    """
    path = folder / name
    if not path.is_file():
        if (folder / PICKLE_NAME).exists():
            raise AdapterError(
                describe(
                    str(folder / PICKLE_NAME),
                    "a pickle, which can run code when it is read",
                    WEIGHTS_NAME,
                    "convert it where you trust it: load it with torch.load(weights_only=True), save as safetensors",
                )
            )
        raise AdapterError(describe(str(path), "missing", "the adapter's tensors", "copy the folder again"))
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        raise AdapterError(
            describe(str(path), f"torn or no safetensors file ({size} bytes: {error})", "a whole one", "copy it again")
        ) from error


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Every tensor with a value that is no finite number."""
    problems = []
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            problems.append(describe(key, f"{bad} of {tensor.numel()} values are not finite", "numbers", "train again"))
    return problems


def key_problems(
    expected: dict[str, Tensor], found: dict[str, Tensor], model: PeftModel, adapter_name: str, path: Path
) -> list[str]:
    """Every tensor that is missing, surplus, or of a shape or kind that the adapter's modules cannot take."""
    weights = path / WEIGHTS_NAME
    surplus = [key for key in found if key not in expected]
    problems = []
    for key, tensor in expected.items():
        got = found.get(key)
        if got is None:
            near = did_you_mean(key, surplus)
            do = near if near.startswith("did") else "save the adapter again"
            problems.append(describe(f"{weights}: {key}", "missing", f"shape {tuple(tensor.shape)}", do))
        elif got.is_floating_point() != tensor.is_floating_point():
            problems.append(describe(f"{weights}: {key}", f"{got.dtype}", f"{tensor.dtype}", "save the adapter again"))
    base_keys = set(model.state_dict())
    for key in surplus:
        kind = "a weight of the base model" if key in base_keys else "belongs to no module of this adapter"
        problems.append(describe(f"{weights}: {key}", kind, "the adapter's own tensors", "remove it from the file"))
    return problems + _shape_problems(expected, found, model, adapter_name, weights)


def _shape_problems(
    expected: dict[str, Tensor], found: dict[str, Tensor], model: PeftModel, adapter_name: str, weights: Path
) -> list[str]:
    wrong = [key for key, tensor in expected.items() if key in found and found[key].shape != tensor.shape]
    if not wrong:
        return []
    config = model.peft_config[adapter_name]
    tuner: Any = model.base_model
    # PEFT's own renaming, with keys in the place of values: model key -> key in the file.
    names = tuner._remap_adapter_state_dict_for_load(
        model=model, config=config, adapter_name=adapter_name, state_dict={key: key for key in found}
    )
    problems = []
    for model_key, key in names.items():
        if str(key) in wrong and not _takes(model, model_key, names, found):
            got, wanted = tuple(found[str(key)].shape), tuple(expected[str(key)].shape)
            do = "load the base it was trained on"
            problems.append(describe(f"{weights}: {key}", f"shape {got}", f"{wanted} on this base", do))
    return problems


def _takes(model: nn.Module, model_key: str, names: dict[str, Any], found: dict[str, Tensor]) -> bool:
    """Whether a tensor's module takes it in spite of its shape, as one does that holds a choice of entries."""
    prefix, _, _ = model_key.rpartition(".")
    try:
        owner = model.get_submodule(prefix)
    except AttributeError:
        return False
    if type(owner)._load_from_state_dict is nn.Module._load_from_state_dict:
        return False
    own = {name.removeprefix(f"{prefix}."): found[str(key)] for name, key in names.items() if name.startswith(prefix)}
    errors: list[str] = []
    try:
        copy.deepcopy(owner)._load_from_state_dict(own, "", {}, False, [], [], errors)
    except LeantuneError:
        return False
    return not errors


def wrong_indices(model: PeftModel, adapter_name: str, path: Path) -> list[str]:
    """Stored indices must name entries that exist, each once: a wrong one would change another weight, silently."""
    problems = []
    try:
        mergeable = methods.of_config(model.peft_config[adapter_name]).mergeable
    except LeantuneError:
        mergeable = True
    for name, module in layers.adapted_modules(model, adapter_name):
        if not hasattr(module, "delta_region") or not mergeable:
            continue
        _, dim, index = module.delta_region(adapter_name)
        if index is None or not index.numel():
            continue
        out, width = layers.shape_of(module)
        # Input entries of a convolution are channels, each with a kernel's worth of columns.
        size = {None: out * width, 0: out, 1: width // math.prod(layers.kernel_of(module))}[dim]
        low, high = int(index.min()), int(index.max())
        where = f"{path / WEIGHTS_NAME}: indices of {name}"
        if low < 0 or high >= size:
            problems.append(describe(where, f"{low} to {high}", f"0 to {size - 1}", "save the adapter again"))
        elif index.unique().numel() != index.numel():
            problems.append(describe(where, "an entry twice", "each entry once", "save the adapter again"))
    return problems


def base_difference(path: Path, model: nn.Module, given_hash: str | None) -> str | None:
    """What is wrong when ``model`` has not the weights that the adapter at ``path`` was trained on."""
    known = record.read(path).get("base") or {}
    wanted = known.get("content_hash")
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    # The hash is of the bytes, so it can only be compared in the dtype it was taken in.
    if not wanted or (known.get("dtype") and known["dtype"] != record.model_dtype(inner)):
        return None
    if given_hash is None:
        from leantune.models import content_hash

        given_hash = content_hash(inner)
    if given_hash == wanted:
        return None
    do = "load that base, or pass force=True if the difference is meant"
    was, now = _packing_of(known.get("quantization")), _packing_of(record.packing(inner))
    if was != now:
        how = "without quantization" if was == _UNPACKED else f"with quantization='{was.partition(' ')[0]}'"
        do = f"load it {how}, or pass force=True if the difference is meant"
    return describe(
        str(path),
        f"trained on {known.get('name')} ({was}, {wanted[:19]}...), loaded over another base ({now}, "
        f"{given_hash[:19]}...)",
        "the same weights",
        do,
    )


def _packing_of(facts: dict[str, Any] | None) -> str:
    """How a base was quantised, in few words."""
    if not facts:
        return _UNPACKED
    return f"{facts['bits']}bit by {facts['backend']} {facts['version']}"
