"""Rows of a file larger than memory: read, checked and encoded when they are needed, shuffled in a buffer.

    file -> rows -> buffer of shuffle_buffer rows, drawn at random -> encoded, a few at a time -> examples or packs

The stream does not end: after the last row the file is read again in another order, so that a run is as long as its
steps say. What it yields depends on the file and the seed alone, and a new iteration yields the same again, which is
how a resumed run finds its row. It holds ``shuffle_buffer`` rows, at most ``ENCODED_AT_ONCE`` examples and, when it
packs, ``PACKS_AT_ONCE`` packs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset

from leantune.core.errors import DataError, describe
from leantune.data.encoding import Encoded
from leantune.data.packing import DOCUMENTS, best_fit
from leantune.data.row import Row

ENCODED_AT_ONCE = 16
"""Rows given to the tokenizer in one call."""
PACKS_AT_ONCE = 16
"""Packs' worth of tokens among which rows are matched to each other."""

Numbered = tuple[int, Row]


def shuffled(rows: Iterable[Numbered], buffer: int, generator: random.Random) -> Iterator[Numbered]:
    """The rows in random order as far as a buffer allows: each one drawn makes room for the next one read.

    Args:
        rows: in file order.
        buffer: rows held; 1 keeps the file's order.
        generator: draws.
    """
    source = iter(rows)
    held = list(islice(source, buffer))
    for row in source:
        place = generator.randrange(len(held))
        drawn, held[place] = held[place], row
        yield drawn
        # No name may hold a row that is on its way.
        del drawn, row
    generator.shuffle(held)
    while held:
        yield held.pop()


class RowStream(IterableDataset[dict[str, Any]]):
    """The examples (or packs of them) of a file, without end.

    Args:
        rows: begins to read the file; called once a pass. It raises DataError at a bad row.
        encode: turns a few rows into examples; raises DataError for rows that cannot be trained on.
        shuffle_buffer: rows held to draw from.
        seed: of the order.
        pack_length: tokens of a pack; None yields single examples.
        source: the file's name, for errors.

    Attributes:
        rows_read: rows encoded since the iteration began.
        passes: times the file was read to its end.
        truncated: rows that were cut.
        tokens_cut: tokens cut from them.
    """

    def __init__(
        self,
        rows: Callable[[], Iterator[Row]],
        encode: Callable[[list[Row]], Encoded],
        *,
        shuffle_buffer: int,
        seed: int = 0,
        pack_length: int | None = None,
        source: str = "data",
    ) -> None:
        self._rows = rows
        self._encode = encode
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.pack_length = pack_length
        self.source = source
        self._begin()

    def _begin(self) -> None:
        self.rows_read = self.passes = self.truncated = self.tokens_cut = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._begin()
        return self._examples() if self.pack_length is None else self._packs(self.pack_length)

    def _examples(self) -> Iterator[dict[str, Any]]:
        for number in count():
            generator = random.Random(self.seed * 1_000_003 + number)
            before = self.rows_read
            drawn = shuffled(enumerate(self._rows()), self.shuffle_buffer, generator)
            while some := list(islice(drawn, ENCODED_AT_ONCE)):
                encoded = self._encode([row for _, row in some])
                numbers = [number for number, _ in some]
                some.clear()
                self.rows_read += len(encoded)
                self.truncated += encoded.truncated
                self.tokens_cut += encoded.tokens_cut
                yield from ({**example, "row": numbers[example["row"]]} for example in encoded.examples)
            if self.rows_read == before:
                raise DataError(describe(self.source, "no rows", "at least one row", "check how the file was written"))
            self.passes += 1

    def _packs(self, capacity: int) -> Iterator[dict[str, Any]]:
        """Packs by best fit among the next rows; the emptiest pack of them waits for the rows after these."""
        waiting: list[dict[str, Any]] = []
        examples = self._examples()
        for number in count():
            tokens = sum(len(example["input_ids"]) for example in waiting)
            while tokens < PACKS_AT_ONCE * capacity:
                waiting.append(next(examples))
                tokens += len(waiting[-1]["input_ids"])
            lengths = [len(example["input_ids"]) for example in waiting]
            packs = best_fit(lengths, capacity, self.seed + number)
            emptiest = min(range(len(packs)), key=lambda pack: sum(lengths[row] for row in packs[pack]))
            ready = [[waiting[row] for row in pack] for place, pack in enumerate(packs) if place != emptiest]
            waiting = [waiting[row] for row in packs[emptiest]]
            random.Random(self.seed + number).shuffle(ready)
            while ready:
                yield {DOCUMENTS: ready.pop()}
