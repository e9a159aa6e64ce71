"""The choice of a model, block by block: which entries of which modules train, and in which order they would stand."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leantune.methods import _selection as selecting
from leantune.methods._permutation import Layout, structure_layout, unit_order
from leantune.methods.structure import HeadLayout, Structure, find_structures


@dataclass
class Choice:
    """What trains.

    Attributes:
        index: module path -> chosen entries, in pieces; a fused layer has one for each of its parts.
        layout: the order of rows and columns that puts the chosen units first; empty unless it was asked for.
    """

    index: dict[str, list[selecting.Slice]] = field(default_factory=dict)
    layout: Layout = field(default_factory=dict)

    def slices(self) -> dict[str, selecting.Slice]:
        """Module path -> its slice, entries sorted."""
        return {
            path: selecting.Slice(pieces[0].axis, torch.cat([piece.index for piece in pieces]).sort().values)
            for path, pieces in self.index.items()
        }


def choose(
    targets: set[str],
    config: Any,
    shapes: Mapping[str, tuple[int, int]],
    heads: HeadLayout | None,
    squares: selecting.Squares,
) -> Choice:
    """Choose heads and channels of every block; arguments as :func:`_choose_block`, ``heads`` from the config."""
    choice = Choice()
    structures = sorted(find_structures(shapes, heads), key=lambda each: each.block)
    for _, block in itertools.groupby(structures, key=lambda each: each.block):
        _choose_block(choice, list(block), targets, config, shapes, squares)
    return choice


def _choose_block(
    choice: Choice,
    structures: list[Structure],
    targets: set[str],
    config: Any,
    shapes: Mapping[str, tuple[int, int]],
    squares: selecting.Squares,
) -> None:
    """Add the heads and channels of one block to the choice.

    Args:
        choice: of the blocks before.
        structures: all structures of the block, with all their parts.
        targets: paths of the modules that train.
        config: budget, selection, order, coupling, seed and permute are read.
        shapes: path -> (out, in).
        squares: what a ranking is made from.
    """
    narrowed = {each.kind: selecting.targeted(each, targets, whole_groups=config.permute) for each in structures}
    halves = {kind: selecting.sides(each, config.coupling) for kind, each in narrowed.items() if each.parts}
    counts = _counts(narrowed, halves, config, shapes)
    for structure in structures:
        by_side: dict[str, Tensor] = {}
        for side, half in halves.get(structure.kind, {}).items():
            count = selecting.side_count(half, counts[structure.kind])
            if count == 0:
                continue
            chosen = selecting.choose_units(
                half,
                count,
                side=side,
                selection=config.selection,
                order=config.order,
                seed=config.seed,
                squares=squares,
                whole=structure,
            )
            by_side[side] = chosen
            for part in half.parts:
                index = selecting.entries(part, chosen, half.choices)
                choice.index.setdefault(part.module, []).append(selecting.Slice(part.axis, index))
        if config.permute and by_side and structure.kind != "plain":
            nothing = torch.empty(0, dtype=torch.int64)
            both = by_side.get("both", nothing)
            inward, outward = by_side.get("inward", both), by_side.get("outward", both)
            order = unit_order(inward, outward, structure.choices)
            choice.layout.update(structure_layout(structure, order, shapes))


def _counts(
    narrowed: dict[Any, Structure],
    halves: dict[Any, dict[str, Structure]],
    config: Any,
    shapes: Mapping[str, tuple[int, int]],
) -> dict[str, int]:
    if "plain" in halves:
        return {"plain": selecting.plain_channels(narrowed["plain"].parts[0], config.budget)}
    modules = {part.module: shapes[part.module] for each in narrowed.values() for part in each.parts}
    if not modules:
        return {}
    return selecting.count_units({kind: list(of.values()) for kind, of in halves.items()}, config.budget, modules)
