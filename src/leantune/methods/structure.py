"""Coupled structures: which rows and columns of which layers belong to one attention head or one FFN channel.

S2FT, section 3.1: a weight that feeds an activation alone, and a weight that reads it alone, are coupled through it.
In a transformer block that gives two structures: attention (query, key, value rows; output columns; unit: a head) and
the feed-forward network (gate, up rows; down columns; unit: a channel). Here they are found by the names of the
layers; ``_tracer`` finds them in any model. A layer that neither knows is a structure of its own: its input columns,
one by one.

With grouped-query attention one key/value head serves ``group = heads / kv_heads`` query heads. Columns of the
output projection and rows of the query projection can be chosen by query head; a choice that must hold for key or
value rows too is made by whole groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from leantune.core.errors import TargetError, describe
from leantune.kernels.partial_linear import Axis
from leantune.methods._family import Fused, Kind, Role, default_targets, places

__all__ = ["HeadLayout", "Kind", "Part", "Role", "Structure", "default_targets", "find_structures", "stored", "thaw"]


@dataclass(frozen=True)
class Part:
    """The share of one module in a structure: ``units`` stretches of ``size`` entries along ``axis``.

    Unit ``u`` begins at ``offset + (u // run) * stride + (u % run) * size``; without ``run``, units stand side by side.

    Attributes:
        module: its path in the model.
        role: what the module does in the structure.
        axis: "out" when units are output rows, "in" when they are input columns.
        units: how many units there are (for key and value of grouped-query attention: key/value heads).
        size: entries in a unit (the head dimension, or 1).
        offset: where the first unit begins (a fused query-key-value layer has three parts).
        width: length of the other axis, which is the number of parameters of one entry.
        run: how many units stand side by side before other rows come between (a fused layer that keeps the query,
            key and value rows of each head together), or None where all do.
        stride: from the start of one such run to the start of the next.
    """

    module: str
    role: Role
    axis: Axis
    units: int
    size: int
    offset: int
    width: int
    run: int | None = None
    stride: int | None = None

    @property
    def unit_parameters(self) -> int:
        """Parameters of one unit."""
        return self.size * self.width

    def entries(self, chosen: Tensor, things: int) -> Tensor:
        """The entries that belong to the ``chosen`` of ``things`` heads, groups or channels, int64, in that order."""
        each = self.units // things
        unit = (chosen[:, None] * each + torch.arange(each)).flatten()
        run, stride = self.run or self.units, self.stride or 0
        starts = self.offset + unit // run * stride + unit % run * self.size
        return (starts[:, None] + torch.arange(self.size)).flatten()


@dataclass(frozen=True)
class Structure:
    """All modules of one block that are coupled through the same heads or channels.

    Attributes:
        block: path of the block, e.g. ``model.layers.3``; for a plain layer its own path.
        kind: "attention", "ffn" or "plain".
        units: how many query heads or channels it has.
        parts: its parts; all of them as found, fewer once narrowed to what trains.
        whole_groups: how many key/value groups there are, where a choice must be made by whole groups although only
            query heads train (a permutation needs it); None otherwise.
        permutable: whether its units can be reordered without a change of the function. Not where something outside
            of the parts belongs to each unit: a bias of position, a batch norm.
    """

    block: str
    kind: Kind
    units: int
    parts: tuple[Part, ...]
    whole_groups: int | None = None
    permutable: bool = True

    @property
    def choices(self) -> int:
        """How many things a choice is among: key/value groups as soon as one part has them, else heads, channels."""
        return self.whole_groups or min(part.units for part in self.parts)


@dataclass(frozen=True)
class HeadLayout:
    """Heads of an attention layer, read from the model's config."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> HeadLayout | None:
        """The layout that a transformers config tells, or None when it tells none.

        ``head_dim`` is read where it stands (Gemma, Qwen3 and Mistral-Nemo are not ``hidden / heads``).
        """
        if config is None:
            return None
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = getattr(text, "num_attention_heads", None)
        hidden = getattr(text, "hidden_size", None)
        if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
            return None
        head_dim = getattr(text, "head_dim", None) or hidden // heads
        return cls(heads, getattr(text, "num_key_value_heads", None) or heads, head_dim)


_AXES: dict[str, Axis] = {
    "query": "out",
    "key": "out",
    "value": "out",
    "up": "out",
    "output": "in",
    "down": "in",
    "channel": "in",
}


def _attention_parts(path: str, role: Role | Fused, shape: tuple[int, int], layout: HeadLayout) -> list[Part]:
    out, width_in = shape
    d = layout.head_dim

    def part(name: Role, units: int, offset: int = 0, stride: int | None = None) -> Part:
        axis = _AXES[name]
        width = out if axis == "in" else width_in
        return Part(path, name, axis, units, d, offset, width, None if stride is None else 1, stride)

    if role == "qkv":
        query, key = layout.heads * d, layout.kv_heads * d
        parts = [part("query", layout.heads), part("key", layout.kv_heads, query)]
        parts.append(part("value", layout.kv_heads, query + key))
    elif role == "qkv by head":
        names: tuple[Role, ...] = ("query", "key", "value")
        parts = [part(name, layout.heads, number * d, 3 * d) for number, name in enumerate(names)]
    else:
        assert role != "gate and up", f"{path}: a feed-forward layer in an attention"
        parts = [part(role, layout.kv_heads if role in ("key", "value") else layout.heads)]
    wanted = sum(each.units for each in parts) * d
    have = width_in if parts[0].axis == "in" else out
    if have != wanted:
        raise TargetError(
            describe(
                path,
                f"{have} {'inputs' if parts[0].axis == 'in' else 'outputs'}",
                f"{wanted} by the config ({layout.heads} heads, {layout.kv_heads} key/value heads of {d})",
                "leave this module out of target_modules, or name its channels by a config that fits",
            )
        )
    return parts


def find_structures(linears: Mapping[str, tuple[int, int]], layout: HeadLayout | None) -> list[Structure]:
    """Group the linear layers of a model into coupled structures.

    Args:
        linears: path -> ``(out_features, in_features)``, in the order of the model.
        layout: heads of its attention; None when the config tells none, and every layer is then plain.

    Returns:
        One structure for each attention and each feed-forward network, one "plain" for every other layer.

    Raises:
        TargetError: a projection's size does not fit the heads of the config.
    """
    known = places(linears)
    groups: dict[tuple[str, Kind], list[Part]] = {}
    bound = set()
    for path, (out, width_in) in linears.items():
        place = known.get(path)
        if place is None or (place.kind == "attention" and layout is None):
            groups[(path, "plain")] = [plain_part(path, out, width_in)]
            continue
        parts = groups.setdefault((place.block, place.kind), [])
        if place.bound:
            bound.add((place.block, place.kind))
        if place.kind == "attention" and layout is not None:
            parts += _attention_parts(path, place.role, (out, width_in), layout)
        elif place.role == "gate and up":
            parts += [Part(path, "up", "out", out // 2, 1, half * (out // 2), width_in) for half in range(2)]
        else:
            role: Role = place.role  # type: ignore[assignment]
            axis = _AXES[role]
            units, width = (width_in, out) if axis == "in" else (out, width_in)
            parts.append(Part(path, role, axis, units, 1, 0, width))
    return [
        Structure(block, kind, max(part.units for part in parts), tuple(parts), permutable=(block, kind) not in bound)
        for (block, kind), parts in groups.items()
    ]


def plain_part(path: str, out: int, width_in: int, size: int = 1) -> Part:
    """Input channels of a layer of no known structure; a convolution's have ``size`` columns each."""
    return Part(path, "channel", "in", width_in // size, size, 0, out)


def stored(structures: Iterable[Structure]) -> list[dict[str, Any]]:
    """Structures as JSON; defaults are left out."""
    found = []
    for each in structures:
        parts = [
            {field.name: value for field in fields(part) if (value := getattr(part, field.name)) is not None}
            for part in each.parts
        ]
        found.append({**asdict(each), "parts": parts})
    return found


def thaw(found: Iterable[Mapping[str, Any]]) -> list[Structure]:
    """Structures that :func:`stored` wrote."""
    return [Structure(**{**each, "parts": tuple(Part(**part) for part in each["parts"])}) for each in found]
