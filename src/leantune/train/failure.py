"""A failing disk, told in one line: which file, what is still there, what to do."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from leantune.core.atomic import naming
from leantune.core.errors import LeantuneError, RunError, describe
from leantune.train import checkpoint
from leantune.train.folder import CHECKPOINTS

_REMEDY = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, the quota is used up",
    errno.EACCES: "allow writing there",
    errno.EPERM: "allow writing there",
    errno.EROFS: "choose a place that can be written to",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "choose a shorter path",
}


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Turn an error of the system into a :class:`RunError` that says what is left of the run.

    Args:
        folder: the run folder.

    Raises:
        RunError: an OSError, or a JSON file that cannot be read, came out of the block.
    """
    try:
        yield
    except OSError as error:
        path = error.filename if isinstance(error.filename, (str, Path)) else str(folder)
        what = error.strerror or str(error) or type(error).__name__
        remedy = _REMEDY.get(error.errno or 0, "look at the disk and the path")
        raise RunError(describe(str(path), what, "a disk that reads and writes", remedy + _left(folder))) from error
    except json.JSONDecodeError as error:
        got = f"a JSON file in it cannot be read ({error})"
        raise RunError(describe(str(folder), got, "whole files", "look at the disk" + _left(folder))) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a reader of torch's files raises into a :class:`RunError` of one line.

    Args:
        path: the checkpoint being read.

    Raises:
        RunError: it cannot be read.
    """
    try:
        with naming(path):
            yield
    except (OSError, LeantuneError):
        raise
    except Exception as error:
        got = f"cannot be read ({type(error).__name__})"
        do = "look at the disk, then resume again; without this folder the run goes on from the checkpoint before"
        raise RunError(describe(str(path), got, "a checkpoint as it was written", do)) from error


def _left(folder: Path) -> str:
    """What a failed run can go on from."""
    try:
        last = checkpoint.last_checkpoint(folder / CHECKPOINTS)
    except OSError:
        last = None
    if last is None:
        return ", then train again"
    return f", then: leantune train --resume {folder} (goes on from {last.name})"
