"""The tracer against the table, against models made for one question each, and against everything it must not touch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import tiny
import unknown_models
from leantune.core.errors import TargetError
from leantune.methods._convolution import is_whole_convolution, weight_shape
from leantune.methods._discovery import discover
from leantune.methods._example import Example, example_of
from leantune.methods._tracer import trace_structures
from leantune.methods.structure import HeadLayout, Part, Structure, find_structures, stored, thaw


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {
        path: module
        for path, module in model.named_modules()
        if type(module).__name__ in ("Linear", "FalconLinear", "Conv1D") or is_whole_convolution(module)
    }


def trace(model: nn.Module, example: Example | None = None) -> list[Structure]:
    layers = layers_of(model)
    shapes = {path: weight_shape(layer) for path, layer in layers.items()}
    heads = HeadLayout.of(getattr(model, "config", None))
    example = example or example_of(model)
    assert example is not None
    return trace_structures(model, layers, shapes, example, heads.head_dim if heads else None)


def facts(structure: Structure) -> tuple[Any, ...]:
    """All that a structure says; the order of its parts means nothing."""
    same = (structure.block, structure.kind, structure.units, structure.choices, structure.permutable)
    return (*same, frozenset(structure.parts))


# Against the table


@pytest.mark.parametrize("family", tiny.EVERY)
def test_the_trace_finds_what_the_table_says(family: str) -> None:
    """Blocks, kinds, units, key/value groups, roles, offsets, strides, and which heads cannot be reordered."""
    model = tiny.model(family)
    known = tiny.linears(model)
    table = find_structures({path: weight_shape(known[path]) for path in known}, HeadLayout.of(model.config))
    traced = trace(model)
    inside = [each for each in traced if all(part.module in known for part in each.parts)]
    assert {facts(each) for each in inside} == {facts(each) for each in table}
    # Beside the blocks: a pooler feeds a classifier alone.
    beside = {"bert": "classifier", "roberta": "classifier.out_proj"}
    assert [each.block for each in traced if each not in inside] == [beside[f] for f in [family] if f in beside]


@pytest.mark.parametrize("family", ["llama", "phi3", "neox", "t5"])
def test_no_weight_is_read(family: str) -> None:
    """On the meta device there is none."""
    with torch.device("meta"):
        bare = {**tiny.FAMILIES, **tiny.FURTHER}[family]()
    assert {facts(each) for each in trace(bare)} == {facts(each) for each in trace(tiny.model(family))}


def test_a_dtype_or_a_head_over_the_blocks_changes_nothing() -> None:
    expected = {facts(each) for each in trace(tiny.model("bert"))}
    assert {facts(each) for each in trace(tiny.model("bert", torch.bfloat16))} == expected
    masked = BertForMaskedLM(tiny.model("bert").config)
    # Its head has a layer norm before the decoder, which joins all channels.
    assert [each.block for each in trace(masked)] == ["bert.encoder.layer.0"] * 2 + ["bert.encoder.layer.1"] * 2


def test_blocks_of_another_size_are_not_taken_for_the_first() -> None:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    odd = model.model.layers[1].mlp
    odd.gate_proj, odd.up_proj, odd.down_proj = nn.Linear(24, 28), nn.Linear(24, 28), nn.Linear(28, 24)
    assert [each.units for each in trace(model) if each.kind == "ffn"] == [20, 28, 20]


class Twisted(nn.Module):
    """Two blocks of the same names and shapes; the second one reads its channels in another order."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 6)]) for _ in range(2)])
        self.order = [list(range(8)), order]
        self.dummy_inputs = {"x": torch.zeros(3, 6)}

    def forward(self, x: Tensor) -> Tensor:
        for (up, down), order in zip(self.blocks, self.order, strict=True):
            x = x + down(torch.tanh(up(x))[:, order])
        return x


def test_a_block_that_looks_alike_is_checked() -> None:
    assert [each.block for each in trace(Twisted(list(range(8))))] == ["blocks.0", "blocks.1"]
    # Pairs exchanged: no regular stretch of rows, so the second block has no structure that parts could say.
    assert [each.block for each in trace(Twisted([1, 0, 3, 2, 5, 4, 7, 6]))] == ["blocks.0"]


# Unknown models


def _rows(path: str, role: Any, units: int, size: int, width: int, offset: int = 0, **more: int) -> Part:
    return Part(path, role, "out", units, size, offset, width, **more)


def _columns(path: str, role: Any, units: int, size: int, width: int) -> Part:
    return Part(path, role, "in", units, size, 0, width)


def _of_block(name: str, block: str) -> dict[str, Structure]:
    return {each.kind: each for each in trace(unknown_models.model(name)) if each.block == block}


