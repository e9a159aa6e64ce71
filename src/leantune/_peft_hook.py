"""Registers Leantune's methods with PEFT as soon as both are imported, in whichever order that happens.

``import leantune`` must stay light (PEFT takes seconds and imports torch), yet ``PeftModel.from_pretrained`` must
know our methods. So when PEFT is not there yet, a finder on ``sys.meta_path`` waits for its import and runs ours
right behind it; afterwards the finder steps aside.

What libraries say about each other on the way, and a user can do nothing about, is held back: these lines alone.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# logger -> how the line begins.
_LOGGED = {
    # bitsandbytes 0.50 on a CPU with AVX512-BF16 would rather have a kernel from the Hub; it has its own as well.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}
# How the FutureWarning begins.
_WARNED = (
    # PEFT 0.21 asks a transformers 5.23 model by a name that goes in transformers 6.
    "`is_gradient_checkpointing` is deprecated",
    # accelerate 1.15 hands torch 2.13 the older name of a switch.
    "`broadcast_buffers` is deprecated",
)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_LOGGED[record.name])


def _quiet() -> None:
    for name in _LOGGED:
        # One function, which a logger takes once.
        logging.getLogger(name).addFilter(_is_news)
    for beginning in _WARNED:
        warnings.filterwarnings("ignore", message=beginning, category=FutureWarning)


def _register() -> None:
    importlib.import_module("leantune.methods").names()


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if fullname != "peft":
            return None
        # Out of the way first: the search below would otherwise come back here.
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("peft")
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Register now when PEFT is already imported, else right after it will be."""
    _quiet()
    peft = sys.modules.get("peft")
    if peft is None:
        sys.meta_path.insert(0, _Finder())
    elif hasattr(peft, "get_peft_model"):
        _register()
