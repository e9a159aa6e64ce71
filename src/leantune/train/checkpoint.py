"""Checkpoints that are whole or not there, and that know whether they still are what was written.

The trainer writes a checkpoint file by file. It does so in a folder that no reader looks at; when all files are on
the disk and sealed (:func:`seal`), the folder gets its name in one rename. An old checkpoint loses its name before its
files are removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from leantune.core import atomic
from leantune.train.record import file_hash, plain

WRITING = ".writing"
SEAL = "checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_REMOVED = re.compile(r"\..+\.removed")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run's checkpoint folder, oldest first."""
    if not folder.is_dir():
        return []
    for hidden in list(folder.glob(".*.previous")):
        atomic.recover(hidden.with_name(hidden.name[1 : -len(".previous")]))
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Write beside a checkpoint's files what they are, so that a reader can tell whether they still are.

    Args:
        folder: all files of the checkpoint, none yet to come.
        facts: what a resumed run needs to know of this one.

    Raises:
        OSError: a file is not whole although writing it raised nothing.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL]
    for path in files:
        if not _is_whole(path):
            raise OSError(errno.EIO, "written without an error, and yet not whole", str(path))
    hashes = {path.relative_to(folder).as_posix(): file_hash(path) for path in files}
    atomic.write_json(folder / SEAL, plain({**facts, "files": hashes}))


def _is_whole(path: Path) -> bool:
    """Whether a file just written can be read to its end, as far as its format tells."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt"):
                return True
        if path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path):
                return True
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError, zipfile.BadZipFile):
        return False
    return True


def unseal(folder: Path) -> tuple[dict[str, Any], str | None]:
    """What the seal of a checkpoint says, and what is wrong with the checkpoint; None when it is what was written.

    Args:
        folder: a checkpoint.

    Raises:
        OSError: it cannot be read now, which says nothing about what it holds.
    """
    if not (folder / SEAL).is_file():
        return {}, f"has no {SEAL}: written by another program, or by an older version"
    facts = sealed(folder)
    if not facts:
        return {}, f"{SEAL} is torn"
    for name, recorded in facts["files"].items():
        if not (folder / name).is_file():
            return facts, f"{name} is missing"
        if file_hash(folder / name) != recorded:
            return facts, f"{name} is not what was written ({(folder / name).stat().st_size} bytes)"
    return facts, None


def sealed(folder: Path) -> dict[str, Any]:
    """What the seal of a checkpoint says, whether or not it still holds; empty where there is none to be read."""
    path = folder / SEAL
    try:
        facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) and isinstance(facts.get("files"), dict) else {}


def trained_hash(model: torch.nn.Module, groups: Iterable[dict[str, Any]] = ()) -> str:
    """SHA-256 over name, type, shape and bytes of every trained parameter.

    Args:
        model: its parameters that have requires_grad.
        groups: parameter groups of the optimizer, which count too: a method may train some of them now, others later.
    """
    held = {id(parameter) for group in groups for parameter in group["params"]}
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        if parameter.requires_grad or id(parameter) in held:
            flat = parameter.detach().to("cpu").contiguous().reshape(-1)
            digest.update(json.dumps([name, str(parameter.dtype), list(parameter.shape)]).encode())
            digest.update(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return f"sha256:{digest.hexdigest()}"


def publish(written: Path, target: Path) -> None:
    """Give a completely written folder its name; ``target`` is never seen with only some of its files."""
    with atomic.new_folder(target) as folder:
        for path in written.iterdir():
            os.replace(path, folder / path.name)
    # Nothing of worth is left in it; the next checkpoint begins by removing it.
    with suppress(OSError):
        shutil.rmtree(written.parent)


def prune(folder: Path, keep: int, protect: str | None = None) -> None:
    """Remove all but the newest ``keep`` checkpoints.

    Args:
        folder: the run's checkpoint folder.
        keep: how many to leave, at least one.
        protect: path of a checkpoint to leave whatever its age (the best one).
    """
    for path in checkpoints(folder)[: -max(keep, 1)]:
        if protect is None or path.resolve() != Path(protect).resolve():
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there, so that a kill half-way leaves nothing that looks like it."""
    hidden = path.with_name(f".{path.name}.removed")
    if hidden.exists():
        shutil.rmtree(hidden)
    if path.exists():
        os.replace(path, hidden)
        shutil.rmtree(hidden)


def set_aside(path: Path) -> Path:
    """Take the name of a checkpoint from a folder that is none any more; returns where it is now."""
    aside = path.with_name(f"{path.name}.torn")
    remove(aside)
    os.replace(path, aside)
    return aside


def sweep(folder: Path) -> None:
    """Remove what killed runs left behind in a folder: half-written and half-removed files and folders."""
    atomic.sweep(folder)
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        if path.name == WRITING or _REMOVED.fullmatch(path.name):
            shutil.rmtree(path)
