"""``leantune.json``: what a folder of ours knows about itself, beside the files that other tools read.

It names the base model and the hash of its content, so that loading over another base is caught; stock PEFT and
servers ignore it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leantune.core.atomic import write_json

if TYPE_CHECKING:
    from torch import nn

    from leantune.models import BaseModel

RECORD_NAME = "leantune.json"


def model_dtype(model: nn.Module) -> str:
    """The dtype of most of the model's own floating weights, e.g. ``"float32"``."""
    counts: dict[str, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            name = str(parameter.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + parameter.numel()
    return max(counts, key=counts.__getitem__) if counts else "float32"


def packing(model: nn.Module) -> dict[str, Any] | None:
    """How the weights of a model are quantised; None where they are not."""
    from leantune.models import quantisation

    found = quantisation.measure(model)
    return None if found is None else found.to_dict()


def base_facts(base: BaseModel | None, model: nn.Module) -> dict[str, Any]:
    """What is known of the base: name, source, Hub id, note, hash of the content, dtype."""
    config = getattr(model, "config", None)
    if base is None:
        name = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None)
        return {"name": name or None, "dtype": model_dtype(model), "quantization": packing(model)}
    return {
        "name": base.name,
        "source": base.source,
        "hub_id": base.hub_id,
        "revision": base.revision,
        "note": base.note,
        "quantization": None if base.quantisation is None else base.quantisation.to_dict(),
        "content_hash": base.content_hash,
        "dtype": model_dtype(model),
    }


def write(folder: Path, value: dict[str, Any]) -> None:
    """Write the record into a folder."""
    write_json(folder / RECORD_NAME, value)


def read(folder: Path) -> dict[str, Any]:
    """The record of a folder; that of its run when it has none of its own; empty when nothing is known."""
    own = _read_json(folder / RECORD_NAME)
    if own:
        return own
    run = _read_json(folder.parent / "run.json")
    base, config = run.get("base"), run.get("config")
    if not isinstance(base, dict):
        return {}
    # The hash was taken of the weights in the dtype of the run.
    return {"base": {"dtype": config.get("dtype"), **base} if isinstance(config, dict) else base}


def _read_json(path: Path) -> dict[str, Any]:
    # A record is a help, never a condition: a folder without one, or with a torn one, still loads.
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
