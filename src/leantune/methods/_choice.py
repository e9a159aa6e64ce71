"""The choice of a model, block by block: which entries of which modules train, and in which order they would stand."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from leantune.core.errors import TargetError, describe
from leantune.methods import _selection as selecting
from leantune.methods._permutation import Layout, structure_layout, unit_order
from leantune.methods.structure import Structure


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
    structures: Iterable[Structure],
    squares: selecting.Squares,
) -> Choice:
    """Choose heads and channels of every block.

    Args:
        targets: as for :func:`_choose_block`, like all that is not said here.
        config: see there.
        shapes: see there.
        structures: of the whole model.
        squares: see there.

    Raises:
        TargetError: the base is to be permuted, and units of a structure cannot be reordered.
    """
    choice = Choice()
    structures = sorted(structures, key=lambda each: each.block)
    # In a chain of layers one can be the output side of a structure and the input side of the next. It trains once.
    reads = {part.module for each in structures for part in each.parts if part.axis == "in" and part.module in targets}
    for _, block in itertools.groupby(structures, key=lambda each: each.block):
        _choose_block(choice, list(block), targets, reads, config, shapes, squares)
    return choice


def _narrowed(structure: Structure, targets: set[str], reads: set[str], *, whole_groups: bool) -> Structure:
    targeted = selecting.targeted(structure, targets, whole_groups=whole_groups)
    return replace(
        targeted, parts=tuple(part for part in targeted.parts if part.axis == "in" or part.module not in reads)
    )


def _require_permutable(structure: Structure) -> None:
    if not structure.permutable:
        got = "something outside of its layers (a bias of position, a norm by channel, a kernel) belongs to each unit"
        raise TargetError(
            describe("permute", f"{structure.block} ({structure.kind}): {got}", "units in any order", "permute=False")
        )


def _choose_block(
    choice: Choice,
    structures: list[Structure],
    targets: set[str],
    reads: set[str],
    config: Any,
    shapes: Mapping[str, tuple[int, int]],
    squares: selecting.Squares,
) -> None:
    """Add the heads and channels of one block to the choice.

    Args:
        choice: of the blocks before.
        structures: all structures of the block, with all their parts.
        targets: paths of the modules that train.
        reads: those of them that are the output side of some structure.
        config: budget, selection, order, coupling, seed and permute are read.
        shapes: path -> (out, in).
        squares: what a ranking is made from.
    """
    narrowed = {
        each.kind: _narrowed(each, targets, reads, whole_groups=config.permute and each.permutable)
        for each in structures
    }
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
            _require_permutable(structure)
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
