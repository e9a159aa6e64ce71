"""Files and folders that are either the old one or the new one, never half of each.

Everything is written under a temporary name beside its target, flushed to the disk (fsync), then renamed.
A file is replaced in one step. A folder that already exists takes two renames; a kill between them leaves the
old one under ``.<name>.previous``, and :func:`recover` (called by every reader and writer) puts it back.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _fsync_path(path: Path) -> None:
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except (PermissionError, IsADirectoryError):
        # Some systems refuse to open a folder; there the rename itself is all the promise the system gives.
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if not path.is_symlink():
            _fsync_path(path)
    _fsync_path(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def recover(target: Path) -> None:
    """Put the previous folder back when a kill fell between the two renames of a replacement."""
    previous = _previous(target)
    if previous.exists():
        if target.exists():
            _remove(previous)
        else:
            os.replace(previous, target)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8) in one step."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; it becomes ``target`` when the block ends well, and vanishes when it does not.

    An existing ``target`` stays whole until the new one is complete and on the disk.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    if temporary.exists():
        _remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
        _fsync_tree(temporary)
    except BaseException:
        _remove(temporary)
        raise
    previous = _previous(target)
    if target.exists():
        os.replace(target, previous)
    os.replace(temporary, target)
    _fsync_path(target.parent)
    if previous.exists():
        _remove(previous)
