"""A file layer that fails once, at a chosen call: what a full or a broken disk, and a kill, do to a program.

Every call of Python that touches a path below a root is counted, and so is every function that lets native code write
or read there. The call with a given number then fails in a given way. After a kill no call has any effect, so that
clean-up code, which a killed process does not run, changes nothing.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
import tokenizers
import torch
from safetensors import SafetensorError

import leantune.adapters.verification
import leantune.train.checkpoint
from leantune.core import atomic
from train.resume_fixture import Killed

# What can go wrong with a call: the disk is full, it is broken, half of the data arrives and then it is full, half of
# the data arrives and nobody says so, the process is killed half-way.
FULL, BROKEN, SHORT, SILENT, KILL = "ENOSPC", "EIO", "short", "silent", "kill"
KINDS: dict[str, tuple[str, ...]] = {
    "open to write": (FULL, BROKEN, KILL),
    "open to read": (BROKEN, KILL),
    "write": (FULL, BROKEN, SHORT, KILL),
    "read": (BROKEN, SHORT, KILL),
    "native write": (FULL, SHORT, SILENT, KILL),
    "native read": (BROKEN, KILL),
    "fsync": (FULL, BROKEN, KILL),
    "replace": (FULL, BROKEN, KILL),
    "rename": (FULL, BROKEN, KILL),
    "mkdir": (FULL, BROKEN, KILL),
    "unlink": (BROKEN, KILL),
    "remove": (BROKEN, KILL),
    "rmdir": (BROKEN, KILL),
    "scandir": (BROKEN, KILL),
    "listdir": (BROKEN, KILL),
}
_NUMBERS = {FULL: errno.ENOSPC, BROKEN: errno.EIO, SHORT: errno.ENOSPC}
# No process has such a number.
_GONE = 99_999_999


class FaultyFiles:
    """A context in which one call below ``root`` fails.

    Args:
        root: the folder that is watched.
        at: number of the call that fails, from 0; None lets all of them pass, to count them.
        kind: how it fails.

    Attributes:
        calls: what was called so far, each with the file's name.
        fired: the call was reached.
    """

    def __init__(self, root: Path, at: int | None = None, kind: str = "") -> None:
        self.root = os.path.abspath(root)
        self.at = at
        self.kind = kind
        self.calls: list[tuple[str, str]] = []
        self.fired = False
        self.dead = False
        self._undo: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> FaultyFiles:
        for module in (builtins, io):
            self._replace(module, "open", self._open)
        for name in ("fsync", "replace", "rename", "mkdir", "unlink", "remove", "rmdir", "scandir", "listdir"):
            self._replace(os, name, self._call(name))
        self._replace(os, "open", self._call("open to read"))
        # The bytes of these never pass through Python.
        self._replace(safetensors.torch, "serialize_file", self._native_write(1, _safetensors_error))
        self._replace(torch, "save", self._native_write(1, _torch_error))
        self._replace(tokenizers.Tokenizer, "save", self._native_write(1, _tokenizers_error))
        for module in (leantune.adapters.verification, leantune.train.checkpoint):
            self._replace(module, "safe_open", self._native_read)
        # Files left by this process look as those of one that is gone, as they would be.
        place = atomic._place()
        self._replace(atomic, "owner", lambda genuine: lambda: f"{_GONE}-{place}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, name, genuine in reversed(self._undo):
            setattr(module, name, genuine)

    def _replace(self, module: Any, name: str, make: Callable[[Any], Any]) -> None:
        genuine = getattr(module, name)
        self._undo.append((module, name, genuine))
        setattr(module, name, make(genuine))

    def meet(self, operation: str, path: Any) -> str | None:
        """Count a call; returns how it is to fail, or None."""
        place = _place_of(path)
        if place is None or not place.startswith(self.root):
            return None
        if self.dead:
            raise Killed
        number = len(self.calls)
        self.calls.append((operation, os.path.relpath(place, self.root)))
        if number != self.at:
            return None
        self.fired = True
        return self.kind

    def fail(self, kind: str, path: Any) -> None:
        """Fail as a call of the system does."""
        if kind == KILL:
            self.dead = True
            raise Killed
        number = _NUMBERS[kind]
        # As the system does it: an error of write or fsync names no file.
        raise OSError(number, os.strerror(number), *([] if path is None else [path]))

    def _call(self, operation: str) -> Callable[[Any], Any]:
        def make(genuine: Any) -> Any:
            def call(*arguments: Any, **keywords: Any) -> Any:
                path = arguments[0] if arguments else "."
                if keywords.get("dir_fd") is not None:
                    path = os.path.join(_place_of(keywords["dir_fd"]) or "", os.fspath(path))
                kind = self.meet(operation, path)
                if kind is not None:
                    self.fail(kind, None if isinstance(path, int) else path)
                return genuine(*arguments, **keywords)

            return call

        return make

    def _open(self, genuine: Any) -> Any:
        def call(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
            writes = bool(set(mode) & set("wax+"))
            kind = None if isinstance(file, int) else self.meet("open to write" if writes else "open to read", file)
            if kind is not None:
                self.fail(kind, file)
            opened = genuine(file, mode, *arguments, **keywords)
            place = _place_of(file)
            return _File(opened, self) if place is not None and place.startswith(self.root) else opened

        return call

    def _native_write(self, place: int, error: Callable[[], Exception]) -> Callable[[Any], Any]:
        def make(genuine: Any) -> Any:
            def call(*arguments: Any, **keywords: Any) -> Any:
                kind = self.meet("native write", arguments[place])
                if kind == FULL:
                    raise error()
                result = genuine(*arguments, **keywords)
                if kind is not None:
                    os.truncate(arguments[place], Path(arguments[place]).stat().st_size // 2)
                    if kind == KILL:
                        self.fail(kind, None)
                    if kind == SHORT:
                        raise error()
                return result

            return call

        return make

    def _native_read(self, genuine: Any) -> Any:
        def call(path: Any, *arguments: Any, **keywords: Any) -> Any:
            kind = self.meet("native read", path)
            if kind == KILL:
                self.fail(kind, None)
            if kind is not None:
                raise SafetensorError("Error while deserializing: I/O error: Input/output error (os error 5)")
            return genuine(path, *arguments, **keywords)

        return call


class _File:
    """An open file whose first write or read may fail; written through at once, as a kill does not flush."""

    def __init__(self, file: Any, layer: FaultyFiles) -> None:
        self._file = file
        self._layer = layer
        self._read_before = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *arguments: Any) -> Any:
        return self._file.__exit__(*arguments)

    def __iter__(self) -> Any:
        return iter(self._file)

    def write(self, data: Any) -> Any:
        kind = self._layer.meet("write", self._file.name)
        if kind in (SHORT, KILL):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
        if kind is not None:
            self._layer.fail(kind, None)
        written = self._file.write(data)
        self._file.flush()
        return written

    def read(self, *arguments: Any) -> Any:
        kind = self._meet_read()
        data = self._file.read(*arguments)
        return data[: len(data) // 2] if kind == SHORT else data

    def readinto(self, buffer: Any) -> Any:
        kind = self._meet_read()
        if kind == SHORT:
            return self._file.readinto(memoryview(buffer)[: len(buffer) // 2])
        return self._file.readinto(buffer)

    def _meet_read(self) -> str | None:
        if self._read_before:
            return None
        self._read_before = True
        kind = self._layer.meet("read", self._file.name)
        if kind in (BROKEN, KILL):
            self._layer.fail(str(kind), None)
        return kind


def _place_of(path: Any) -> str | None:
    """The absolute path behind a path or an open descriptor."""
    if isinstance(path, int):
        try:
            return os.readlink(f"/proc/self/fd/{path}")
        except OSError:
            return None
    try:
        return os.path.abspath(os.fsdecode(path))
    except TypeError:
        return None


def _safetensors_error() -> Exception:
    return SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def _torch_error() -> Exception:
    return RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


def _tokenizers_error() -> Exception:
    return Exception("No space left on device (os error 28)")
