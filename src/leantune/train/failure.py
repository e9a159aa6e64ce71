"""A failing disk, told in one line: which file, what is still there, what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from leantune.core.errors import RunError, describe
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
        RunError: an OSError came out of the block.
    """
    try:
        yield
    except OSError as error:
        path = error.filename if isinstance(error.filename, (str, Path)) else str(folder)
        what = error.strerror or str(error) or type(error).__name__
        remedy = _REMEDY.get(error.errno or 0, "look at the disk and the path")
        raise RunError(
            describe(str(path), what, "a file system that reads and writes", remedy + _left(folder))
        ) from error


def _left(folder: Path) -> str:
    """What a failed run can go on from."""
    try:
        last = checkpoint.last_checkpoint(folder / CHECKPOINTS)
    except OSError:
        last = None
    if last is None:
        return ", then train again"
    return f", then: leantune train --resume {folder} (goes on from {last.name})"
