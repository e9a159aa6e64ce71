"""Saved tensors come back bit for bit, into the very parameters that were there, or not at all."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import tiny
from leantune import S2FTConfig
from leantune.adapters.restoration import native_errors, restore
from leantune.core.errors import AdapterError, MethodError

TARGETS = ["o_proj", "down_proj"]


def make(method: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Any:
    """An adapter over a bfloat16 base, with values as after training."""
    if method == "lora":
        config: Any = LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM")
    else:
        config = S2FTConfig(channels=4, heads=1, target_modules=TARGETS)
    model = get_peft_model(tiny.model("llama", dtype), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("method", ["lora", "s2ft"])
def test_float32_over_bfloat16_comes_back_to_the_bit(method: str, tmp_path: Path) -> None:
    saved, model = make(method, seed=1), make(method, seed=2)
    saved.save_pretrained(tmp_path)
    before = {name: id(each) for name, each in model.named_parameters() if each.requires_grad}
    restore(model, tmp_path)
    wanted, found = get_peft_model_state_dict(saved), get_peft_model_state_dict(model)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert tensor.dtype == found[name].dtype
        assert tensor.equal(found[name]), name
    assert {name: id(each) for name, each in model.named_parameters() if each.requires_grad} == before
    assert {each.dtype for each in model.parameters() if each.requires_grad} == {torch.float32}


@pytest.mark.parametrize("fault", ["missing", "surplus", "shape", "dtype", "nan", "torn"])
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(fault: str, tmp_path: Path) -> None:
    make("lora", seed=1).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    if fault == "missing":
        del tensors[name]
    elif fault == "surplus":
        tensors["nowhere.weight"] = torch.zeros(2)
    elif fault == "shape":
        tensors[name] = tensors[name][:1].clone()
    elif fault == "dtype":
        tensors[name] = tensors[name].bfloat16()
    elif fault == "nan":
        tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    if fault == "torn":
        path.write_bytes(path.read_bytes()[:-9])
    model = make("lora", seed=2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError):
        restore(model, tmp_path)
    for key, tensor in model.state_dict().items():
        assert tensor.equal(before[key]), key


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (SafetensorError("Error while serializing: something else"), errno.EIO),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), errno.EIO),
        (Exception("No space left on device (os error 28)"), errno.ENOSPC),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
    ],
)
def test_what_native_writers_raise_becomes_the_error_it_is(error: Exception, number: int, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"\w") as caught, native_errors(tmp_path):
        raise error
    assert caught.value.errno == number
    assert caught.value.filename == str(tmp_path)


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), Exception("else"), MethodError("a; b; c")])
def test_other_errors_pass(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, native_errors(tmp_path):
        raise error
    assert caught.value is error
