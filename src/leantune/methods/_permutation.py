"""Co-permutation: move the chosen units of a coupled structure to the front of every layer that has them.

S2FT, section 3.2 and Figure 3: rows of the layers that feed an activation and columns of the layer that reads it can
be reordered alike; only the order of the activation between them changes, not the function. The chosen entries then
are one run instead of a gather. Order of units: those chosen on the inward side alone, on both, on the outward side
alone, and the rest, so that each side's choice is contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from leantune.core import packed_weight
from leantune.core.errors import TargetError, describe
from leantune.kernels.partial_linear import Axis
from leantune.methods._selection import Slice, entries
from leantune.methods.structure import Structure

Layout = dict[str, dict[Axis, Tensor]]
"""Module path -> axis -> order: entry ``i`` of the permuted layer is entry ``order[i]`` of the original."""


def unit_order(inward: Tensor, outward: Tensor, choices: int) -> Tensor:
    """The order of a structure's units, a permutation of ``range(choices)``, int64."""
    here, there = set(inward.tolist()), set(outward.tolist())
    blocks = (here - there, here & there, there - here, set(range(choices)) - here - there)
    return torch.tensor([unit for block in blocks for unit in sorted(block)], dtype=torch.int64)


def structure_layout(structure: Structure, order: Tensor, shapes: Mapping[str, tuple[int, int]]) -> Layout:
    """The order of rows and columns of all modules of a structure, given the order of its units.

    Args:
        structure: with all its parts, whether they train or not.
        order: permutation of its heads, key/value groups or channels, ``(choices,)``.
        shapes: path -> (out, in).
    """
    layout: Layout = {}
    for part in structure.parts:
        length = shapes[part.module][1 if part.axis == "in" else 0]
        axes = layout.setdefault(part.module, {})
        whole = axes.setdefault(part.axis, torch.arange(length))
        places = entries(part, torch.arange(structure.choices), structure.choices)
        whole[places] = entries(part, order, structure.choices)
    return layout


def same_layout(one: Layout, other: Layout) -> bool:
    """Whether both put every row and column in the same place."""
    flat = [
        {(path, axis): order for path, axes in each.items() for axis, order in axes.items()} for each in (one, other)
    ]
    return flat[0].keys() == flat[1].keys() and all(torch.equal(order, flat[1][key]) for key, order in flat[0].items())


def require_dense(path: str, module: nn.Module) -> None:
    """Raise TargetError for a quantised layer: its packed blocks cannot be reordered without loss."""
    weight = module.weight
    # torchao's packed weights call themselves parameters of the dtype that they stand for.
    is_dense = isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.dim() == 2
    if packed_weight.is_packed(module) or not is_dense:
        got = f"{path} ({type(module).__name__}) holds a quantised weight"
        raise TargetError(describe("permute", got, "a dense base", "permute=False"))


def reorder(module: nn.Module, axis: Axis, order: Tensor) -> None:
    """Put the rows ("out", with the bias) or columns ("in") of a dense linear layer in ``order``, in place.

    The layer must be one that :func:`require_dense` lets pass.
    """
    weight = cast(nn.Parameter, module.weight)
    dim = 1 if axis == "in" else 0
    order = order.to(weight.device)
    with torch.no_grad():
        weight.copy_(weight.index_select(1 - dim if isinstance(module, Conv1D) else dim, order))
        bias = getattr(module, "bias", None)
        if axis == "out" and isinstance(bias, Tensor):
            bias.copy_(bias.index_select(0, order))


class BasePermutation:
    """The order in which the rows and columns of one base model stand now; at first the checkpoint's."""

    def __init__(self) -> None:
        self.layout: Layout = {}

    def apply(self, layers: Mapping[str, nn.Module], layout: Layout, *, occupied: bool) -> None:
        """Permute the base.

        Args:
            layers: path -> base layer.
            layout: the wanted order.
            occupied: other adapters stand on this base already, and count on its order.

        Raises:
            TargetError: the base is permuted otherwise, occupied, or quantised; nothing has been changed.
        """
        if same_layout(layout, self.layout):
            # A further adapter with the same choice, as a reference model's, finds the base as it needs it; and a
            # model of plain layers alone has no order that could matter.
            return
        if self.layout or occupied:
            permuted = "this base is permuted for another adapter"
            got = permuted if self.layout else "other adapters stand on this base, in its own order"
            raise TargetError(
                describe("permute", got, "one permutation a base, before other adapters", "permute=False")
            )
        for path in layout:
            require_dense(path, layers[path])
        for path, axes in layout.items():
            for axis, order in axes.items():
                reorder(layers[path], axis, order)
        self.layout = layout

    def undo(self, model: nn.Module) -> None:
        """Put the base's layers back into the checkpoint's order, bit for bit."""
        for path, axes in self.layout.items():
            for axis, order in axes.items():
                reorder(model.get_submodule(path), axis, order.argsort())
        self.layout = {}

    def original(self, path: str, weight: Tensor) -> Tensor:
        """The weight ``(out, in)`` of the layer at ``path`` in the checkpoint's order."""
        for axis, order in self.layout.get(path, {}).items():
            weight = weight.index_select(1 if axis == "in" else 0, order.argsort().to(weight.device))
        return weight

    def place(self, path: str, chosen: Slice) -> Slice:
        """Say where entries stand now, and list the chosen ones in that order."""
        order = self.layout.get(path, {}).get(chosen.axis)
        if order is None:
            return chosen
        standing = order.argsort()
        return replace(chosen, index=chosen.index[standing[chosen.index].argsort()], standing=standing)