def test_an_invented_decoder() -> None:
    found = _of_block("loom", "strands.1")
    path = "strands.1.weave"
    assert found["attention"].parts == (
        _rows(f"{path}.ask", "query", 6, 4, 24),
        _rows(f"{path}.tell", "key", 2, 4, 24, 0, run=1, stride=8),
        _rows(f"{path}.tell", "value", 2, 4, 24, 4, run=1, stride=8),
        _columns(f"{path}.tie", "output", 6, 4, 24),
    )
    path = "strands.1.dye"
    assert found["ffn"].parts == (_rows(f"{path}.dip", "up", 20, 2, 24), _columns(f"{path}.wring", "down", 20, 1, 24))
    assert len(trace(unknown_models.model("loom"))) == 4


def test_query_key_and_value_fused_by_group() -> None:
    path = "transformer.h.0.self_attention"
    assert _of_block("falcon", "transformer.h.0")["attention"].parts == (
        _rows(f"{path}.query_key_value", "query", 6, 4, 24, 0, run=3, stride=20),
        _rows(f"{path}.query_key_value", "key", 2, 4, 24, 12, run=1, stride=20),
        _rows(f"{path}.query_key_value", "value", 2, 4, 24, 16, run=1, stride=20),
        _columns(f"{path}.dense", "output", 6, 4, 24),
    )


def test_heads_with_a_slope_of_their_own_cannot_be_reordered() -> None:
    """Bloom's attention is Falcon's but for ALiBi, which fixes what each head does."""
    assert _of_block("falcon", "transformer.h.0")["attention"].permutable
    found = _of_block("bloom", "transformer.h.0")
    assert not found["attention"].permutable
    assert found["ffn"].permutable


def test_convolutions_and_a_flattened_map() -> None:
    """Channels through batch norm and ReLU; then each channel is sixteen columns of the classifier."""
    first, second = trace(unknown_models.model("camera"))
    assert first.parts == (_rows("lens", "up", 8, 1, 27), _columns("film", "down", 8, 9, 12))
    assert second.parts == (_rows("film", "up", 12, 1, 72), _columns("name", "down", 12, 16, 5))
    assert [(each.kind, each.permutable) for each in (first, second)] == [("ffn", False)] * 2


def test_a_depthwise_convolution_is_a_part_of_what_lies_between() -> None:
    found = trace(unknown_models.model("bottleneck"))
    assert [{part.module for part in each.parts} for each in found] == [{f"widen.{n}", f"narrow.{n}"} for n in range(2)]


# The degree rule, one case each


class Between(nn.Module):
    """``down(rule(up(x)))`` with a rule of the test's own; four more layers to use in it."""

    def __init__(self, rule: Any, size: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(size, 6)
        self.other, self.again = nn.Linear(6, 8), nn.Linear(8, 6)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.zeros(8))
        self.rule = rule
        self.dummy_inputs = {"x": torch.zeros(4, 6)}

    def forward(self, x: Tensor) -> Any:
        return self.rule(self, x)


def _modules(model: nn.Module) -> list[set[str]]:
    return [{part.module for part in each.parts} for each in trace(model)]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (lambda m, x: m.down(torch.tanh(m.up(x))), [{"up", "down"}]),
        # A ReLU that no random number happens to open is one all the same.
        (lambda m, x: m.down(F.relu(m.up(x))), [{"up", "down"}]),
        (lambda m, x: m.down(torch.relu_(m.up(x))), [{"up", "down"}]),
        # A parameter that starts at zero hides nothing.
        (lambda m, x: m.down(m.scale * m.up(x)), [{"up", "down"}]),
        (lambda m, x: m.down(m.up(x) * torch.sigmoid(m.other(x))), [{"up", "other", "down"}]),
        # Deg+ is two: another activation, or the model's own output, needs the rows too.
        (lambda m, x: (lambda y: m.down(y) + m.again(y.square()))(m.up(x)), []),
        (lambda m, x: (lambda y: (m.down(torch.tanh(y)), y))(m.up(x)), []),
        # Two readers of one activation.
        (lambda m, x: (lambda y: m.down(y) + m.again(y))(torch.tanh(m.up(x))), [{"up", "down", "again"}]),
        # Deg- is two: what the columns read comes from a layer that feeds others.
        (lambda m, x: (lambda y, z: m.down(y + z) + m.again(z.square()))(m.up(x), m.other(x)), []),
        # A norm over the channels joins them.
        (lambda m, x: m.down(m.norm(m.up(x))), []),
        (lambda m, x: m.down(torch.softmax(m.up(x), -1)), []),
        # Nothing comes in from a layer.
        (lambda m, x: m.down(torch.cat([x, x[:, :2]], 1)), []),
        # Half of the rows are used.
        (lambda m, x: m.down(torch.cat([m.up(x)[:, :4]] * 2, 1)), []),
    ],
)
def test_the_degree_rule(rule: Any, expected: list[set[str]]) -> None:
    assert _modules(Between(rule)) == expected


