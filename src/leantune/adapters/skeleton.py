"""A base model without its weights: the modules and shapes that reading an adapter needs, in a few kilobytes.

Each weight is one zero seen through strides of zero. Unlike the meta device this answers every question a method may
ask while it builds its layers, and whatever it computes from the zeros is replaced by what the adapter's file holds.
"""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig
from torch import nn

from leantune.core.errors import AdapterError, describe

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def auto_class_of(task_type: str | None) -> str:
    """The transformers Auto class for PEFT's name of a task."""
    return _AUTO_CLASSES.get(task_type or "CAUSAL_LM", "AutoModel")


def auto_class_for(model: nn.Module, task_type: str | None) -> str:
    """The Auto class that loads a base like this one; PEFT has no task for masked language models and images."""
    name = type(model).__name__
    for ending in ("ForMaskedLM", "ForImageClassification"):
        if name.endswith(ending):
            return f"AutoModel{ending}"
    return auto_class_of(task_type)


def location(name: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """Where transformers finds a base model: ``from_pretrained(path, **options)``.

    Args:
        name: as the user gave it: a Hub id, a folder, a GGUF file, or the name of the embedded model.
        revision: on the Hub.

    Raises:
        ModelError: there is no such model.
    """
    from leantune.models.location import locate

    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        # A folder with the config alone will do here.
        return str(path), {}
    found = locate(name, revision=revision)
    return found.target, dict(found.options)


def stock_name(base: dict[str, Any]) -> str | None:
    """What an adapter's config may call its base: a name with which stock transformers loads these very weights.

    Args:
        base: of an adapter's record. Weights that came from the Hub have the Hub's name, and no others claim it.
    """
    from leantune.models.embedded import MODELS

    name = base.get("name")
    if base.get("source") == "hub" or not name:
        return base.get("hub_id") or name
    if name in MODELS:
        return location(name)[0]
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else str(name)


def build(config: PeftConfig, name: str) -> nn.Module:
    """The skeleton of the base model that an adapter's config goes with.

    Args:
        config: the adapter's config; its task picks the model class.
        name: the base model.

    Raises:
        AdapterError: the base model's config cannot be found.
    """
    path, options = location(name)
    try:
        base_config = transformers.AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise AdapterError(
            describe(
                f"base model {name}",
                f"its config cannot be read ({str(error).splitlines()[0]})",
                "a Hub id or folder (the config alone is enough)",
                "pass base=...",
            )
        ) from error
    mapping = config.auto_mapping or {}
    with torch.device("meta"):
        if config.task_type is None and mapping.get("parent_library", "").startswith("transformers."):
            cls = getattr(importlib.import_module(mapping["parent_library"]), mapping["base_model_class"])
            model: nn.Module = cls(base_config)
        else:
            task = str(getattr(config.task_type, "value", config.task_type)) if config.task_type else None
            model = getattr(transformers, auto_class_of(task)).from_config(base_config)
    hollow(model)
    return model


def like(model: nn.Module) -> nn.Module:
    """The skeleton of a plain transformers model that is at hand."""
    base: Any = model
    with torch.device("meta"):
        plain = type(base)(copy.deepcopy(base.config))
    hollow(plain)
    return plain


def hollow(model: nn.Module) -> None:
    """Replace every parameter and buffer by one zero of its shape and dtype; tied ones stay tied."""
    seen: dict[int, Any] = {}
    for module in model.modules():
        for entries in (module._parameters, module._buffers):
            for key, tensor in entries.items():
                if tensor is None:
                    continue
                if id(tensor) not in seen:
                    zero = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    seen[id(tensor)] = nn.Parameter(zero, requires_grad=False) if is_parameter else zero
                entries[key] = seen[id(tensor)]
