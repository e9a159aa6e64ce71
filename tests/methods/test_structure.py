"""Which rows and columns belong to one head or channel, for every family and for any shape."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny
from leantune.core.errors import TargetError
from leantune.methods._base import linear_features
from leantune.methods._selection import entries
from leantune.methods.structure import HeadLayout, Structure, default_targets, find_structures

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma")
ENCODERS = ("bert", "roberta")


def shapes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {path: linear_features(layer)[::-1] for path, layer in tiny.linears(model).items()}


def structures_of(family: str) -> list[Structure]:
    model = tiny.model(family)
    return find_structures(shapes_of(model), HeadLayout.of(model.config))


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", HeadLayout(6, 2, 4)),
        ("mistral", HeadLayout(6, 2, 6)),
        ("qwen2", HeadLayout(6, 2, 4)),
        ("qwen3", HeadLayout(6, 2, 6)),
        ("gemma", HeadLayout(6, 1, 8)),
        ("gpt2", HeadLayout(6, 6, 4)),
        ("bert", HeadLayout(6, 6, 4)),
        ("roberta", HeadLayout(6, 6, 4)),
    ],
)
def test_heads_are_read_from_the_config(family: str, layout: HeadLayout) -> None:
    assert HeadLayout.of(tiny.model(family).config) == layout


def test_a_config_without_heads_has_no_layout() -> None:
    assert HeadLayout.of(None) is None
    assert HeadLayout.of(SimpleNamespace(hidden_size=8)) is None
    assert HeadLayout.of(SimpleNamespace(hidden_size=8, num_attention_heads=0)) is None
    inner = SimpleNamespace(hidden_size=8, num_attention_heads=2)
    assert HeadLayout.of(SimpleNamespace(get_text_config=lambda: inner)) == HeadLayout(2, 2, 4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_each_block_has_one_attention_and_one_feed_forward_network(family: str) -> None:
    found = structures_of(family)
    assert sorted(each.kind for each in found) == ["attention"] * tiny.LAYERS + ["ffn"] * tiny.LAYERS
    assert len({each.block for each in found}) == tiny.LAYERS
    for each in found:
        assert each.units == (tiny.HEADS if each.kind == "attention" else tiny.INTERMEDIATE)


def _roles(structure: Structure) -> dict[str, tuple[str, int, int]]:
    return {part.role: (part.axis, part.units, part.size) for part in structure.parts}


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS, "gpt2"])
def test_roles_axes_and_units(family: str) -> None:
    layout = HeadLayout.of(tiny.model(family).config)
    assert layout is not None
    for each in structures_of(family):
        if each.kind == "ffn":
            expected = {"up": ("out", tiny.INTERMEDIATE, 1), "down": ("in", tiny.INTERMEDIATE, 1)}
            assert len(each.parts) == (3 if family in DECODERS else 2)
        else:
            key = ("out", layout.kv_heads, layout.head_dim)
            expected = {
                "query": ("out", layout.heads, layout.head_dim),
                "key": key,
                "value": key,
                "output": ("in", layout.heads, layout.head_dim),
            }
        assert _roles(each) == expected


def test_fused_query_key_value_has_three_parts_side_by_side() -> None:
    attention = next(each for each in structures_of("gpt2") if each.kind == "attention")
    fused = [part for part in attention.parts if part.module.endswith("c_attn")]
    assert [(part.role, part.offset) for part in fused] == [
        ("query", 0),
        ("key", tiny.HIDDEN),
        ("value", 2 * tiny.HIDDEN),
    ]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_units_of_all_parts_cover_each_layer_once(family: str) -> None:
    model = tiny.model(family)
    covered: dict[tuple[str, str], list[int]] = {}
    for each in find_structures(shapes_of(model), HeadLayout.of(model.config)):
        for part in each.parts:
            units = torch.arange(each.choices)
            covered.setdefault((part.module, part.axis), []).extend(entries(part, units, each.choices).tolist())
    shapes = shapes_of(model)
    assert {module for module, _ in covered} == set(shapes)
    for (module, axis), found in covered.items():
        assert sorted(found) == list(range(shapes[module][0 if axis == "out" else 1]))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_unit_is_what_the_activation_between_needs(family: str) -> None:
    """The definition of a coupling: with a unit's output columns zero, its inward rows change nothing."""
    model = tiny.model(family)
    exact = model(input_ids=tiny.ids()).logits.detach()
    for each in find_structures(shapes_of(model), HeadLayout.of(model.config)):
        unit = torch.tensor([each.choices - 1])
        with torch.no_grad():
            for outward in (True, False):
                for part in each.parts:
                    layer = model.get_submodule(part.module)
                    weight = layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight
                    index = entries(part, unit, each.choices)
                    if part.axis == "in" and outward:
                        weight.index_fill_(1, index, 0)
                    elif part.axis == "out" and not outward:
                        weight.index_add_(0, index, torch.ones(len(index), weight.shape[1], dtype=weight.dtype))
                changed = model(input_ids=tiny.ids()).logits.detach()
                if outward:
                    assert not torch.equal(changed, exact), "the unit did nothing from the start"
                    exact = changed
                else:
                    torch.testing.assert_close(changed, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ("o_proj", "down_proj")),
        ("gpt2", ("c_proj",)),
        ("bert", ("attention.output.dense", "output.dense")),
    ],
)
def test_default_targets_are_the_output_sides(family: str, targets: tuple[str, ...]) -> None:
    assert default_targets([name for name, _ in tiny.model(family).named_modules()]) == targets


