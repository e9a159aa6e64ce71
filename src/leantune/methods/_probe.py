"""What the entries of an activation depend on: a few backwards over the graph between two layers of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from leantune.methods._cut_graph import Activation, CutGraph, flat
from leantune.methods._pattern import Rows

MAX_UNITS = 1024
"""More heads than any model has; a guess beyond that is not tried."""


@dataclass(frozen=True)
class Between:
    """One activation with the layers on both sides."""

    graph: CutGraph
    readers: Activation
    producers: tuple[str, ...]

    @property
    def read(self) -> Tensor:
        """The activation, as its first reader got it first."""
        return self.graph.reads[self.readers[0]][0]

    @property
    def columns(self) -> int:
        """How many entries it has."""
        return self.read.shape[self.graph.dims[self.readers[0]]]

    def met(self, columns: Tensor, position: int | None = None) -> dict[str, Tensor]:
        """Producer -> which entries of its output the columns depend on, bool ``(positions, entries)``.

        Args:
            columns: bool ``(columns,)``.
            position: look from this position of the activation alone.
        """
        read, dim = self.read, self.graph.dims[self.readers[0]]
        noise = torch.randn(read.shape, generator=torch.Generator().manual_seed(20240720))
        pull = flat(noise, dim) * columns
        if position is not None:
            pull = pull * (torch.arange(len(pull)) == position)[:, None]
        moved = read.movedim(dim, -1)
        leaves = [(path, leaf) for path in self.producers for leaf in self.graph.leaves[path]]
        found = torch.autograd.grad(
            moved, [leaf for _, leaf in leaves], pull.view(moved.shape), retain_graph=True, allow_unused=True
        )
        result: dict[str, Tensor] = {}
        for (path, _), gradient in zip(leaves, found, strict=True):
            if gradient is None:
                continue
            here = flat(gradient, self.graph.dims[path]) != 0
            known = result.get(path)
            result[path] = here if known is None or known.shape != here.shape else known | here
        return result

    def entries(self, columns: Tensor) -> dict[str, Tensor]:
        """As :meth:`met`, at any position: bool ``(entries,)``."""
        return {path: met.any(0) for path, met in self.met(columns).items()}


def _one_to_one(between: Between) -> dict[str, Tensor]:
    """Producer -> the only column each row meets, int64; -1 for a row that meets several, or none."""
    numbers = torch.arange(between.columns)
    column: dict[str, Tensor] = {}
    clear: dict[str, Tensor] = {}
    for bit in range((between.columns - 1).bit_length()):
        is_set = (numbers >> bit & 1).bool()
        ones, zeros = between.entries(is_set), between.entries(~is_set)
        for path in ones:
            column[path] = column.get(path, 0) + (ones[path].long() << bit)
            clear[path] = clear.get(path, True) & (ones[path] ^ zeros[path])
    return {path: torch.where(clear[path], column[path], -1) for path in column}


def _by_unit(between: Between, size: int) -> dict[str, Tensor] | None:
    """Producer -> which units of ``size`` columns each row meets, bool ``(units, entries)``."""
    units = between.columns // size
    met = [between.entries(torch.arange(between.columns) // size == unit) for unit in range(units)]
    if any(each.keys() != met[0].keys() for each in met):
        return None
    return {path: torch.stack([each[path] for each in met]) for path in met[0]}


def _sizes(between: Between, local: Mapping[str, Tensor], single: Mapping[str, Tensor], hint: int | None) -> list[int]:
    """Sizes that a unit could have, likely ones first."""
    columns = between.columns
    first = between.entries(torch.arange(columns) == 0)
    guesses = [int((first[path] & local[path] & (single[path] < 0)).sum()) for path in first]
    guesses += [columns // len(single[path]) for path in single] + [hint or 0]
    usable = [size for size in guesses if 1 < size < columns and columns % size == 0 and columns // size <= MAX_UNITS]
    return list(dict.fromkeys(usable))


def rows_between(between: Between, hint: int | None) -> tuple[int, dict[str, Rows]] | None:
    """The size of a unit in columns, and what each producer's rows are; None when no regular units are found."""
    everything = torch.ones(between.columns, dtype=torch.bool)
    single = _one_to_one(between)
    if set(single) != set(between.producers):
        return None
    if all((column >= 0).all() for column in single.values()):
        return 1, {path: Rows.channels(column) for path, column in single.items()}
    # The last position of the first row: under a causal mask it reads all positions of that row.
    positions = flat(between.read, between.graph.dims[between.readers[0]]).shape[0]
    position = positions // 2 - 1
    local: dict[str, Tensor] = {}
    for path, met in between.met(everything, position).items():
        elsewhere = torch.arange(len(met)) != position
        local[path] = ~met[elsewhere].any(0) if len(met) == positions else torch.zeros(met.shape[1], dtype=torch.bool)
    for size in _sizes(between, local, single, hint):
        units = _by_unit(between, size)
        if units is None:
            continue
        is_first = torch.arange(between.columns) % size == 0
        some, others = between.entries(is_first), between.entries(~is_first)
        rows = {
            path: Rows.of(units[path], local=local[path], dense=some[path] & others[path]) for path in between.producers
        }
        found = {path: each for path, each in rows.items() if each is not None}
        if len(found) == len(rows) and any((each.spread == 1).any() for each in found.values()):
            return size, found
    return None
