"""Several rows in one sequence, so that little of a batch is padding.

Rows are placed longest first, each into the pack whose room it fills best (best fit decreasing: at most 11/9 of the
fewest packs possible, and one more). Packs depend on the lengths and the seed alone, where the seed decides between
rows of equal length; they are made once, so that every epoch has the same number of steps, and only their order
changes from epoch to epoch. What keeps the rows of a pack apart is told by :class:`leantune.data.PackCollator`.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

DOCUMENTS = "documents"
"""Key of a pack's rows in an example, and of the row numbers of a packed batch."""


def best_fit(lengths: Sequence[int], capacity: int, seed: int = 0) -> list[list[int]]:
    """Place rows into packs of at most ``capacity`` tokens.

    Args:
        lengths: tokens of each row.
        capacity: tokens of a pack.
        seed: decides the order of rows of equal length.

    Returns:
        Packs as lists of row indices; every row is in one of them.

    Raises:
        ValueError: a row is longer than a pack.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda row: -lengths[row])
    if order and lengths[order[0]] > capacity:
        raise ValueError(f"a row of {lengths[order[0]]} tokens does not fit into a pack of {capacity}")
    packs: list[list[int]] = []
    # Packs by the room left in them, and the rooms there are, in order.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for row in order:
        length = lengths[row]
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            pack = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(row)
        left = room - length
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(pack)
    return packs


def padding_share(lengths: Sequence[int], batches: Iterable[Sequence[int]]) -> float:
    """Share of padding when each batch is as wide as its longest sequence.

    Args:
        lengths: tokens of each sequence.
        batches: indices of the sequences of each batch.
    """
    cells = tokens = 0
    for batch in batches:
        own = [lengths[index] for index in batch]
        cells += len(own) * max(own)
        tokens += sum(own)
    return 1 - tokens / cells if cells else 0.0


@dataclass
class Packs(Sequence[dict[str, Any]]):
    """A data set of packs: ``packs[i]["documents"]`` are the examples of pack ``i``.

    Attributes:
        examples: the rows, encoded.
        members: row indices of each pack.
        lengths: tokens of each pack.
        capacity: tokens that fit into one.
    """

    examples: Sequence[dict[str, Any]]
    members: list[list[int]]
    lengths: list[int]
    capacity: int

    @classmethod
    def of(cls, examples: Sequence[dict[str, Any]], capacity: int, seed: int = 0) -> Packs:
        """Pack examples; arguments as of :func:`best_fit`."""
        lengths = [len(example["input_ids"]) for example in examples]
        members = best_fit(lengths, capacity, seed)
        return cls(examples, members, [sum(lengths[row] for row in pack) for pack in members], capacity)

    @property
    def filled(self) -> float:
        """Share of the room in all packs that holds tokens."""
        return sum(self.lengths) / (len(self.lengths) * self.capacity) if self.lengths else 0.0

    def __len__(self) -> int:
        return len(self.members)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return {DOCUMENTS: [self.examples[row] for row in self.members[index]]}
