"""The families whose blocks are known by the names of their layers; every other model is traced (``_tracer``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["attention", "ffn", "plain"]
Role = Literal["query", "key", "value", "output", "up", "down", "channel"]
Fused = Literal["qkv", "qkv by head", "gate and up"]


@dataclass(frozen=True)
class Family:
    """Where a family of models keeps the layers of a block, as path suffixes.

    Attributes:
        attention: suffix of each projection of the attention. "qkv" is fused, query rows first, then key, then
            value; "qkv by head" is fused too, but each head has its query, key and value rows side by side.
        ffn: suffix of each layer of the feed-forward network; "gate and up" is fused, one half after the other.
        default_targets: the output side of both structures, which the paper trains.
        exact: the suffixes are common words, so a block counts only if it has all of them and no other layer.
        bound_heads: something outside of the block (a bias of position that all blocks share) belongs to each head,
            so heads can be trained but not reordered.
    """

    attention: Mapping[str, Role | Fused]
    ffn: Mapping[str, Role | Fused]
    default_targets: tuple[str, ...]
    exact: bool = False
    bound_heads: bool = False

    @property
    def suffixes(self) -> list[str]:
        """All of them."""
        return [*self.attention, *self.ffn]


@dataclass(frozen=True)
class Place:
    """What a layer is in its block."""

    kind: Kind
    role: Role | Fused
    block: str
    bound: bool


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
    # Beside Llama's output and down projection
    "phi3": Family(
        attention={"self_attn.qkv_proj": "qkv"},
        ffn={"mlp.gate_up_proj": "gate and up"},
        default_targets=("o_proj", "down_proj"),
    ),
    "gpt2": Family(
        attention={"attn.c_attn": "qkv", "attn.c_proj": "output"},
        ffn={"mlp.c_fc": "up", "mlp.c_proj": "down"},
        default_targets=("c_proj",),
    ),
    "gpt_neox": Family(
        attention={"attention.query_key_value": "qkv by head", "attention.dense": "output"},
        ffn={"mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h": "down"},
        default_targets=("attention.dense", "dense_4h_to_h"),
    ),
    "opt": Family(
        attention={
            "self_attn.q_proj": "query",
            "self_attn.k_proj": "key",
            "self_attn.v_proj": "value",
            "self_attn.out_proj": "output",
        },
        ffn={"fc1": "up", "fc2": "down"},
        default_targets=("out_proj", "fc2"),
        exact=True,
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
    "vit": Family(
        attention={
            "attention.q_proj": "query",
            "attention.k_proj": "key",
            "attention.v_proj": "value",
            "attention.o_proj": "output",
        },
        ffn={"mlp.fc1": "up", "mlp.fc2": "down"},
        default_targets=("attention.o_proj", "mlp.fc2"),
        exact=True,
    ),
    "t5": Family(
        attention={
            "SelfAttention.q": "query",
            "SelfAttention.k": "key",
            "SelfAttention.v": "value",
            "SelfAttention.o": "output",
        },
        ffn={
            "DenseReluDense.wi": "up",
            "DenseReluDense.wi_0": "up",
            "DenseReluDense.wi_1": "up",
            "DenseReluDense.wo": "down",
        },
        default_targets=("SelfAttention.o", "DenseReluDense.wo"),
        bound_heads=True,
    ),
    # T5's attention to the encoder has no bias of position
    "t5_cross": Family(
        attention={
            "EncDecAttention.q": "query",
            "EncDecAttention.k": "key",
            "EncDecAttention.v": "value",
            "EncDecAttention.o": "output",
        },
        ffn={},
        default_targets=("EncDecAttention.o",),
    ),
}


def _has(path: str, suffix: str) -> bool:
    return path.endswith(f".{suffix}")


def _blocks(family: Family, paths: Iterable[str]) -> set[str]:
    """Blocks in which every suffix of the family has its layer."""
    of: dict[str, set[str]] = {}
    for path in paths:
        for suffix in family.suffixes:
            if _has(path, suffix):
                of.setdefault(path[: -len(suffix) - 1], set()).add(suffix)
    return {block for block, found in of.items() if len(found) == len(family.suffixes)}


def places(paths: Iterable[str]) -> dict[str, Place]:
    """The place of every layer that a family knows; the longest suffix wins (``attention.output.dense`` ends in
    ``output.dense``).

    Args:
        paths: all linear layers of the model.
    """
    paths = list(paths)
    best: dict[str, tuple[int, Place]] = {}
    for family in FAMILIES.values():
        whole = _blocks(family, paths) if family.exact else set()
        whole = {
            block for block in whole if sum(path.startswith(f"{block}.") for path in paths) == len(family.suffixes)
        }
        kinds: tuple[tuple[Kind, Mapping[str, Role | Fused]], ...] = (
            ("attention", family.attention),
            ("ffn", family.ffn),
        )
        for path in paths:
            for kind, suffixes in kinds:
                for suffix, role in suffixes.items():
                    block = path[: -len(suffix) - 1]
                    if not _has(path, suffix) or (family.exact and block not in whole):
                        continue
                    if path not in best or len(suffix) > best[path][0]:
                        bound = family.bound_heads and kind == "attention"
                        best[path] = (len(suffix), Place(kind, role, block, bound))
    return {path: place for path, (_, place) in best.items()}


def default_targets(paths: list[str]) -> tuple[str, ...]:
    """The modules that S2FT trains by default: the output side of every family found among ``paths``."""
    found: list[str] = []
    for family in FAMILIES.values():
        if family.exact and not _blocks(family, paths):
            continue
        if any(_has(path, suffix) for path in paths for suffix in family.suffixes):
            there = [target for target in family.default_targets if any(_has(path, target) for path in paths)]
            found += [target for target in there if target not in found]
    return tuple(found)
