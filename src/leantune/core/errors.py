"""One way to say that something is wrong: ``<where>: <got>; <wanted>; <do this>``.

Every error that a user can cause is a :class:`LeantuneError` whose text names the place, what stood there,
what was wanted and what to do. Several problems of one file or one config are reported together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LeantuneError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(LeantuneError, ValueError):
    """A run configuration, recipe or command-line flag is wrong. (A ValueError too, for hosts that catch those.)"""


class DataError(LeantuneError):
    """A data file or row is wrong."""


class ModelError(LeantuneError):
    """A base model cannot be found, read or used."""


class TargetError(LeantuneError, ValueError):
    """The modules a method was asked to train are not there, or do not fit it. (A ValueError too, as in PEFT.)"""


class AdapterError(LeantuneError):
    """An adapter folder, file or state is wrong."""


class ParityError(LeantuneError):
    """A merged, exported or reloaded model does not behave as the trained one."""


class MethodError(LeantuneError):
    """A method is unknown, or refuses what it was asked to do."""


class HubError(LeantuneError):
    """The Hugging Face Hub cannot be reached, or refuses."""


class RunError(LeantuneError):
    """A run folder is missing, occupied, incomplete or torn."""


class DependencyError(LeantuneError):
    """An optional package is needed and not installed."""


def describe(where: str, got: str, wanted: str, do: str) -> str:
    """The one form of an error text: ``where: got; wanted; do``.

    Args:
        where: the path, row, field or module that is wrong.
        got: what stands there.
        wanted: what should stand there.
        do: the next thing the reader can type or change.
    """
    return f"{where}: {got}; {wanted}; {do}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the nearest known name, else the list of the known names."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return "known: " + ", ".join(names) if names else "none is known"


def raise_all(problems: list[str], error: type[LeantuneError]) -> None:
    """Raise ``error`` with every problem on a line of its own; do nothing when there is none."""
    if not problems:
        return
    if len(problems) == 1:
        raise error(problems[0])
    raise error(f"{len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems))


def require(module: str, extra: str) -> None:
    """Check that an optional package is importable.

    Args:
        module: top-level package name, e.g. ``"sacrebleu"``.
        extra: the extra of leantune that installs it, e.g. ``"eval"``.

    Raises:
        DependencyError: it is not installed.
    """
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise DependencyError(
            describe(module, "not installed", "needed for this command", f"pip install 'leantune[{extra}]'")
        )
