"""Coupled structures: which rows and columns of which layers belong to one attention head or one FFN channel.

S2FT, section 3.1: a weight that feeds an activation alone, and a weight that reads it alone, are coupled through it.
In a transformer block that gives two structures: attention (query, key, value rows; output columns; unit: a head) and
the feed-forward network (gate, up rows; down columns; unit: a channel). A layer that no family below knows is a
structure of its own: its input columns, one by one.

With grouped-query attention one key/value head serves ``group = heads / kv_heads`` query heads. Columns of the
output projection and rows of the query projection can be chosen by query head; a choice that must hold for key or
value rows too is made by whole groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from leantune.core.errors import TargetError, describe
from leantune.kernels.partial_linear import Axis

Kind = Literal["attention", "ffn", "plain"]
Role = Literal["query", "key", "value", "output", "up", "down", "channel"]


@dataclass(frozen=True)
class Part:
    """The share of one module in a structure: ``units`` runs of ``size`` consecutive entries along ``axis``.

    Attributes:
        module: its path in the model.
        role: what the module does in the structure.
        axis: "out" when units are output rows, "in" when they are input columns.
        units: how many units there are (for key and value of grouped-query attention: key/value heads).
        size: entries in a unit (the head dimension, or 1).
        offset: where the first unit begins (a fused query-key-value layer has three parts).
        width: length of the other axis, which is the number of parameters of one entry.
    """

    module: str
    role: Role
    axis: Axis
    units: int
    size: int
    offset: int
    width: int

    @property
    def unit_parameters(self) -> int:
        """Parameters of one unit."""
        return self.size * self.width


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
    """

    block: str
    kind: Kind
    units: int
    parts: tuple[Part, ...]
    whole_groups: int | None = None

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


@dataclass(frozen=True)
class Family:
    """Where a family of models keeps the layers of a block, as path suffixes.

    Attributes:
        attention: suffix of each projection of the attention; "qkv" is the fused one.
        ffn: suffix of each layer of the feed-forward network.
        default_targets: the output side of both structures, which the paper trains.
    """

    attention: Mapping[str, Role | Literal["qkv"]]
    ffn: Mapping[str, Role]
    default_targets: tuple[str, ...]


FAMILIES: dict[str, Family] = {
    # Llama, Mistral, Qwen2, Qwen3, Gemma and all that kept Llama's names
    "llama": Family(
        attention={
            "self_attn.q_proj": "query",
            "self_attn.k_proj": "key",
            "self_attn.v_proj": "value",
            "self_attn.o_proj": "output",
        },
        ffn={"mlp.gate_proj": "up", "mlp.up_proj": "up", "mlp.down_proj": "down"},
        default_targets=("o_proj", "down_proj"),
    ),
    "gpt2": Family(
        attention={"attn.c_attn": "qkv", "attn.c_proj": "output"},
        ffn={"mlp.c_fc": "up", "mlp.c_proj": "down"},
        default_targets=("c_proj",),
    ),
    # BERT, RoBERTa
    "bert": Family(
        attention={
            "attention.self.query": "query",
            "attention.self.key": "key",
            "attention.self.value": "value",
            "attention.output.dense": "output",
        },
        ffn={"intermediate.dense": "up", "output.dense": "down"},
        default_targets=("attention.output.dense", "output.dense"),
    ),
}

_AXES: dict[str, Axis] = {
    "query": "out",
    "key": "out",
    "value": "out",
    "up": "out",
    "output": "in",
    "down": "in",
    "channel": "in",
}


def _match(path: str) -> tuple[Kind, str, str] | None:
    """``(kind, role, block)`` of a module path; the longest suffix wins (``attention.output.dense`` ends in
    ``output.dense``)."""
    best: tuple[int, Kind, str, str] | None = None
    for family in FAMILIES.values():
        kinds: tuple[tuple[Kind, Mapping[str, str]], ...] = (("attention", family.attention), ("ffn", family.ffn))
        for kind, suffixes in kinds:
            for suffix, role in suffixes.items():
                if path.endswith(f".{suffix}") and (best is None or len(suffix) > best[0]):
                    best = (len(suffix), kind, role, path[: -len(suffix) - 1])
    return best[1:] if best else None


def default_targets(paths: list[str]) -> tuple[str, ...]:
    """The modules that S2FT trains by default: the output side of every family found among ``paths``."""
    found: list[str] = []
    for family in FAMILIES.values():
        suffixes = [*family.attention, *family.ffn]
        if any(path.endswith(f".{suffix}") for path in paths for suffix in suffixes):
            found += [target for target in family.default_targets if target not in found]
    return tuple(found)


def _attention_parts(path: str, role: str, shape: tuple[int, int], layout: HeadLayout) -> list[Part]:
    out, width_in = shape
    d = layout.head_dim

    def part(name: Role, units: int, offset: int = 0) -> Part:
        axis = _AXES[name]
        return Part(path, name, axis, units, d, offset, out if axis == "in" else width_in)

    if role == "qkv":
        query, key = layout.heads * d, layout.kv_heads * d
        parts = [part("query", layout.heads), part("key", layout.kv_heads, query)]
        parts.append(part("value", layout.kv_heads, query + key))
        wanted = query + 2 * key
        have = out
    else:
        units = layout.kv_heads if role in ("key", "value") else layout.heads
        parts = [part(role, units)]  # type: ignore[arg-type]
        wanted = units * d
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
    groups: dict[tuple[str, Kind], list[Part]] = {}
    for path, (out, width_in) in linears.items():
        matched = _match(path)
        if matched is None or (matched[0] == "attention" and layout is None):
            groups[(path, "plain")] = [Part(path, "channel", "in", width_in, 1, 0, out)]
            continue
        kind, role, block = matched
        parts = groups.setdefault((block, kind), [])
        if kind == "attention" and layout is not None:
            parts += _attention_parts(path, role, (out, width_in), layout)
        else:
            axis = _AXES[role]
            units, width = (width_in, out) if axis == "in" else (out, width_in)
            parts.append(Part(path, role, axis, units, 1, 0, width))  # type: ignore[arg-type]
    return [
        Structure(block, kind, max(part.units for part in parts), tuple(parts))
        for (block, kind), parts in groups.items()
    ]
