"""S2FT inside PEFT and transformers' own adapter interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from host_model import OPTIONS, base
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM

import tiny
from leantune import S2FTConfig
from leantune.testing.closeness import assert_differs, assert_same
from leantune.testing.subject import no_grad_logits, start, trained


def expected_logits() -> torch.Tensor:
    model = get_peft_model(base(), S2FTConfig(**OPTIONS)).eval()
    start(model)
    logits = no_grad_logits(model, tiny.ids())
    assert_differs(logits, no_grad_logits(base(), tiny.ids()), "logits")
    return logits


@pytest.mark.parametrize("lean", [False, True])
def test_from_pretrained(adapter_folder: Path, base_folder: Path, lean: bool) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base_folder)
    loaded = PeftModel.from_pretrained(plain, adapter_folder, low_cpu_mem_usage=lean).eval()
    assert_same(no_grad_logits(loaded, tiny.ids()), expected_logits(), "logits")
    assert not trained(loaded), "an adapter loaded for inference does not train"
    again = PeftModel.from_pretrained(base(), adapter_folder, is_trainable=True)
    assert trained(again)


def test_auto_peft_model_finds_base_and_method(adapter_folder: Path) -> None:
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter_folder).eval()
    assert_same(no_grad_logits(loaded, tiny.ids()), expected_logits(), "logits")


def test_auto_model_of_transformers_finds_the_adapter(adapter_folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(adapter_folder).eval()
    assert_same(no_grad_logits(loaded, tiny.ids()), expected_logits(), "logits")


# 2026-11-23: PEFT says that there are now several adapters, which is what was asked for.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_transformers_own_adapter_interface(adapter_folder: Path, base_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    plain = no_grad_logits(model, tiny.ids())
    model.load_adapter(str(adapter_folder))
    assert_same(no_grad_logits(model, tiny.ids()), expected_logits(), "logits")
    model.disable_adapters()
    assert_same(no_grad_logits(model, tiny.ids()), plain, "logits with adapters off")
    model.enable_adapters()
    model.add_adapter(S2FTConfig(heads=1, channels=2, seed=4), "other")
    model.set_adapter("other")
    assert_same(no_grad_logits(model, tiny.ids()), plain, "logits of a fresh adapter")


def test_generation(adapter_folder: Path, base_folder: Path) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(adapter_folder).eval()
    ids = tiny.ids(rows=2)
    words = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    step = ids
    for _ in range(words.shape[1] - ids.shape[1]):
        step = torch.cat([step, no_grad_logits(model, step)[:, -1:].argmax(-1)], 1)
    ended = (words == 2).cumsum(1) > 0
    assert torch.equal(words[~ended], step[~ended])


def test_generation_with_beams_and_an_adapter_for_each_row(adapter_folder: Path, base_folder: Path) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(adapter_folder).eval()
    model.add_adapter("other", S2FTConfig(heads=2, channels=4, seed=8, task_type="CAUSAL_LM"))
    start(model, "other", seed=6)
    ids = tiny.ids(rows=3)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(ids)
    alone = {"default": model.generate(input_ids=ids, **options)}
    model.set_adapter("other")
    alone["other"] = model.generate(input_ids=ids, **options)
    model.set_adapter("default")
    with model.disable_adapter():
        alone["__base__"] = model.generate(input_ids=ids, **options)
    names = ["other", "__base__", "default"]
    mixed = model.generate(input_ids=ids, adapter_names=names, **options)
    for row, name in enumerate(names):
        assert torch.equal(mixed[row], alone[name][row]), name
    assert not torch.equal(alone["default"], alone["other"])


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_classification_head_trains_and_is_saved(family: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny.model(family, torch.float32), S2FTConfig(heads=1, channels=3, task_type="SEQ_CLS"))
    assert any("classifier" in name for name in trained(model))
    optimizer = torch.optim.AdamW(trained(model).values(), lr=5e-2)
    labels = torch.tensor([0, 1, 2])
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=tiny.ids(), labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny.model(family, torch.float32), tmp_path).eval()
    assert_same(no_grad_logits(loaded, tiny.ids()), no_grad_logits(model.eval(), tiny.ids()), "logits")


def test_slices_are_float32_over_16_bits_whoever_injects_them() -> None:
    """PEFT widens adapters in get_peft_model alone; here nobody does it for the layer."""
    model = inject_adapter_in_model(S2FTConfig(**OPTIONS), base().to(torch.bfloat16))
    dtypes = {name: each.dtype for name, each in model.named_parameters() if ".s2ft_" in name}
    assert set(dtypes.values()) == {torch.float32}
