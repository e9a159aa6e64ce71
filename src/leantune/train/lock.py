"""One process at a time writes into a run folder: going on with a run that still runs would tear both."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import TracebackType

from leantune.core import atomic
from leantune.core.errors import RunError, describe

LOCK = ".lock"


class Lock:
    """A context in which a run folder can be taken; it is given back at the end.

    A lock of a process that is gone counts for nothing, nor does one of another machine: a preempted run goes on
    elsewhere.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._is_held = False

    def __enter__(self) -> Lock:
        return self

    def take(self) -> None:
        """Take the folder, which need not be there yet.

        Raises:
            RunError: a living process of this machine holds it.
        """
        path = self.folder / LOCK
        owner = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        if owner and atomic.is_running(owner):
            number = owner.partition("-")[0]
            got = f"process {number} is writing into it"
            do = f"wait for it, stop it (kill {number}), or choose another out"
            raise RunError(describe(str(self.folder), got, "a folder that no other run writes into", do))
        atomic.write_text(path, atomic.owner() + "\n")
        self._is_held = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_held:
            with suppress(OSError):
                (self.folder / LOCK).unlink(missing_ok=True)
