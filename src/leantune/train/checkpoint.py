"""Checkpoints that are whole or not there.

The trainer writes a checkpoint file by file. It does so in a folder that no reader looks at; when all files are on
the disk the folder gets its name in one rename. An old checkpoint loses its name before its files are removed.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from leantune.core import atomic

WRITING = ".writing"
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFT_OVER = re.compile(r"\..+\.(tmp-\d+|removed)")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run's checkpoint folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def publish(written: Path, target: Path) -> None:
    """Give a completely written folder its name; ``target`` is never seen with only some of its files."""
    with atomic.new_folder(target) as folder:
        for path in written.iterdir():
            os.replace(path, folder / path.name)
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
    """Remove a folder so that a kill half-way leaves nothing that looks like it."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    if path.exists():
        os.replace(path, hidden)
        shutil.rmtree(hidden)


def sweep(folder: Path) -> None:
    """Remove what killed runs left behind in a folder: half-written and half-removed files and folders."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name == WRITING or _LEFT_OVER.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