def test_a_second_call_of_a_layer_counts() -> None:
    """Here ``up`` is called twice, for two activations: its rows are needed by both."""

    def rule(m: Any, x: Tensor) -> Tensor:
        y = m.up(x)
        z = m.up(x + 1)
        result: Tensor = m.down(torch.tanh(y)) + m.again(z.square())
        return result

    assert _modules(Between(rule)) == []


def test_groups_of_channels_are_units() -> None:
    """A norm over groups of four rows joins those and no others."""
    (only,) = trace(Between(lambda m, x: m.down(F.group_norm(m.up(x), 2))))
    assert [(part.units, part.size) for part in only.parts] == [(2, 4), (2, 4)]


# What it must leave alone


@pytest.mark.parametrize("name", ["llama", "loom", "camera"])
def test_the_model_and_the_process_stay_as_they_were(name: str) -> None:
    made = unknown_models.model if name in unknown_models.UNKNOWN else tiny.model
    model = made(name).train()
    layers = layers_of(model)
    first = next(iter(layers.values()))
    first.eval()
    calls: list[int] = []
    first.register_forward_hook(lambda *args: calls.append(1))
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    versions = [parameter._version for parameter in model.parameters()]
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    torch.manual_seed(5)
    random.seed(5)
    expected = (torch.get_rng_state(), random.getstate())
    assert trace(model)
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]
    assert [module.training for module in model.modules()] == modes
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert [parameter._version for parameter in model.parameters()] == versions
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_forward_of_the_users_own_is_put_back() -> None:
    """Libraries that move a model to a device replace the forward of its modules."""
    model = unknown_models.model("loom")
    layer = model.strands[0].dye.wring
    own = layer.forward
    layer.forward = lambda x: own(x)  # type: ignore[method-assign]
    mine = layer.forward
    trace(model)
    assert layer.forward is mine


def test_it_finds_the_same_each_time_whatever_the_weights() -> None:
    assert trace(unknown_models.model("loom", seed=1)) == trace(unknown_models.model("loom", seed=2))
    model = unknown_models.model("loom")
    torch.manual_seed(1)
    first = trace(model)
    torch.manual_seed(2)
    assert trace(model) == first


def test_under_no_grad() -> None:
    with torch.no_grad():
        assert len(trace(unknown_models.model("loom"))) == 4


def test_structures_survive_json() -> None:
    for name in ("falcon", "bloom", "camera"):
        found = trace(unknown_models.model(name))
        assert thaw(stored(found)) == found


# Inputs, and failures


def test_examples_come_from_the_config_or_the_model() -> None:
    assert example_of(nn.Linear(3, 4)) is None
    ids = example_of(tiny.model("llama"))
    assert ids is not None
    assert ids.kwargs["use_cache"] is False
    assert ids.kwargs["input_ids"].max() < tiny.VOCABULARY
    assert not (ids.kwargs["input_ids"] == 0).any(), "padding would be masked"
    both = example_of(tiny.model("t5"))
    assert both is not None
    assert {"input_ids", "decoder_input_ids"} <= both.kwargs.keys()
    pixels = example_of(tiny.model("vit"))
    assert pixels is not None
    assert pixels.kwargs["pixel_values"].shape == (2, 3, 8, 8)
    own = nn.Linear(3, 4)
    own.example_input_array = torch.zeros(2, 3)  # type: ignore[assignment]
    assert example_of(own) == Example(args=(own.example_input_array,))
    own.example_input_array = [torch.zeros(2, 3)]  # type: ignore[assignment]
    assert len(example_of(own).args) == 1  # type: ignore[union-attr]


def _breaks(model: Any, x: Tensor) -> Tensor:
    raise RuntimeError("no thread left")


def test_a_model_that_does_not_run_says_so() -> None:
    model = Between(_breaks)
    with pytest.raises(
        TargetError, match=r"the trace of Between: a forward on made-up inputs failed: RuntimeError: no th"
    ):
        trace(model)
    assert "forward" not in vars(model.up)
    layers = layers_of(model)
    shapes = {path: weight_shape(layer) for path, layer in layers.items()}
    with pytest.warns(UserWarning, match="each targeted layer trains input columns, one by one"):
        found = discover(model, layers, shapes, {"down"})
    assert found.traced is None
    assert [each.kind for each in found.structures] == ["plain"] * 4
