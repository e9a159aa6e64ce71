"""The run: configuration, trainer, run folder. ``fit(RunConfig(...)) -> Run`` is the whole of it.

Names load what they need on first use, so that a command line can ask for ``RunConfig`` without importing torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "LeanTrainer": "leantune.train.trainer",
    "Run": "leantune.train.run",
    "RunConfig": "leantune.train.config",
    "callbacks": "leantune.train.listener",
    "dry_run": "leantune.train.preview",
    "fit": "leantune.train.run",
    "resume": "leantune.train.run",
    "selected_logits": "leantune.train.loss",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'leantune.train' has no attribute '{name}'")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
