"""Lines typed into a chat, or piped into it."""

from __future__ import annotations

import sys
from contextlib import suppress

QUOTES = '"""'


def is_interactive() -> bool:
    """Whether a person types: both ends are a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def enable_editing() -> None:
    """Arrow keys and history in ``input``, where the platform has them."""
    with suppress(ImportError):
        import readline

        # A pasted tab is text, not a request to complete a file name.
        readline.parse_and_bind("tab: self-insert")


def read_entry(*, prompts: bool) -> str | None:
    """The next entry: a line; lines joined by trailing backslashes; or what stands between triple quotes.

    Args:
        prompts: show what to type at.

    Returns:
        The text, or None when the input has ended.
    """
    line = _line("> " if prompts else "")
    if line is None:
        return None
    if line.lstrip().startswith(QUOTES):
        return _quoted(line.lstrip().removeprefix(QUOTES), prompts)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        more = _line(". " if prompts else "")
        if more is None:
            break
        lines.append(more)
    return "\n".join(lines)


def _quoted(first: str, prompts: bool) -> str:
    lines = [first]
    while not lines[-1].rstrip().endswith(QUOTES):
        more = _line(". " if prompts else "")
        if more is None:
            break
        lines.append(more)
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines).strip("\n")


def _line(prompt: str) -> str | None:
    try:
        if prompt:
            return input(prompt)
        text = sys.stdin.readline()
    except EOFError:
        return None
    return text.removesuffix("\n").removesuffix("\r") if text else None
