r"""Coupled structures of any model, found by what depends on what: S2FT, section 3.1, equations 1 and 2.

``_cut_graph`` says which layers contribute to one activation alone, and which activation reads nothing else. Between
them, ``dA[c] / dY[r]`` (entry ``r`` of a layer's output, entry ``c`` of the activation) is zero where they do not
meet, exactly, in any arithmetic: a zero cotangent times a finite number. Its pattern is read from a few backwards:

- one for each bit of a column's number and each value of it. A row met by one value of every bit meets one column:
  a channel. ``2 log2 n`` backwards prove it for all ``n``.
- else one for each run of ``d`` columns, with ``d`` as the rows suggest: units are heads, and a row that meets
  several neighbouring runs belongs to a group (a key/value head).
- one at a single position, which tells query (needed there) from key and value (needed from other positions), and
  one over every unit's first column, which tells value (entry by entry) from key.

Blocks that repeat are traced once; each further one is checked by a single backward from half of its units.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from leantune.methods._cut_graph import CutGraph, cut_graph, is_convolution
from leantune.methods._example import Example
from leantune.methods._pattern import parts_of_rows
from leantune.methods._probe import Between, rows_between
from leantune.methods.structure import Kind, Part, Role, Structure


def _structure(
    between: Between, shapes: Mapping[str, tuple[int, int]], layers: Mapping[str, nn.Module], hint: int | None
) -> Structure | None:
    """The structure around one activation, with a block yet to be named; None when its units are not regular."""
    found = rows_between(between, hint) if between.columns > 1 else None
    if found is None:
        return None
    size, rows = found
    units = between.columns // size
    parts: list[Part] = []
    for path, each in rows.items():
        made = parts_of_rows(path, each, units, shapes[path][1])
        if made is None:
            return None
        parts += made
    is_attention = size > 1 and any(part.size > 1 for part in parts)
    kind: Kind = "attention" if is_attention else "ffn"
    role: Role = "output" if is_attention else "down"
    if not is_attention:
        parts = [replace(part, role="up") for part in parts]
    for path in between.readers:
        # A convolution has a column for each channel and place of its kernel.
        kernel = shapes[path][1] // between.columns
        parts.append(Part(path, role, "in", units, size * kernel, 0, shapes[path][0]))
    permutable = not any(is_convolution(layers[part.module]) for part in parts)
    return Structure("", kind, units, tuple(parts), permutable=permutable)


def _holds(between: Between, structure: Structure) -> bool:
    """Whether half of the units meet just the rows that the structure says."""
    things = structure.choices
    order = torch.randperm(things, generator=torch.Generator().manual_seed(20240721))
    half = order[: max(things // 2, 1)]
    columns = torch.zeros(between.columns, dtype=torch.bool)
    reader = next(part for part in structure.parts if part.axis == "in")
    kernel = reader.size * reader.units // between.columns
    columns[replace(reader, size=reader.size // kernel).entries(half, things)] = True
    met = between.entries(columns)
    expected = {path: torch.zeros_like(each) for path, each in met.items()}
    for part in structure.parts:
        if part.axis == "out" and part.module in expected:
            expected[part.module][part.entries(half, things)] = True
    return len(met) == len(between.producers) and all(torch.equal(met[path], expected[path]) for path in met)


def numberless(path: str) -> str:
    """The path with a star for every number: alike for blocks that repeat."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


@torch.enable_grad()
def trace_structures(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, int]],
    example: Example,
    head_dim: int | None = None,
) -> list[Structure]:
    """The coupled structures of a model.

    Args:
        model: any model; it is left as it is.
        layers: path -> each layer with a weight matrix that can train: linear, or a convolution of one group.
        shapes: path -> its weight as ``(out, in)``; a convolution's kernel counts as ``in``.
        example: inputs of one forward.
        head_dim: a head's size where the config tells it, as one more guess.

    Returns:
        Structures in the order of the model; layers that are in none are left out. ``kind`` is "attention" where a
        unit has several rows, "ffn" where it has one.

    Raises:
        TargetError: the model does not run on the example.
    """
    outs = {path: shape[0] for path, shape in shapes.items()}
    graph = cut_graph(model, layers, outs, example)
    found: list[Structure] = []
    known: dict[Any, Structure | None] = {}
    for readers, producers in graph.coupled().items():
        between = Between(graph, readers, tuple(producers))
        members = (*producers, *readers)
        key = tuple((numberless(path), shapes[path]) for path in members)
        twin = known.get(key)
        renamed = None
        if twin is not None:
            paths = dict(zip([*dict.fromkeys(part.module for part in twin.parts)], members, strict=True))
            parts = tuple(replace(part, module=paths[part.module]) for part in twin.parts)
            renamed = replace(twin, parts=parts)
        if renamed is None or not _holds(between, renamed):
            renamed = _structure(between, shapes, layers, head_dim)
            known.setdefault(key, renamed)
        if renamed is not None:
            found.append(renamed)
    return _named(_with_order(model, layers, outs, example, graph, found))


def _with_order(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    outs: Mapping[str, int],
    example: Example,
    graph: CutGraph,
    structures: list[Structure],
) -> list[Structure]:
    """Say which structures can be reordered: with all units in reverse, is each activation the same in reverse?"""
    leaves = {path: [leaf.detach().clone() for leaf in each] for path, each in graph.leaves.items()}
    for structure in structures:
        for part in structure.parts if structure.permutable else ():
            if part.axis == "out":
                for leaf in leaves[part.module]:
                    _reverse(leaf, part, structure.choices)
    turned = cut_graph(model, layers, outs, example, leaves)
    result = []
    for structure in structures:
        reader = next(part for part in structure.parts if part.axis == "in")
        permutable = structure.permutable
        for before, after in zip(graph.reads[reader.module], turned.reads[reader.module], strict=True):
            if permutable:
                expected = before.detach().clone()
                _reverse(expected, reader, structure.choices)
                permutable = torch.allclose(after, expected, rtol=1e-3, atol=1e-4)
        result.append(replace(structure, permutable=permutable))
    return result


def _reverse(values: Tensor, part: Part, things: int) -> None:
    """Put the units of a part into reverse order along the last dimension, in place."""
    straight = torch.arange(things)
    values[..., part.entries(straight, things)] = values[..., part.entries(straight.flip(0), things)].clone()


def _named(structures: list[Structure]) -> list[Structure]:
    """Name each structure's block: the path down to the last number that its layers share, or that of its reader."""
    blocks = []
    for structure in structures:
        words = [part.module.split(".") for part in structure.parts]
        alike = itertools.takewhile(lambda same: len(set(same)) == 1, zip(*words, strict=False))
        shared = [same[0] for same in alike]
        while shared and not shared[-1].isdigit():
            shared.pop()
        blocks.append(".".join(shared))
    kinds = [(block, structure.kind) for block, structure in zip(blocks, structures, strict=True)]
    return [
        replace(structure, block=block if block and kinds.count((block, structure.kind)) == 1 else _reader(structure))
        for block, structure in zip(blocks, structures, strict=True)
    ]


def _reader(structure: Structure) -> str:
    return next(part.module for part in structure.parts if part.axis == "in")
