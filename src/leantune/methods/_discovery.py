"""Which structures a model has, and by which way they were found: the table of families first, the tracer after it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from leantune.core.errors import TargetError
from leantune.methods._base import is_adaptable
from leantune.methods._convolution import is_whole_convolution, weight_shape
from leantune.methods._cut_graph import is_convolution
from leantune.methods._example import example_of
from leantune.methods._tracer import numberless, trace_structures
from leantune.methods.structure import HeadLayout, Structure, find_structures, plain_part, stored, thaw

Shapes = Mapping[str, tuple[int, int]]

_ENTRIES = {"in": "columns", "out": "rows"}


@dataclass(frozen=True)
class Discovery:
    """The structures of a model, every layer in at least one.

    Attributes:
        structures: all of them.
        traced: those that the tracer found, as JSON; None where the table was enough or nothing could be traced.
    """

    structures: list[Structure]
    traced: list[dict[str, Any]] | None = None


def known_by_name(
    model: nn.Module, layers: Mapping[str, nn.Module], shapes: Shapes
) -> tuple[list[Structure], set[str]]:
    """Structures by the table, and the layers that it leaves open.

    A layer is open when it is plain, or in a structure of which one side is missing, and stands in a block (its path
    has a number) or in a model of which the table knows nothing. A head or a classifier beside known blocks is not.
    """
    linear = {path: shape for path, shape in shapes.items() if not is_convolution(layers[path])}
    found = find_structures(linear, HeadLayout.of(getattr(model, "config", None)))
    for path, layer in layers.items():
        if path not in linear:
            kernel = shapes[path][1] // cast(nn.Conv2d, layer).in_channels
            part = plain_part(path, *shapes[path], kernel)
            found.append(Structure(path, "plain", part.units, (part,)))
    whole = [each for each in found if {part.axis for part in each.parts} == {"in", "out"}]
    closed = {part.module for each in whole for part in each.parts}
    open_ = {path for path in shapes if path not in closed}
    if whole:
        open_ = {path for path in open_ if any(word.isdigit() for word in path.split("."))}
    return found, open_


def _trace(model: nn.Module, layers: Mapping[str, nn.Module], shapes: Shapes) -> list[Structure] | None:
    example = example_of(model)
    if example is None:
        return None
    heads = HeadLayout.of(getattr(model, "config", None))
    return trace_structures(model, layers, shapes, example, None if heads is None else heads.head_dim)


def _fits(structures: list[Structure], shapes: Shapes) -> bool:
    """Whether stored structures are ones of this model."""
    return all(
        part.module in shapes
        and part.width == shapes[part.module][part.axis == "out"]
        and part.offset + part.units * part.size <= shapes[part.module][part.axis == "in"]
        for each in structures
        for part in each.parts
    )


def discover(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    shapes: Shapes,
    targets: set[str],
    traced: list[dict[str, Any]] | None = None,
) -> Discovery:
    """The structures of a model for a choice among ``targets``; it is traced only where the table leaves one open.

    Args:
        model: the base model.
        layers: path -> layer that could train.
        shapes: path -> ``(out, in)``; a convolution's kernel counts as ``in``.
        targets: the layers that train.
        traced: what an earlier trace found; read instead of a new one where it fits the model.
    """
    found, open_ = known_by_name(model, layers, shapes)
    if not targets & open_:
        return Discovery(found)
    earlier = None if traced is None else thaw(traced)
    if earlier is None or not _fits(earlier, shapes):
        try:
            earlier = _trace(model, layers, shapes)
        except TargetError as error:
            warnings.warn(f"{error}. Until then each targeted layer trains input columns, one by one.", stacklevel=2)
            earlier = None
    if earlier is None:
        return Discovery(found)
    new = [each for each in earlier if open_.issuperset(part.module for part in each.parts)]
    new = [each for each in new if targets & {part.module for part in each.parts}]
    covered = {part.module for each in new for part in each.parts}
    rest = [each for each in found if covered.isdisjoint(part.module for part in each.parts)]
    return Discovery(rest + new, stored(new))


def traced_targets(
    model: nn.Module, layers: Mapping[str, nn.Module], shapes: Shapes, by_name: tuple[str, ...]
) -> tuple[str, ...]:
    """The output side of the traced structures that the table leaves open: what trains when nothing is named.

    Where blocks repeat, what stands once beside them (a classifier after a pooler) is left out, as is what ``by_name``
    means already.

    Returns:
        Path endings; none where the table is enough, nothing says how to run the model, or no layers are coupled.

    Raises:
        TargetError: the model does not run on its example.
    """
    _, open_ = known_by_name(model, layers, shapes)
    structures = (_trace(model, layers, shapes) if open_ else None) or []
    outputs = [
        [part.module for part in each.parts if part.axis == "in"]
        for each in structures
        if open_.issuperset(part.module for part in each.parts)
    ]
    kinds = Counter(tuple(map(numberless, each)) for each in outputs)
    repeats = any(count > 1 for count in kinds.values())
    chosen = [path for each in outputs if not repeats or kinds[tuple(map(numberless, each))] > 1 for path in each]
    return _endings([path for path in chosen if not _means(by_name, path)], list(shapes))


def _means(endings: Iterable[str], path: str) -> bool:
    return any(path == ending or path.endswith(f".{ending}") for ending in endings)


def _endings(chosen: list[str], paths: list[str]) -> tuple[str, ...]:
    """The shortest path endings that mean just the chosen paths."""
    found: list[str] = []
    for path in chosen:
        words = path.split(".")
        for depth in range(1, len(words) + 1):
            ending = ".".join(words[-depth:])
            if {other for other in paths if _means([ending], other)} <= set(chosen):
                break
        found += [ending] if ending not in found else []
    return tuple(found)


def structure_report(model: nn.Module) -> list[dict[str, Any]]:
    """The structures of a plain model, block numbers taken together, each with the way by which it was found.

    Args:
        model: may be on the meta device.

    Returns:
        ``{"block", "kind", "count", "units", "choices", "permutable", "found", "parts"}`` each. ``units`` are heads or
        channels, ``choices`` what a choice that holds for all parts is among; ``found`` is "by name", "traced" or "not
        coupled".
    """
    layers = {
        path: module for path, module in model.named_modules() if is_adaptable(module) or is_whole_convolution(module)
    }
    shapes = {path: weight_shape(layer) for path, layer in layers.items()}
    found, open_ = known_by_name(model, layers, shapes)
    by_trace = discover(model, layers, shapes, open_).structures if open_ else []
    merged = by_trace or found
    groups: dict[Any, dict[str, Any]] = {}
    for each in merged:
        parts = tuple(
            f"{part.role} {numberless(part.module)}: {part.units} x {part.size} {_ENTRIES[part.axis]}"
            for part in each.parts
        )
        facts = {
            "block": numberless(each.block),
            "kind": each.kind,
            "count": 0,
            "units": each.units,
            "choices": each.choices,
            "permutable": each.permutable,
            "found": "not coupled" if each.kind == "plain" else "by name" if each in found else "traced",
        }
        group = groups.setdefault((*facts.values(), parts), {**facts, "parts": list(parts)})
        group["count"] += 1
    return list(groups.values())
