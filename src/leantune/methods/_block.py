"""The choice of one block: which entries of which of its modules train, and in which order the block would stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leantune.methods import _selection as selecting
from leantune.methods._permutation import Layout, structure_layout, unit_order
from leantune.methods.structure import Structure


@dataclass
class BlockChoice:
    """What one block trains.

    Attributes:
        slices: module path and slice; a fused layer comes once for each of its parts.
        layout: the order of rows and columns that puts the chosen units first; empty unless it was asked for.
    """

    slices: list[tuple[str, selecting.Slice]] = field(default_factory=list)
    layout: Layout = field(default_factory=dict)


def choose_block(
    structures: list[Structure],
    targets: set[str],
    config: Any,
    shapes: Mapping[str, tuple[int, int]],
    weight_of: Callable[[str], Tensor],
) -> BlockChoice:
    """Choose heads and channels of one block.

    Args:
        structures: all structures of the block, with all their parts.
        targets: paths of the modules that train.
        config: budget, selection, order, coupling, seed and permute are read.
        shapes: path -> (out, in).
        weight_of: path -> weight (out, in), read by a choice by weight.
    """
    narrowed = {each.kind: selecting.targeted(each, targets, whole_groups=config.permute) for each in structures}
    halves = {kind: selecting.sides(each, config.coupling) for kind, each in narrowed.items() if each.parts}
    counts = _counts(narrowed, halves, config, shapes)
    block = BlockChoice()
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
                weight_of=weight_of,
            )
            by_side[side] = chosen
            for part in half.parts:
                index = selecting.entries(part, chosen, half.choices)
                block.slices.append((part.module, selecting.Slice(part.axis, index)))
        if config.permute and by_side and structure.kind != "plain":
            nothing = torch.empty(0, dtype=torch.int64)
            both = by_side.get("both", nothing)
            inward, outward = by_side.get("inward", both), by_side.get("outward", both)
            order = unit_order(inward, outward, structure.choices)
            block.layout.update(structure_layout(structure, order, shapes))
    return block


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
