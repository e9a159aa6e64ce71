"""The adapter folder and everything made of it: load and verify, LoRA export, merge, and the proof of each.

Names load what they need on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Conversion": "leantune.adapters.conversion",
    "convert_to_lora": "leantune.adapters.conversion",
    "export_run": "leantune.adapters.export",
    "inspect_adapter": "leantune.adapters.inspection",
    "load": "leantune.adapters.folder",
    "merge": "leantune.adapters.merging",
    "merge_run": "leantune.adapters.export",
    "Parity": "leantune.adapters.parity",
    "pull": "leantune.adapters.hub",
    "save": "leantune.adapters.folder",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'leantune.adapters' has no attribute '{name}'")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
