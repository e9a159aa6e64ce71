"""Inputs that a model can be run on without data: random ids or pixels made from its config, or its own example."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ROWS, TOKENS = 2, 8


@dataclass(frozen=True)
class Example:
    """Arguments of one forward."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240717)


def _token_ids(config: Any) -> Tensor:
    """Random ids without padding, ``(rows, tokens)``; each row ends as its tokenizer would end it."""
    vocabulary = int(config.vocab_size)
    longest = getattr(config, "max_position_embeddings", None)
    tokens = min(TOKENS, longest - 2) if isinstance(longest, int) and longest > 3 else TOKENS
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (ROWS, tokens), generator=_generator())
    padding, end = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
    for special in (padding, end):
        ids = torch.where(ids == special, (ids + 1) % vocabulary, ids) if isinstance(special, int) else ids
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[:, -1] = end
    return ids


def _from_config(model: nn.Module, config: Any) -> Example | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    main = getattr(model, "main_input_name", "input_ids")
    kwargs: dict[str, Any] = {}
    if main == "input_ids" and isinstance(getattr(text, "vocab_size", None), int):
        kwargs["input_ids"] = _token_ids(text)
        if getattr(config, "is_encoder_decoder", False):
            kwargs["decoder_input_ids"] = _token_ids(text)
    elif main == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        channels = getattr(config, "num_channels", 3)
        kwargs["pixel_values"] = torch.randn(ROWS, channels, height, width, generator=_generator())
    else:
        return None
    if "use_cache" in inspect.signature(model.forward).parameters:
        # Keys and values that come out as a cache would count as a use of theirs beside the attention's.
        kwargs["use_cache"] = False
    return Example(kwargs=kwargs)


def _own(model: nn.Module) -> Example | None:
    """What the model calls its example: transformers' ``dummy_inputs``, Lightning's ``example_input_array``."""
    for name in ("dummy_inputs", "example_input_array"):
        given = getattr(model, name, None)
        if isinstance(given, Mapping):
            return Example(kwargs=dict(given))
        if isinstance(given, Tensor):
            return Example(args=(given,))
        if isinstance(given, (tuple, list)):
            return Example(args=tuple(given))
    return None


def example_of(model: nn.Module) -> Example | None:
    """Inputs for one forward of the model, on the CPU, the same at each call; None when nothing says what it takes.

    A transformers model is asked for its config, another one for ``dummy_inputs`` (a dict of arguments) or
    ``example_input_array`` (a tensor, tuple or dict).
    """
    config = getattr(model, "config", None)
    made = _from_config(model, config) if config is not None and hasattr(config, "to_dict") else None
    return made or _own(model)
