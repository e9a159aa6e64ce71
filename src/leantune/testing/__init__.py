"""The contract that every method keeps, offered to methods written elsewhere.

    from leantune.testing import check_method
    check_method(MyConfig, r=4)

runs every check on tiny models made in code (nothing is downloaded) and raises ``AssertionError`` with all that
failed. For pytest, parametrise over ``CHECKS`` and call ``check(subject(MyConfig))``; a check that does not apply, by
a fact that the method states, raises :class:`NotApplicable`.
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from leantune import methods
from leantune.core.errors import MethodError, describe
from leantune.testing import adapter, beginning, file, forward, weight
from leantune.testing.closeness import assert_close, assert_differs, assert_same, assert_same_state
from leantune.testing.model import FAMILIES
from leantune.testing.subject import NotApplicable, Subject, only_when

Check = Callable[[Subject], None]


def _with_gaps(check: Check) -> Check:
    """The check, let off where the method names it among its gaps."""

    @functools.wraps(check)
    def checked(subject: Subject) -> None:
        only_when(check.__name__ not in subject.method.gaps, subject.method.gaps.get(check.__name__, ""))
        check(subject)

    return checked


_ALL = [*forward.CHECKS, *weight.CHECKS, *adapter.CHECKS, *file.CHECKS, *beginning.CHECKS]
CHECKS: list[Check] = [_with_gaps(check) for check in _ALL]
"""Every check of the contract; its name says what holds, its docstring how."""


def subject(config: type | str, family: str = "llama", **options: Any) -> Subject:
    """The subject of a check: a registered method, named by its config class or its own name, with its options.

    Raises:
        MethodError: the method is not registered.
    """
    if isinstance(config, str):
        return Subject(methods.get(config), options, family)
    found = [methods.get(name) for name in methods.names() if methods.get(name).config is config]
    if found:
        # Of a method and its presets the method itself.
        return Subject(min(found, key=lambda method: len(method.options)), options, family)
    raise MethodError(
        describe(
            config.__name__,
            "belongs to no registered method",
            "a Method with this config",
            "call register(Method(...))",
        )
    )


def _where(check: Check, error: Exception) -> str:
    """File and line of the check's own code that failed, not of what it called."""
    file_name = inspect.unwrap(check).__code__.co_filename
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file_name]
    return f"{Path(file_name).name}:{frames[-1].lineno}" if frames else check.__name__


def check_method(config: type | str, *, families: Iterable[str] = FAMILIES, **options: Any) -> dict[str, str]:
    """Run the whole contract on a registered method.

    Args:
        config: its config class, or its name.
        families: the tiny language models to use.
        options: options of the config, beside the method's ``toy_options``.

    Returns:
        ``"family: check"`` -> ``"passed"``, or the fact by which the check does not apply.

    Raises:
        AssertionError: a check failed, or raised anything; every failure is told, with the line where it happened.
    """
    results: dict[str, str] = {}
    failures = []
    for family in families:
        tested = subject(config, family, **options)
        for check in CHECKS:
            title = f"{family}: {check.__name__}"
            try:
                check(tested)
            except NotApplicable as fact:
                results[title] = f"does not apply: {fact}"
            except Exception as error:
                failures.append(f"  - {title}: {type(error).__name__}: {error} ({_where(check, error)})")
            else:
                results[title] = "passed"
    if failures:
        name = subject(config).method.name
        raise AssertionError(f"method '{name}': {len(failures)} checks failed\n" + "\n".join(failures))
    return results


__all__ = [
    "CHECKS",
    "FAMILIES",
    "Check",
    "NotApplicable",
    "Subject",
    "assert_close",
    "assert_differs",
    "assert_same",
    "assert_same_state",
    "check_method",
    "subject",
]