def test_no_default_for_an_unknown_family() -> None:
    assert default_targets(["lin0", "head", "down_proj", "mlp"]) == ()


def test_sizes_that_do_not_fit_the_heads_are_refused() -> None:
    with pytest.raises(TargetError, match=r"m\.0\.self_attn\.q_proj: 20 outputs; 24 by the config \(6 heads"):
        find_structures({"m.0.self_attn.q_proj": (20, 24)}, HeadLayout(6, 2, 4))
    with pytest.raises(TargetError, match=r"20 inputs; 24 by the config"):
        find_structures({"m.0.self_attn.o_proj": (24, 20)}, HeadLayout(6, 2, 4))
    with pytest.raises(TargetError, match=r"24 outputs; 8 by the config"):
        find_structures({"m.0.self_attn.k_proj": (24, 24)}, HeadLayout(6, 2, 4))


def test_without_a_layout_attention_layers_are_plain() -> None:
    (only,) = find_structures({"m.0.self_attn.q_proj": (20, 24)}, None)
    assert (only.kind, only.units, only.block) == ("plain", 24, "m.0.self_attn.q_proj")


def test_the_longest_suffix_wins() -> None:
    """``attention.output.dense`` ends with ``output.dense``, which is the feed-forward network's."""
    shapes = {"e.0.attention.output.dense": (24, 24), "e.0.output.dense": (24, 20)}
    assert [(each.kind, each.block) for each in find_structures(shapes, HeadLayout(6, 6, 4))] == [
        ("attention", "e.0"),
        ("ffn", "e.0"),
    ]


names = st.lists(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(names, st.tuples(st.integers(1, 64), st.integers(1, 64)), max_size=6))
def test_unknown_names_are_plain_structures_of_their_own(shapes: dict[str, tuple[int, int]]) -> None:
    found = find_structures(shapes, None)
    assert [each.block for each in found] == list(shapes)
    for each, (path, (out, width)) in zip(found, shapes.items(), strict=True):
        (part,) = each.parts
        assert (part.module, part.axis, part.units, part.width) == (path, "in", width, out)
        assert part.unit_parameters * part.units == out * width


@given(
    group=st.integers(1, 4),
    kv_heads=st.integers(1, 4),
    head_dim=st.integers(1, 6),
    hidden=st.integers(1, 40),
    channels=st.integers(1, 40),
    blocks=st.integers(1, 3),
    order=st.randoms(use_true_random=False),
)
def test_matching_does_not_depend_on_the_order_of_layers(
    group: int, kv_heads: int, head_dim: int, hidden: int, channels: int, blocks: int, order: object
) -> None:
    heads = group * kv_heads
    shapes = {}
    for number in range(blocks):
        # Block 1 must not be taken for block 10.
        block = f"model.layers.{number * 10 if number else 1}"
        shapes[f"{block}.self_attn.q_proj"] = (heads * head_dim, hidden)
        shapes[f"{block}.self_attn.k_proj"] = (kv_heads * head_dim, hidden)
        shapes[f"{block}.self_attn.v_proj"] = (kv_heads * head_dim, hidden)
        shapes[f"{block}.self_attn.o_proj"] = (hidden, heads * head_dim)
        shapes[f"{block}.mlp.gate_proj"] = (channels, hidden)
        shapes[f"{block}.mlp.up_proj"] = (channels, hidden)
        shapes[f"{block}.mlp.down_proj"] = (hidden, channels)
    layout = HeadLayout(heads, kv_heads, head_dim)
    mixed = list(shapes)
    order.shuffle(mixed)  # type: ignore[attr-defined]
    straight = {(s.block, s.kind): s for s in find_structures(shapes, layout)}
    shuffled = {(s.block, s.kind): s for s in find_structures({path: shapes[path] for path in mixed}, layout)}
    assert len(straight) == 2 * blocks
    assert straight.keys() == shuffled.keys()
    for key, each in straight.items():
        assert set(each.parts) == set(shuffled[key].parts)
        assert each.units == (heads if key[1] == "attention" else channels)
        assert each.choices == (kv_heads if key[1] == "attention" else channels)
        assert sum(part.unit_parameters * part.units for part in each.parts) == sum(
            out * width for path, (out, width) in shapes.items() if path in {part.module for part in each.parts}
        )
