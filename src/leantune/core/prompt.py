"""Where the prompts of a batch end, told to a method that must know during a forward which is given no labels.

A training loop that forms the loss itself takes the labels away from the model; so does an evaluation. A method that
acts at the positions of the prompt alone (LoReFT) asks here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token

from torch import Tensor

IGNORED = -100
"""Label of a token that carries no loss."""

_LABELS: ContextVar[Tensor | None] = ContextVar("labels", default=None)


def tell(labels: Tensor) -> Token[Tensor | None]:
    """From now on a row's prompt ends before its first token with a loss; what :func:`forget` takes.

    Args:
        labels: ``(rows, length)``, aligned with the input tokens.
    """
    return _LABELS.set(labels)


def forget(token: Token[Tensor | None]) -> None:
    """What was told before counts again."""
    _LABELS.reset(token)


@contextmanager
def told_by(labels: Tensor | None) -> Iterator[None]:
    """Inside, the labels tell (see :func:`tell`); None leaves what was told outside."""
    if labels is None:
        yield
        return
    token = tell(labels)
    try:
        yield
    finally:
        forget(token)


def prompt_lengths(real: Tensor) -> Tensor:
    """How many tokens each row's prompt has, ``(rows,)``.

    All of the row's real tokens where nothing was told, where a row has no loss, and where a row has loss from its
    first predicted token on (plain text, in which nothing is a prompt).

    Args:
        real: ``(rows, length)`` bool, which tokens are no padding.
    """
    whole = real.sum(1)
    labels = _LABELS.get()
    if labels is None or labels.shape != real.shape:
        return whole
    lossy = labels.to(real.device) != IGNORED
    before = (real & (lossy.cumsum(1) == 0)).sum(1)
    return before.where(lossy.any(1) & (before > 1), whole)
