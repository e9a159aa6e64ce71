"""Multi-LoRA beside a packed base: rows with tasks, factors that a host cast to 16 bits, exact undo of a merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from leantune import MultiLoraConfig
from leantune.kernels.grouped_linear import RowGroups, grouped_linear_reference
from leantune.testing.closeness import assert_close, assert_differs, assert_same
from leantune.testing.model import language_model
from leantune.testing.subject import logits, no_grad_logits, own_layers, start, tokens
from methods.test_quantised_base import PackedLinear, backend

__all__ = ["backend"]
ROWS = ["cola", "mrpc", "__base__", "cola"]


def made(**options: Any) -> Any:
    base = language_model("llama", torch.float32)
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, PackedLinear(module))
    config = MultiLoraConfig(r=4, alpha=8.0, target_modules=["q_proj", "down_proj"], **options)
    model = get_peft_model(base, config, adapter_name="cola")
    model.add_adapter("mrpc", config)
    model.set_requires_grad(["cola", "mrpc"])
    for seed, task in enumerate(("cola", "mrpc")):
        start(model, task, seed=seed)
    return model


def test_rows_are_those_of_the_dequantised_weights() -> None:
    model = made().train()
    model.set_row_tasks(ROWS)
    for path, layer in own_layers(model).items():
        x = torch.randn(4, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
        y = layer(x)
        groups = RowGroups.of([0, 1, None, 0], 2, torch.device("cpu"))
        factors = [layer.factor(task).double() for task in ("cola", "mrpc")]
        dense, shared = layer.dense_weight().double(), layer.shared.weight.double()
        exact = grouped_linear_reference(x.double(), dense, None, shared, factors, [2.0, 2.0], groups)
        assert_close(y, exact.detach(), torch.float32, 8, 8, wrong=[x.double() @ dense.t()], what=path)
        y.square().sum().backward()
        for task in ("cola", "mrpc"):
            assert layer.factor(task).grad is not None


@pytest.mark.parametrize("train_shared", [False, True])
def test_factors_cast_to_16_bits_are_widened_before_they_train(train_shared: bool) -> None:
    """TRL casts what trains beside a quantised base; an optimizer made before still holds the same parameters."""
    model = made(train_shared=train_shared).train()
    held = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert any("multi_lora_shared" in name for name in held) == train_shared
    for value in held.values():
        value.data = value.data.bfloat16()
    model.set_row_tasks(ROWS)
    logits(model, tokens(rows=4)).square().sum().backward()
    for name, value in model.named_parameters():
        if name in held:
            assert value is held[name]
            assert value.dtype == torch.float32
            assert value.grad is not None


def test_a_task_merged_and_taken_out_leaves_the_packed_weights() -> None:
    model = made().eval()
    weights = {path: layer.get_base_layer().weight.clone() for path, layer in own_layers(model).items()}
    before = no_grad_logits(model, tokens())
    model.merge_adapter(["cola"])
    for path, layer in own_layers(model).items():
        assert_differs(layer.get_base_layer().weight, weights[path], path)
    model.unmerge_adapter()
    for path, layer in own_layers(model).items():
        assert_same(layer.get_base_layer().weight.data, weights[path].data, path)
    assert_same(no_grad_logits(model, tokens()), before, "logits")
