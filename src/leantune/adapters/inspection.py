"""What an adapter folder holds, read without a model: the config and the header and tensors of one file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from leantune.adapters import factor_file, record, verification
from leantune.adapters import folder as adapter_folder


def inspect_adapter(folder: str | Path) -> dict[str, Any]:
    """Facts of an adapter folder, as JSON.

    Args:
        folder: an adapter folder, a run folder or a Hub id.

    Returns:
        ``folder``, ``method``, ``peft_type``, ``task_type``, ``base`` (name, source, note, content hash),
        ``config`` (the fields that differ from their defaults), ``parameters`` (trained floating-point numbers),
        ``bytes`` (of the tensor file), ``dtypes``, ``achieved_ratio``, ``rank`` and ``modules``: for each adapted
        module its ``parameters``, ``bytes`` and ``tensors`` (name -> shape and dtype).

    Raises:
        AdapterError: the folder is none, or torn.
    """
    path = adapter_folder.resolve(folder)
    config = verification.read_config(path)
    tensors = verification.read_tensors(path)
    known = record.read(path)
    prefixes = (f"{str(getattr(config.peft_type, 'value', config.peft_type)).lower()}_",)
    modules: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, tensor_name = _split(key, prefixes)
        entry = modules.setdefault(name, {"parameters": 0, "bytes": 0, "tensors": {}})
        if tensor.is_floating_point():
            entry["parameters"] += tensor.numel()
        entry["bytes"] += tensor.numel() * tensor.element_size()
        entry["tensors"][tensor_name] = {"shape": list(tensor.shape), "dtype": _dtype(tensor)}
    fields = _changed_fields(config)
    return {
        "folder": str(path),
        "method": adapter_folder.method_name(config),
        "peft_type": str(getattr(config.peft_type, "value", config.peft_type)),
        "task_type": fields.pop("task_type", None) or known.get("task_type"),
        "base": known.get("base") or {"name": config.base_model_name_or_path},
        "config": fields,
        # What is frozen and stored all the same is no trained number; the record tells, where there is one.
        "parameters": known.get("parameters") or sum(entry["parameters"] for entry in modules.values()),
        "bytes": (path / verification.WEIGHTS_NAME).stat().st_size,
        "dtypes": sorted({_dtype(tensor) for tensor in tensors.values() if tensor.is_floating_point()}),
        "achieved_ratio": getattr(config, "achieved_ratio", None),
        "rank": getattr(config, "r", None),
        **factor_file.facts(path, config),
        "modules": modules,
    }


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _split(key: str, prefixes: tuple[str, ...]) -> tuple[str, str]:
    """Module path and tensor name of a key: at the method's part of it, else before the last name."""
    parts = key.removeprefix("base_model.model.").split(".")
    for position, part in enumerate(parts):
        if part.startswith(prefixes):
            return ".".join(parts[:position]), ".".join(parts[position:])
    return ".".join(parts[:-1]), parts[-1]


def _changed_fields(config: Any) -> dict[str, Any]:
    left_out = {"peft_type", "peft_version", "base_model_name_or_path", "auto_mapping", "inference_mode"}
    left_out |= {"runtime_config", "factors", "factor_file", "factor_hash"}
    changed = {}
    for field in dataclasses.fields(config):
        if field.name in left_out:
            continue
        value = getattr(config, field.name)
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value != default:
            changed[field.name] = sorted(value) if isinstance(value, set) else getattr(value, "value", value)
    return changed
