"""Files and folders that are either the old one or the new one, never half of each.

Everything is written under a temporary name beside its target, flushed to the disk (fsync), then renamed.
A file is replaced in one step. A folder that already exists takes two renames; a kill between them leaves the
old one under ``.<name>.previous``, and :func:`recover` (called by every reader and writer) puts it back.

A kill also leaves what was being written, ``.<name>.tmp-<process>-<place>``. The next writer of the same name removes
it once that process is gone; so does :func:`sweep`, for a whole folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_LEFT_OVER = re.compile(r"\..+\.tmp-(?P<process>\d+)-(?P<place>[0-9a-f]{8})")
# What a process of another machine is writing cannot be told from what it left there, except by its age.
_FORGOTTEN_S = 24 * 3600


@functools.cache
def _place() -> str:
    """Where a process number means the same: on this machine, in this space of process numbers (containers)."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except (OSError, AttributeError):
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


def owner() -> str:
    """This process, as a name that no other living process has."""
    return f"{os.getpid()}-{_place()}"


def is_running(name: str) -> bool:
    """Whether another process, by the name that :func:`owner` gave it, is running on this machine.

    Where the system cannot be asked, or about one of another machine, the answer is no.
    """
    process, _, place = name.partition("-")
    if os.name != "posix" or place != _place() or not process.isdigit() or name == owner():
        return False
    return _exists(int(process))


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp-{owner()}")


def _exists(process: int) -> bool:
    # On POSIX only: elsewhere signal 0 is none that only asks.
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # It is there, and somebody else's.
        return True
    return True


def is_left_over(path: Path) -> bool:
    """Whether a path was being written by a process that is gone; never so while that process may be writing."""
    match = _LEFT_OVER.fullmatch(path.name)
    if match is None or path.name.endswith(owner()):
        return False
    if match["place"] == _place() and os.name == "posix":
        return not _exists(int(match["process"]))
    try:
        return time.time() - path.stat().st_mtime > _FORGOTTEN_S
    except OSError:
        return False


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what processes that are gone were writing into a folder.

    Args:
        folder: where; nothing happens when it is not there.
        name: only what was to become this file or folder.
    """
    # Housekeeping: what cannot be removed now is in nobody's way, and the next writer tries again.
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if (name is None or path.name.startswith(f".{name}.tmp-")) and is_left_over(path):
                with suppress(OSError):
                    _remove(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system name a file: a write that fails does not say which one it was.

    Args:
        path: the file, or the folder that is being written.
    """
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, (str, Path)) else None
        if error.errno is not None and (named is None or _LEFT_OVER.fullmatch(Path(named).name)):
            error.filename, error.filename2 = str(path), None
        raise


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
            with suppress(OSError):
                _remove(previous)
        else:
            os.replace(previous, target)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    temporary = _temporary(path)
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
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
    sweep(target.parent, target.name)
    temporary = _temporary(target)
    if temporary.exists():
        _remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
        with naming(target):
            _fsync_tree(temporary)
            _exchange(temporary, target)
    except BaseException:
        with suppress(OSError):
            _remove(temporary)
        raise
    _fsync_path(target.parent)
    # The new one is in its place: an old one that cannot be removed now goes with the next recover().
    with suppress(OSError):
        _remove(_previous(target))


def _exchange(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.replace(temporary, target)
        return
    previous = _previous(target)
    os.replace(target, previous)
    try:
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.replace(previous, target)
        raise
