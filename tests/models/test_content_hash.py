"""The content hash moves with the weights and with nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from leantune.core.errors import ModelError
from leantune.models import content_hash
from leantune.models.content import base_tensors

# 2026-11-23: PEFT 0.21.2 asks transformers 5.23 for a property by its old name on every get_peft_model.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_it_is_a_prefixed_sha256(llama: nn.Module) -> None:
    kind, digest = content_hash(llama).split(":")
    assert kind == "sha256"
    assert len(digest) == 64
    int(digest, 16)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_saving_and_loading_keeps_it(saved: Callable[..., Path], kind: str, tmp_path: Path) -> None:
    first = AutoModelForCausalLM.from_pretrained(saved(kind))
    first.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert content_hash(first) == content_hash(again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_flipped_bit_changes_it(llama: nn.Module, dtype: torch.dtype) -> None:
    llama.to(dtype)
    before = content_hash(llama)
    weight = dict(llama.named_parameters())["model.layers.1.mlp.down_proj.weight"]
    raw = weight.detach().view(torch.uint8).reshape(-1)
    raw[-1] ^= 1
    assert content_hash(llama) != before
    raw[-1] ^= 1
    assert content_hash(llama) == before


def test_the_sign_of_a_zero_counts(llama: nn.Module) -> None:
    weight = dict(llama.named_parameters())["model.norm.weight"]
    with torch.no_grad():
        weight[0] = 0.0
        before = content_hash(llama)
        weight[0] = -0.0
    assert content_hash(llama) != before


def test_dtype_and_name_count(llama: nn.Module) -> None:
    before = content_hash(llama)
    assert content_hash(nn.ModuleDict({"inner": llama})) != before
    assert content_hash(llama.to(torch.bfloat16)) != before


def test_shape_counts_where_the_bytes_are_equal() -> None:
    flat, square = nn.Module(), nn.Module()
    flat.weight = nn.Parameter(torch.arange(4.0))
    square.weight = nn.Parameter(torch.arange(4.0).reshape(2, 2))
    assert content_hash(flat) != content_hash(square)


def test_memory_layout_does_not_count() -> None:
    dense, strided = nn.Module(), nn.Module()
    values = torch.randn(3, 5)
    dense.weight = nn.Parameter(values.clone())
    strided.weight = nn.Parameter(values.T.contiguous().T)
    assert not strided.weight.is_contiguous()
    assert content_hash(dense) == content_hash(strided)


def test_persistent_buffers_count_and_others_do_not() -> None:
    module = nn.BatchNorm1d(3)
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    buffers = dict(module.named_buffers())
    before = content_hash(module)
    buffers["scratch"] += 1
    assert content_hash(module) == before
    buffers["running_mean"] += 1
    assert content_hash(module) != before


def test_tied_weights_count_once(build: dict[str, Callable[..., Any]]) -> None:
    model = build["llama"](tied=True)
    embedding = model.model.embed_tokens.weight
    assert model.lm_head.weight is embedding
    names = [name for name, tensor in base_tensors(model) if tensor is embedding]
    assert sorted(names) == ["lm_head.weight", "model.embed_tokens.weight"]
    before = content_hash(model)
    model.lm_head.weight = nn.Parameter(embedding.detach().clone())
    assert content_hash(model) != before, "an untied head is a weight more"


ADAPTERS = {
    "lora": LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "dora": LoraConfig(target_modules=["v_proj"], use_dora=True),
    "lora on all": LoraConfig(target_modules="all-linear", init_lora_weights=False),
    "modules_to_save": LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]),
    "embedding": LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_does_not_count(build: dict[str, Callable[..., Any]], name: str, tied: bool) -> None:
    model = build["llama"](tied=tied)
    before = content_hash(model)
    wrapped = get_peft_model(model, ADAPTERS[name])
    assert content_hash(wrapped) == before
    assert content_hash(wrapped.base_model) == before
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert content_hash(wrapped) == before, "a trained adapter leaves the base alone"


def test_a_second_adapter_does_not_count(llama: nn.Module) -> None:
    before = content_hash(llama)
    wrapped = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    wrapped.add_adapter("second", LoraConfig(target_modules=["up_proj"]))
    assert content_hash(wrapped) == before


def test_a_merged_adapter_counts(llama: nn.Module) -> None:
    before = content_hash(llama)
    wrapped = get_peft_model(llama, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    merged = wrapped.merge_and_unload()
    assert content_hash(merged) != before


def test_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="meta device"):
        content_hash(module)


def test_an_empty_tensor_is_no_trouble() -> None:
    module = nn.Module()
    module.empty = nn.Parameter(torch.zeros(0, 3))
    module.scalar = nn.Parameter(torch.tensor(1.5))
    assert content_hash(module).startswith("sha256:")
