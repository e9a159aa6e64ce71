"""Facts about a model agree with the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from leantune.core.errors import ModelError
from leantune.models import facts, load_base


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_they_agree_with_the_loaded_model(saved: Callable[..., Path], kind: str) -> None:
    folder = saved(kind)
    found, model = facts(folder), load_base(folder).model
    assert json.loads(json.dumps(found)) == found
    assert found["parameters"] == model.num_parameters()
    assert found["float32_bytes"] == 4 * model.num_parameters()
    assert found["architecture"] == type(model).__name__
    assert found["tied_embeddings"]
    assert sum(found["file_bytes"].values()) == 4 * model.num_parameters()
    for row in found["modules"]:
        shape = (row["out"], row["in"]) if row["kind"] == "Linear" else (row["in"], row["out"])
        modules = [
            module
            for path, module in model.named_modules()
            if path.split(".")[-1] == row["name"] and tuple(module.weight.shape) == shape
        ]
        assert len(modules) == row["count"]
        assert all((module.bias is not None) == row["bias"] for module in modules)
        assert row["parameters"] == sum(p.numel() for module in modules for p in module.parameters())


def test_the_dimensions_of_grouped_query_attention(saved: Callable[..., Path]) -> None:
    found = facts(saved("llama"))
    expected = {"layers": 2, "hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "head_dim": 16}
    assert {name: found[name] for name in expected} == expected
    assert (found["vocab"], found["max_length"], found["model_type"]) == (260, 128, "llama")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    assert [row["name"] for row in found["modules"]] == names


def test_leaves_of_two_shapes_are_two_rows(saved: Callable[..., Path]) -> None:
    rows = [row for row in facts(saved("bert"))["modules"] if row["name"] == "dense"]
    assert sorted((row["out"], row["in"], row["count"]) for row in rows) == [(32, 32, 3), (32, 48, 2), (48, 32, 2)]


def test_mixed_dtypes_in_the_file(saved: Callable[..., Path], build: dict[str, Callable[..., Any]]) -> None:
    model = build["llama"]().to(torch.bfloat16)
    model.model.norm.to(torch.float32)
    found = facts(saved("llama", model=model))
    assert found["file_bytes"] == {"bfloat16": 2 * (model.num_parameters() - 64), "float32": 4 * 64}


def test_an_untied_head_is_counted(saved: Callable[..., Path], build: dict[str, Callable[..., Any]]) -> None:
    model = build["llama"](tied=False)
    found = facts(saved("llama", model=model))
    assert not found["tied_embeddings"]
    assert found["parameters"] == model.num_parameters()


def test_a_chosen_padding_token_is_said(saved: Callable[..., Path]) -> None:
    found = facts(saved("llama", specials={"eos_token": "</s>"}))
    assert found["pad_token"] == "</s>"
    assert "no padding token" in found["pad_note"]
    assert not found["chat_template"]


def test_torn_weights_are_named(saved: Callable[..., Path]) -> None:
    folder = saved("llama")
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ModelError, match="a complete safetensors file"):
        facts(folder)


def test_a_config_that_builds_no_model_is_named(saved: Callable[..., Path]) -> None:
    folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    config["num_attention_heads"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="llama"):
        facts(folder)
