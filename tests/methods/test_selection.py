"""How many units train under a budget, and which ones: against naive counting and naive ranking."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leantune.methods._selection import (
    Budget,
    choose_units,
    count_units,
    entries,
    plain_channels,
    side_count,
    sides,
    targeted,
)
from leantune.methods.structure import HeadLayout, Structure, find_structures

# hidden 24, 6 query heads of 4, 2 key/value heads (groups of 3), 20 channels
SHAPES = {
    "m.0.self_attn.q_proj": (24, 24),
    "m.0.self_attn.k_proj": (8, 24),
    "m.0.self_attn.v_proj": (8, 24),
    "m.0.self_attn.o_proj": (24, 24),
    "m.0.mlp.gate_proj": (20, 24),
    "m.0.mlp.up_proj": (20, 24),
    "m.0.mlp.down_proj": (24, 20),
}
LAYOUT = HeadLayout(6, 2, 4)


def narrowed(*names: str) -> dict[str, Structure]:
    targets = {path for path in SHAPES if path.endswith(names)}
    found = [targeted(each, targets) for each in find_structures(SHAPES, LAYOUT)]
    return {each.kind: each for each in found if each.parts}


def counted(budget: Budget, *names: str, coupling: str = "shared") -> dict[str, int]:
    found = narrowed(*names)
    halves = {kind: list(sides(each, coupling).values()) for kind, each in found.items()}  # type: ignore[arg-type]
    return count_units(halves, budget, {path: SHAPES[path] for path in SHAPES if path.endswith(names)})


def test_half_of_the_budget_goes_to_whole_heads_and_the_rest_to_channels() -> None:
    # o: 24 * 24, down: 24 * 20; a head of o costs 24 * 4 = 96, a channel 24.
    total = 24 * 24 + 24 * 20
    ratio = 0.4
    heads = math.floor(ratio * total / 2 / 96)
    channels = math.floor((ratio * total - heads * 96) / 24)
    assert (heads, channels) == (2, 9)
    assert counted(Budget(ratio=ratio), "o_proj", "down_proj") == {"attention": heads, "ffn": channels}


def test_when_no_head_fits_the_channels_get_all() -> None:
    assert counted(Budget(ratio=0.1), "o_proj", "down_proj") == {"attention": 0, "ffn": math.floor(0.1 * 1056 / 24)}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("o_proj", "down_proj"), {"attention": 0, "ffn": 1}),
        (("o_proj",), {"attention": 1}),
        (("down_proj",), {"ffn": 1}),
        (("v_proj",), {"attention": 1}),
    ],
)
def test_at_least_one_unit_of_a_block_trains(names: tuple[str, ...], expected: dict[str, int]) -> None:
    assert counted(Budget(ratio=1e-6), *names) == expected


def test_attention_takes_half_at_most_even_when_the_channels_run_out() -> None:
    # Half of 1056 holds five heads of 96; the channels' share would hold 24 of the 20.
    assert counted(Budget(ratio=1.0), "o_proj", "down_proj") == {"attention": 5, "ffn": 20}
    assert counted(Budget(ratio=1.0), "o_proj") == {"attention": 6}


def test_explicit_counts_are_taken_and_capped() -> None:
    assert counted(Budget(heads=2, channels=5), "o_proj", "down_proj") == {"attention": 2, "ffn": 5}
    assert counted(Budget(heads=99, channels=99), "o_proj", "down_proj") == {"attention": 6, "ffn": 20}
    assert counted(Budget(channels=5), "o_proj", "down_proj") == {"attention": 0, "ffn": 5}
    assert counted(Budget(heads=2), "o_proj", "down_proj") == {"attention": 2, "ffn": 0}


@pytest.mark.parametrize("r", [1, 2, 3, 8])
@pytest.mark.parametrize(("out", "width"), [(24, 20), (20, 24), (16, 16), (24, 200)])
def test_matching_a_lora_rank_is_the_papers_width(r: int, out: int, width: int) -> None:
    """``s = floor(r (d + d') / d')`` columns of a ``(d', d)`` layer, where LoRA of rank r has ``r (d + d')``."""
    (structure,) = find_structures({"lin": (out, width)}, None)
    expected = min(math.floor(r * (out + width) / out), width)
    assert plain_channels(structure.parts[0], Budget(match_lora_rank=r)) == expected
    shapes = {"m.0.mlp.down_proj": (out, width)}
    (ffn,) = find_structures(shapes, None)
    assert count_units({"ffn": [ffn]}, Budget(match_lora_rank=r), shapes) == {"ffn": expected}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget(ratio=0.5), 10),
        (Budget(ratio=0.04), 1),
        (Budget(ratio=1.0), 20),
        (Budget(channels=3), 3),
        (Budget(channels=99), 20),
        (Budget(heads=3), 0),
    ],
)
def test_channels_of_a_plain_layer(budget: Budget, expected: int) -> None:
    (structure,) = find_structures({"lin": (7, 20)}, None)
    assert plain_channels(structure.parts[0], budget) == expected


def test_whole_groups_only_when_key_or_value_train() -> None:
    query_heads = narrowed("q_proj", "o_proj")["attention"]
    assert (query_heads.choices, side_count(query_heads, 2)) == (6, 2)
    groups = narrowed("v_proj", "o_proj")["attention"]
    # Two query heads need one group of three.
    assert (groups.choices, side_count(groups, 2), side_count(groups, 3), side_count(groups, 4)) == (2, 1, 1, 2)
    asked = targeted(find_structures(SHAPES, LAYOUT)[0], ["m.0.self_attn.o_proj"], whole_groups=True)
    assert (asked.choices, side_count(asked, 1)) == (2, 1)


def test_entries_of_heads_and_groups() -> None:
    attention = narrowed("v_proj", "o_proj")["attention"]
    value, output = attention.parts
    one = torch.tensor([1])
    assert entries(value, one, 2).tolist() == [4, 5, 6, 7]
    # The second group is query heads 3, 4 and 5.
    assert entries(output, one, 2).tolist() == list(range(12, 24))
    assert entries(output, torch.tensor([0, 5]), 6).tolist() == [0, 1, 2, 3, 20, 21, 22, 23]
    assert entries(replace(output, offset=100), torch.tensor([1]), 6).tolist() == [104, 105, 106, 107]


def test_coupling() -> None:
    attention = narrowed("q_proj", "v_proj", "o_proj")["attention"]
    assert list(sides(attention, "shared")) == ["both"]
    halves = sides(attention, "independent")
    assert {side: [part.role for part in half.parts] for side, half in halves.items()} == {
        "inward": ["query", "value"],
        "outward": ["output"],
    }
    # Columns of the output projection alone can be chosen by query head.
    assert (halves["inward"].choices, halves["outward"].choices) == (2, 6)
    assert list(sides(narrowed("down_proj")["ffn"], "independent")) == ["outward"]


def _cost(halves: Iterable[Structure], number: int) -> int:
    """Parameters of ``number`` heads or channels, counted entry by entry."""
    total = 0
    for half in halves:
        group = half.units // half.choices
        chosen = torch.arange(min(math.ceil(number / group), half.choices))
        total += sum(len(entries(part, chosen, half.choices)) * part.width for part in half.parts)
    return total


@settings(max_examples=200)
@given(
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 4),
    head_dim=st.integers(1, 5),
    hidden=st.integers(1, 24),
    channels=st.integers(1, 40),
    ratio=st.floats(0.001, 1.0),
    rank=st.none() | st.integers(1, 8),
    coupling=st.sampled_from(["shared", "independent"]),
    data=st.data(),
)
def test_the_count_is_the_largest_within_the_budget(
    group: int,
    kv_heads: int,
    head_dim: int,
    hidden: int,
    channels: int,
    ratio: float,
    rank: int | None,
    coupling: str,
    data: st.DataObject,
) -> None:
    heads = group * kv_heads
    shapes = {
        "m.0.self_attn.q_proj": (heads * head_dim, hidden),
        "m.0.self_attn.k_proj": (kv_heads * head_dim, hidden),
        "m.0.self_attn.v_proj": (kv_heads * head_dim, hidden),
        "m.0.self_attn.o_proj": (hidden, heads * head_dim),
        "m.0.mlp.gate_proj": (channels, hidden),
        "m.0.mlp.up_proj": (channels, hidden),
        "m.0.mlp.down_proj": (hidden, channels),
    }
    targets = data.draw(st.sets(st.sampled_from(sorted(shapes)), min_size=1))
    narrow = [targeted(each, targets) for each in find_structures(shapes, HeadLayout(heads, kv_heads, head_dim))]
    halves = {each.kind: list(sides(each, coupling).values()) for each in narrow if each.parts}  # type: ignore[arg-type]
    budget = Budget(ratio=None if rank else ratio, match_lora_rank=rank)
    modules = {path: shapes[path] for path in targets}
    allowed = budget.parameters(modules)
    counts = count_units(dict(halves), budget, modules)
    assert counts.keys() == halves.keys()
    spent = sum(_cost(halves[kind], count) for kind, count in counts.items())
    assert sum(counts.values()) >= 1, "nothing trains"
    forced = sum(counts.values()) == 1
    assert spent <= allowed or forced, "over the budget, and not by the one unit that must train"
    if "attention" in counts and "ffn" in counts:
        attention_share = allowed / 2
        assert _cost(halves["attention"], counts["attention"]) <= attention_share
        if counts["attention"] < heads:
            assert _cost(halves["attention"], counts["attention"] + 1) > attention_share, "one more head would fit"
    last = "ffn" if "ffn" in counts else "attention"
    units = channels if last == "ffn" else heads
    if counts[last] < units:
        others = spent - _cost(halves[last], counts[last])
        assert others + _cost(halves[last], counts[last] + 1) > allowed, "one more unit would fit"


def _weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {path: torch.randn(*shape, generator=generator) for path, shape in SHAPES.items()}


def _choose(structure: Structure, count: int, **options: object) -> list[int]:
    given_options = {"side": "both", "selection": "weight", "order": "largest", "seed": 0, **options}
    weights = _weights()

    def squares(measure: str, path: str, axis: str) -> Tensor:
        assert measure == "weight"
        return weights[path].double().square().sum(0 if axis == "in" else 1)

    return choose_units(structure, count, squares=squares, **given_options).tolist()  # type: ignore[arg-type]


def _naive_ranking(names: tuple[str, ...], kind: str) -> list[int]:
    """Units by the norm of all their weights, largest first, number by number."""
    weights = _weights()
    grouped = kind == "attention" and any(name in ("k_proj", "v_proj") for name in names)
    units = 20 if kind == "ffn" else 2 if grouped else 6
    scores = []
    for unit in range(units):
        total = 0.0
        for path, weight in weights.items():
            if not path.endswith(names):
                continue
            by_column = path.endswith(("o_proj", "down_proj"))
            length = weight.shape[1 if by_column else 0]
            per_unit = length // units
            for entry in range(unit * per_unit, (unit + 1) * per_unit):
                line = weight[:, entry] if by_column else weight[entry]
                total += sum(float(value) ** 2 for value in line)
        scores.append(total)
    return sorted(range(units), key=lambda unit: -scores[unit])


@pytest.mark.parametrize("order", ["largest", "smallest"])
@pytest.mark.parametrize(
    ("names", "kind", "count"),
    [
        (("o_proj",), "attention", 3),
        (("q_proj", "o_proj"), "attention", 2),
        (("v_proj", "o_proj"), "attention", 1),
        (("down_proj",), "ffn", 7),
        (("gate_proj", "up_proj", "down_proj"), "ffn", 5),
    ],
)
def test_selection_by_weight_is_the_naive_ranking(names: tuple[str, ...], kind: str, count: int, order: str) -> None:
    ranking = _naive_ranking(names, kind)
    ranking = ranking if order == "largest" else ranking[::-1]
    assert _choose(narrowed(*names)[kind], count, order=order) == sorted(ranking[:count])


def test_random_choices_are_pinned() -> None:
    """The draw of one seed, written down: another torch, machine or process must draw the same."""
    ffn, attention = narrowed("down_proj")["ffn"], narrowed("o_proj")["attention"]
    assert _choose(ffn, 6, selection="random", seed=0) == [0, 5, 6, 10, 13, 19]
    assert _choose(ffn, 6, selection="random", seed=1) == [1, 9, 12, 13, 16, 19]
    assert _choose(attention, 3, selection="random", seed=0) == [0, 1, 5]
    assert _choose(ffn, 6, selection="random", seed=0, side="outward") == [9, 12, 13, 14, 16, 18]


def test_random_choices_depend_on_seed_block_and_side_alone() -> None:
    ffn = narrowed("down_proj")["ffn"]
    first = _choose(ffn, 6, selection="random")
    torch.manual_seed(99)
    assert _choose(ffn, 6, selection="random") == first
    assert _choose(ffn, 6, selection="random", order="smallest") == first
    assert _choose(ffn, 6, selection="random", seed=1) != first
    assert _choose(ffn, 6, selection="random", side="inward") != first
    assert _choose(replace(ffn, block="m.1"), 6, selection="random") != first
    # Whether other layers train too does not change which channels do.
    assert _choose(narrowed("up_proj", "down_proj")["ffn"], 6, selection="random") == first


@given(seed=st.integers(-(2**40), 2**40), count=st.integers(1, 20))
def test_random_choices_are_sorted_and_distinct(seed: int, count: int) -> None:
    chosen = _choose(narrowed("down_proj")["ffn"], count, selection="random", seed=seed)
    assert len(chosen) == count
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(20))


def test_random_choices_are_uniform() -> None:
    """Each of 20 channels is among 5 drawn in a quarter of 2,000 draws; 6 standard deviations are allowed."""
    ffn, draws = narrowed("down_proj")["ffn"], 2000
    hits = torch.zeros(20)
    for seed in range(draws):
        hits[_choose(ffn, 5, selection="random", seed=seed)] += 1
    deviation = math.sqrt(draws * 0.25 * 0.75)
    assert (hits - draws / 4).abs().max() < 6 * deviation
