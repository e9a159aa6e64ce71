"""``layers_to_transform`` of our adapters: the blocks that are named and no other, however the targets are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from torch import nn

import tiny
from leantune import methods
from leantune.core.errors import ConfigError, TargetError
from leantune.methods._base import AdapterConfig, AdapterLayer
from leantune.testing.closeness import assert_same
from leantune.testing.subject import start

OURS = [name for name in methods.names() if issubclass(methods.get(name).config, AdapterConfig)]


def _adapted(model: Any) -> set[str]:
    return {name for name, each in model.get_base_model().named_modules() if isinstance(each, AdapterLayer)}


def _config(name: str, **options: Any) -> Any:
    return methods.get(name).make_config(**{**methods.get(name).toy_options, **options})


@pytest.mark.parametrize("name", OURS)
def test_all_linear_in_the_blocks_that_are_chosen(name: str, tmp_path: Path) -> None:
    base = tiny.model("llama")
    inside = {path for path in tiny.linears(base) if path.startswith("model.layers.1.")}
    model = get_peft_model(base, _config(name, target_modules="all-linear", layers_to_transform=[1]))
    assert _adapted(model) == inside
    if methods.get(name).needs_batches(model.peft_config["default"]):
        return
    start(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.model("llama"), tmp_path)
    assert _adapted(loaded) == inside
    assert_same(tiny.quiet(loaded, "llama"), tiny.quiet(model, "llama"), "logits from the file")


def test_layers_outside_of_the_blocks_are_left_alone() -> None:
    """A head is a path without a dot, which PEFT takes for a whole one; blocks may be called by a name of their own."""
    model = get_peft_model(
        tiny.model("bert"),
        _config("spft", target_modules="all-linear", layers_to_transform=0, layers_pattern="layer"),
    )
    assert _adapted(model)
    assert all(path.startswith("bert.encoder.layer.0.") for path in _adapted(model))


def test_what_chooses_no_block_is_refused() -> None:
    with pytest.raises(TargetError, match=r"layers_to_transform=\[7\]; blocks that have linear modules"):
        get_peft_model(tiny.model("llama"), _config("spft", target_modules="all-linear", layers_to_transform=[7]))
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(TargetError, match="layers_to_transform=0"):
        get_peft_model(plain, _config("spft", target_modules="all-linear", layers_to_transform=0))
    with pytest.raises(ConfigError, match=r"beside the regular expression '\.\*q_proj'"):
        _config("spft", target_modules=".*q_proj", layers_to_transform=[1])
