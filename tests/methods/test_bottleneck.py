"""Series and parallel adapters beyond the contract: where they stand, what they compute, what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

import leantune
import tiny
from leantune import BottleneckConfig
from leantune.adapters import merging
from leantune.core.errors import AdapterError, ConfigError, TargetError
from leantune.methods import get
from leantune.methods.bottleneck import BottleneckLinear
from leantune.testing.closeness import assert_close, assert_differs, assert_same
from leantune.testing.subject import start

BLOCKS = range(tiny.LAYERS)
WHERE = {
    "llama": ("model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"),
    "gpt2": ("transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.c_proj"),
    "bert": ("bert.encoder.layer.{}.intermediate.dense", "bert.encoder.layer.{}.output.dense"),
    "opt": ("model.decoder.layers.{}.fc1", "model.decoder.layers.{}.fc2"),
    "phi3": ("model.layers.{}.mlp.gate_up_proj", "model.layers.{}.mlp.down_proj"),
}


def _layers(model: Any) -> dict[str, BottleneckLinear]:
    return {name: each for name, each in model.get_base_model().named_modules() if isinstance(each, BottleneckLinear)}


@pytest.mark.parametrize("family", WHERE)
@pytest.mark.parametrize("placement", ["series", "parallel"])
def test_default_places_are_the_feed_forward_networks(family: str, placement: str) -> None:
    model = get_peft_model(tiny.model(family), BottleneckConfig(placement=placement, bottleneck_size=3))
    up, down = WHERE[family]
    sides = (down,) if placement == "series" else (up, down)
    assert set(_layers(model)) == {side.format(block) for side in sides for block in BLOCKS}


def test_the_share_of_llama_7b_is_that_of_the_tables() -> None:
    """0.99% and 3.54% of LLaMA-7B in LLM-Adapters and in S2FT's table 1, adapter included in the whole."""
    base, blocks, hidden, inner = 6_738_415_616, 32, 4096, 11008
    found = {}
    for name, shapes in (
        ("series-adapter", [(hidden, inner)]),
        ("parallel-adapter", [(inner, hidden), (hidden, inner)]),
    ):
        method = get(name)
        each = sum(method.trainable_parameters(method.make_config(), *shape) for shape in shapes)
        found[name] = 100 * blocks * each / (base + blocks * each)
    assert round(found["series-adapter"], 2) == 0.99
    assert round(found["parallel-adapter"], 2) == 3.54


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("non_linearity", ["tanh", "relu", "gelu", "silu"])
@pytest.mark.parametrize("placement", ["series", "parallel"])
def test_the_formula(placement: str, non_linearity: str, with_bias: bool) -> None:
    config = BottleneckConfig(
        target_modules=["0"],
        placement=placement,
        bottleneck_size=3,
        non_linearity=non_linearity,
        scaling=0.5,
        with_bias=with_bias,
    )
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)).double(), config)
    start(model)
    layer = next(iter(_layers(model).values()))
    x = torch.randn(4, 6, dtype=torch.float64)
    y = layer.base_layer(x)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    assert (down.bias is not None) == with_bias
    function = getattr(torch, non_linearity, None) or getattr(nn.functional, non_linearity)
    inner = (y if placement == "series" else x) @ down.weight.T + (down.bias if with_bias else 0)
    exact = y + 0.5 * (function(inner) @ up.weight.T + (up.bias if with_bias else 0))
    wrong = (y.detach(), (2 * exact - y).detach())
    assert_close(model(x), exact.detach(), torch.float64, 4, 8, wrong=wrong, what=placement)


def test_series_adapters_that_are_active_together_follow_each_other() -> None:
    config = BottleneckConfig(target_modules=["0"], bottleneck_size=3)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)).double(), config)
    model.add_adapter("other", BottleneckConfig(target_modules=["0"], bottleneck_size=3))
    start(model, "default")
    start(model, "other", seed=2)
    layer = next(iter(_layers(model).values()))
    x = torch.randn(4, 6, dtype=torch.float64)
    first = layer.add_share("default", x, layer.base_layer(x))
    model.base_model.set_adapter(["default", "other"])
    assert_same(model(x).detach(), layer.add_share("other", x, first).detach())
    assert_differs(model(x).detach(), first.detach())


@pytest.mark.parametrize("name", ["series-adapter", "parallel-adapter"])
def test_merging_and_the_lora_form_are_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    base = tiny.model("llama", torch.float32)
    method = get(name)
    model = method.apply(base, method.make_config(bottleneck_size=3, task_type="CAUSAL_LM"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sentence = (
        "adapter 'default': a bottleneck is not linear, so that no weight of the base can hold it; "
        "a change of weights; keep the adapter beside the base"
    )
    for call in (
        model.merge_adapter,
        model.merge_and_unload,
        next(iter(_layers(model).values())).merge,
        lambda: merging.merge(model, tmp_path / "merged"),
        lambda: leantune.convert_to_lora(model, tmp_path / "lora"),
    ):
        with pytest.raises(AdapterError) as refused:
            call()
        assert sentence in str(refused.value)
    assert not list(tmp_path.iterdir())
    for key, value in model.state_dict().items():
        assert_same(value, before[key], key)


def test_presets_are_told_apart_by_their_config() -> None:
    from leantune.methods import of_config

    assert of_config(BottleneckConfig()).name == "series-adapter"
    assert of_config(BottleneckConfig(placement="parallel")).name == "parallel-adapter"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "serial"}, "series"),
        ({"non_linearity": "reul"}, "relu"),
        ({"bottleneck_size": 0}, "a width from 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BottleneckConfig(**options)


def test_a_model_of_no_known_family_needs_targets() -> None:
    with pytest.raises(TargetError, match="target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), BottleneckConfig())
