"""Leantune: fine-tune a language model by training a sliver of it, and prove what that bought.

Importing this package imports neither torch nor PEFT; each public name loads what it needs on first use.
Once PEFT is imported, before or after, Leantune's methods are registered with it.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from leantune import _peft_hook

try:
    __version__ = version("leantune")
except PackageNotFoundError:
    # A source tree on the path without an installation has no version to tell.
    __version__ = "0+source"

_PUBLIC = {
    "S2FTConfig": "leantune.methods.s2ft",
    "LoraXSConfig": "leantune.methods.lora_xs",
    "MultiLoraConfig": "leantune.methods.multi_lora",
    "XGBLoraConfig": "leantune.methods.xgblora",
    "SpFTConfig": "leantune.methods.spft",
    "LoReFTConfig": "leantune.methods.loreft",
    "BottleneckConfig": "leantune.methods.bottleneck",
    "LISAConfig": "leantune.methods.lisa",
    "GaLoreConfig": "leantune.methods.galore",
    "FullConfig": "leantune.methods.full",
    "Method": "leantune.methods",
    "TrainingPlan": "leantune.methods",
    "initialize": "leantune.methods._initialization",
    "register_method": "leantune.methods:register",
    "RunConfig": "leantune.train",
    "Run": "leantune.train",
    "fit": "leantune.train",
    "resume": "leantune.train",
    "callbacks": "leantune.train",
    "load": "leantune.adapters",
    "convert_to_lora": "leantune.adapters",
    "load_base": "leantune.models",
    "LeantuneError": "leantune.core.errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'leantune' has no attribute '{name}'")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(importlib.import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


_peft_hook.install()
