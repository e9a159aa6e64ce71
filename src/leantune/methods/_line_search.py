r"""How far to go along a direction: the scale of a finished booster, by a few evaluations of a loss.

``phi(s)`` is the loss with the booster at ``s`` times what was trained. The three points around the best one decide a
parabola, whose lowest point is tried next; where there is none, the golden section of the longer neighbouring interval
is, or twice a best point that stands at the right end. For a loss that is quadratic along the direction, such as least
squares, the first parabola is the loss itself and its lowest point the optimum. The scale returned is one that was
evaluated, so that it is never worse than ``s = 1`` on the batch that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

LARGEST = 4.0
EVALUATIONS = 6
_GOLDEN = (3 - math.sqrt(5)) / 2
_CLOSE = 1e-3


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        scale: the best one evaluated, in [0, ``LARGEST``].
        loss: there.
        loss_at_one: of the booster as it was trained.
        evaluations: how many losses were computed.
    """

    scale: float
    loss: float
    loss_at_one: float
    evaluations: int


def line_search(loss: Callable[[float], float], evaluations: int = EVALUATIONS, largest: float = LARGEST) -> Search:
    """The scale with the lowest loss found.

    Args:
        loss: of a scale; values that are not finite count as infinitely bad.
        evaluations: most losses to compute, at least 3.
        largest: no scale is above it.
    """
    known: dict[float, float] = {}

    def measure(scale: float) -> None:
        value = loss(scale)
        known[scale] = value if math.isfinite(value) else math.inf

    for scale in (1.0, 0.0, 2.0):
        measure(scale)
    while len(known) < evaluations:
        following = _next(sorted(known.items()), largest)
        if following is None:
            break
        measure(following)
    # Of equals the one nearest to what was trained.
    best = min(known, key=lambda scale: (known[scale], abs(scale - 1)))
    return Search(best, known[best], known[1.0], len(known))


def _next(points: list[tuple[float, float]], largest: float) -> float | None:
    """Where to look next, among points sorted by scale; None where nothing is left to find."""
    place = min(range(len(points)), key=lambda index: points[index][1])
    best = points[place][0]
    first = min(max(place - 1, 0), len(points) - 3)
    vertex = _vertex(points[first : first + 3])
    if vertex is not None:
        scale = min(max(vertex, 0.0), largest)
        # Where the parabola agrees with what is known, this is the place.
        return scale if min(abs(scale - other) for other, _ in points) > _CLOSE else None
    if place == len(points) - 1:
        return None if best >= largest else min(2 * best, largest)
    right = points[place + 1][0]
    left = points[place - 1][0] if place else best
    return best + _GOLDEN * (right - best if right - best >= best - left else left - best)


def _vertex(points: list[tuple[float, float]]) -> float | None:
    """The lowest point of the parabola through three points; None where it has none."""
    (a, fa), (b, fb), (c, fc) = points
    if not all(map(math.isfinite, (fa, fb, fc))):
        return None
    left, right = (fb - fa) / (b - a), (fc - fb) / (c - b)
    curvature = (right - left) / (c - a)
    return (a + b) / 2 - left / (2 * curvature) if curvature > 0 else None


@contextmanager
def scaled(boosters: Iterable[Any], scale: float) -> Iterator[None]:
    """Inside, the boosters in training are ``scale`` times what they are."""
    kept = [(own, own.scaling) for own in boosters]
    try:
        for own, scaling in kept:
            own.scaling = scaling * scale
        yield
    finally:
        for own, scaling in kept:
            own.scaling = scaling


def search_boosters(boosters: Iterable[Any], loss: Callable[[], float]) -> Search:
    """One scale for all boosters of a round.

    Args:
        boosters: those in training, with an attribute ``scaling``; left as they are.
        loss: of the model as it then stands.
    """
    trained = list(boosters)

    def at(scale: float) -> float:
        with scaled(trained, scale):
            return loss()

    return line_search(at)
