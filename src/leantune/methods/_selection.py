"""From a budget to rows and columns: how many heads and channels of each block train, and which ones."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from leantune.kernels.partial_linear import Axis
from leantune.methods.structure import Part, Structure

Selection = Literal["random", "weight", "activation", "product", "gradient"]
Order = Literal["largest", "smallest"]
Coupling = Literal["shared", "independent"]
Measure = Literal["weight", "activation", "gradient"]

SELECTIONS: tuple[Selection, ...] = ("random", "weight", "activation", "product", "gradient")
CALIBRATED: tuple[Selection, ...] = ("activation", "product", "gradient")
"""The selections that a forward, or a forward and a backward, over calibration rows decides."""

Squares = Callable[[Measure, str, Axis], Tensor]
"""``(measure, module path, axis)`` -> the sum of squares of each entry along the axis, float64 ``(entries,)``:

- weight: of the columns ("in") or rows ("out") of ``W (out, in)``;
- activation: of the module's input ("in") or output ("out"), over the calibration tokens;
- gradient: of the columns or rows of ``dL/dW``, ``L`` the loss over all calibration rows.
"""


@dataclass(frozen=True)
class Slice:
    """What trains of one module: input columns ("in") or output rows ("out") at the entries ``index``.

    ``index`` counts in the layout of the checkpoint; ``standing`` says where each entry of the whole axis stands now,
    ``(entries,)``, when the base has been permuted, and is None in the checkpoint's own layout. A provisional slice
    holds the place of one that calibration rows will choose.
    """

    axis: Axis
    index: Tensor
    standing: Tensor | None = None
    provisional: bool = False


@dataclass(frozen=True)
class Budget:
    """How much of each block trains; see ``S2FTConfig`` for the meaning of the four."""

    ratio: float | None = None
    heads: int | None = None
    channels: int | None = None
    match_lora_rank: int | None = None

    def parameters(self, modules: dict[str, tuple[int, int]]) -> float:
        """Parameters that the targeted ``modules`` (path -> (out, in)) of one block may train."""
        if self.match_lora_rank is not None:
            return float(sum(self.match_lora_rank * (out + width) for out, width in modules.values()))
        assert self.ratio is not None, "Budget: ratio is missing; the config sets exactly one way"
        return self.ratio * sum(out * width for out, width in modules.values())


def targeted(structure: Structure, targets: Iterable[str], *, whole_groups: bool = False) -> Structure:
    """The structure with the parts of the targeted modules alone.

    Args:
        structure: all parts.
        targets: paths of the modules that train.
        whole_groups: choose by whole key/value groups although only query heads train.
    """
    wanted = set(targets)
    parts = tuple(part for part in structure.parts if part.module in wanted)
    return replace(structure, parts=parts, whole_groups=structure.choices if whole_groups else None)


def side_count(side: Structure, number: int) -> int:
    """How many things of one side hold ``number`` heads or channels: groups are chosen whole."""
    units = side.choices
    group = side.units // units
    return min(-(-number // group), units)


def _cost(halves: Iterable[Structure], number: int) -> int:
    """Parameters that train when ``number`` heads or channels are chosen on each side."""
    total = 0
    for side in halves:
        units = side.choices
        per_thing = sum(part.unit_parameters * (part.units // units) for part in side.parts)
        total += side_count(side, number) * per_thing
    return total


def _most(halves: list[Structure], budget: float) -> int:
    """The largest number of heads or channels whose cost stays within the budget."""
    units = halves[0].units
    return bisect.bisect_right(range(1, units + 1), budget, key=lambda number: _cost(halves, number))


def count_units(
    halves: dict[str, list[Structure]], budget: Budget, modules: dict[str, tuple[int, int]]
) -> dict[str, int]:
    """How many heads and channels of one block train.

    Attention gets as many whole heads as fit into half of the budget, the channels get the rest; when no head fits,
    all of it goes to the channels. At least one unit of the block trains.

    Args:
        halves: kind ("attention", "ffn") -> the sides that choose, targeted parts only (see :func:`sides`).
        budget: the budget.
        modules: the targeted modules of these structures, path -> (out, in).

    Returns:
        ``{"attention": query heads, "ffn": channels}`` for the kinds that are there.
    """
    if budget.heads is not None or budget.channels is not None:
        explicit = {"attention": budget.heads or 0, "ffn": budget.channels or 0}
        return {kind: min(explicit[kind], sides_of[0].units) for kind, sides_of in halves.items()}
    left = budget.parameters(modules)
    counts: dict[str, int] = {}
    attention, ffn = halves.get("attention"), halves.get("ffn")
    if attention:
        counts["attention"] = _most(attention, left / 2) if ffn else max(_most(attention, left), 1)
        left -= _cost(attention, counts["attention"])
    if ffn:
        channels = _most(ffn, left)
        counts["ffn"] = channels if counts.get("attention") else max(channels, 1)
    return counts


def plain_channels(part: Part, budget: Budget) -> int:
    """How many input columns of a layer of no known structure train: its own share, at least one, at most all."""
    if budget.heads is not None or budget.channels is not None:
        return min(budget.channels or 0, part.units)
    shape = {part.module: (part.width, part.units)}
    return max(1, min(int(budget.parameters(shape) // part.width), part.units))


def seeded(*words: object) -> torch.Generator:
    """A CPU generator seeded by the words, the same on every machine and in every process."""
    digest = hashlib.sha256("/".join(str(word) for word in words).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _norms(measure: Measure, structure: Structure, whole: Structure, squares: Squares) -> Tensor:
    """Euclidean norm of each choosable thing by one measure, ``(choices,)``."""
    units = structure.choices
    parts = structure.parts
    if measure == "activation":
        # What flows between both sides of a structure is the input of its output side, whether that trains or not.
        parts = tuple(part for part in whole.parts if part.axis == "in") or parts
    total = torch.zeros(units, dtype=torch.float64)
    for part in parts:
        used = squares(measure, part.module, part.axis)[entries(part, torch.arange(units), units)]
        total += used.view(units, -1).sum(1)
    return total.sqrt()


def unit_scores(structure: Structure, whole: Structure, selection: Selection, squares: Squares) -> Tensor:
    """The score of each head, group or channel, float64 ``(choices,)``; arguments as :func:`choose_units`.

    With ``W_u`` the weights of unit ``u`` in all targeted parts, ``a_u(t)`` the part of the structure's activation
    that belongs to it, at token ``t``, and ``L`` the loss::

        weight     ||W_u||                         product   ||W_u|| sqrt(sum_t ||a_u(t)||^2)
        activation sqrt(sum_t ||a_u(t)||^2)        gradient  ||dL/dW_u||
    """
    if selection == "product":
        return _norms("weight", structure, whole, squares) * _norms("activation", structure, whole, squares)
    if selection == "random":
        raise AssertionError("a random choice has no scores")
    return _norms(selection, structure, whole, squares)


def choose_units(
    structure: Structure,
    count: int,
    *,
    side: str,
    selection: Selection,
    order: Order,
    seed: int,
    squares: Squares,
    whole: Structure | None = None,
) -> Tensor:
    """Choose ``count`` of the structure's heads, groups or channels, sorted, int64 ``(count,)``.

    Args:
        structure: targeted parts only.
        count: how many.
        side: enters the seed, so that the two sides of an independent coupling draw apart.
        selection: "random" draws uniformly, the others rank by :func:`unit_scores`.
        order: which end of the ranking, "largest" or "smallest".
        seed: of the random draw, together with the block's path.
        squares: what a ranking is made from.
        whole: the structure with all its parts; default: there are no others.
    """
    units = structure.choices
    if selection == "random":
        drawn = torch.randperm(units, generator=seeded(seed, structure.block, structure.kind, side))[:count]
        return drawn.sort().values
    scores = unit_scores(structure, whole or structure, selection, squares)
    ranked = scores.sort(descending=order == "largest", stable=True).indices
    return ranked[:count].sort().values


def entries(part: Part, chosen: Tensor, units: int) -> Tensor:
    """The entries of ``part`` that belong to the ``chosen`` of ``units`` things, int64."""
    return part.entries(chosen, units)


def sides(structure: Structure, coupling: Coupling) -> dict[str, Structure]:
    """The parts that choose together: all of them, or the inward (rows) and outward (columns) side apart."""
    if coupling == "shared" or structure.kind == "plain":
        return {"both": structure} if structure.parts else {}
    axes: dict[str, Axis] = {"inward": "out", "outward": "in"}
    split = {
        side: replace(structure, parts=tuple(part for part in structure.parts if part.axis == axis))
        for side, axis in axes.items()
    }
    return {side: half for side, half in split.items() if half.parts}
