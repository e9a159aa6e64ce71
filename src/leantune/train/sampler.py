"""Row order by length: batches of rows that are nearly equally long, in random order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

# Rows are sorted inside pools of this many batches: enough for even batches, few enough that rows meet new company
# in every epoch.
BATCHES_IN_POOL = 50


class LengthSampler(Sampler[int]):
    """Every row once an epoch; rows of a batch have similar lengths; the order depends on seed and epoch alone.

    The batch with the longest row comes first, so that a run that does not fit into memory fails at its start.

    Args:
        lengths: tokens of each row.
        batch_size: rows in a batch.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator)
        batches: list[torch.Tensor] = []
        for pool in shuffled.split(self.batch_size * BATCHES_IN_POOL):
            by_length = pool[self.lengths[pool].argsort(descending=True, stable=True)]
            batches += by_length.split(self.batch_size)
        # Only a batch in the last place may be short: the loader cuts the stream of rows, not our batches.
        tail = batches.pop() if batches and len(batches[-1]) < self.batch_size else None
        order = torch.randperm(len(batches), generator=generator).tolist()
        if order:
            longest = self._longest(batches)
            order.sort(key=lambda place: place != longest)
        ordered = [batches[place] for place in order] + ([tail] if tail is not None else [])
        return iter(torch.cat(ordered).tolist() if ordered else [])

    def _longest(self, batches: list[torch.Tensor]) -> int:
        return max(range(len(batches)), key=lambda place: int(self.lengths[batches[place]].max()))
