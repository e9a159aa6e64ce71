"""S2FT over bases that bitsandbytes and torchao packed: the slices' gradients, the choice by weight, merge and undo."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from leantune import S2FTConfig
from leantune.core import packed_weight
from leantune.models import content_hash, quantisation
from leantune.testing.closeness import assert_close, assert_differs, assert_same
from leantune.testing.subject import gradients, no_grad_logits, objective, own_layers, start, trained
from packed_fixture import IDS, TOKENS, WAYS, load, make_llama

Way = tuple[str, str]
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture(params=WAYS, ids=IDS)
def packed(request: pytest.FixtureRequest, tmp_path: Path, text_tokenizer: Any) -> Any:
    make_llama().save_pretrained(tmp_path)
    text_tokenizer.save_pretrained(tmp_path)
    return load(tmp_path, request.param).model


@pytest.fixture
def text_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def wrap(base: Any, **options: Any) -> Any:
    settings = {"heads": 1, "channels": 5, "target_modules": TARGETS, **options}
    return get_peft_model(base, S2FTConfig(**settings)).eval()


def dense_twin(model: Any) -> Any:
    """The dequantised base in float64, with the same slices beside it."""
    inner = model.get_base_model()
    read = quantisation.weight_reader(inner)
    twin = make_llama().double()
    for path, module in list(inner.named_modules()):
        if packed_weight.is_packed(module):
            twin.get_submodule(path.removesuffix(".base_layer")).weight.data.copy_(read(module))
    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path = None
    wrapped = get_peft_model(twin, config).eval()
    with torch.no_grad():
        for name, parameter in trained(model, "default").items():
            wrapped.get_parameter(name).copy_(parameter)
    return wrapped


def test_forward_and_gradients_are_those_over_the_dequantised_base(packed: Any) -> None:
    plain = no_grad_logits(packed, TOKENS).double()
    # The twin chooses anew by its own weights: the same entries, or its gradients have other values.
    model = wrap(packed, selection="weight")
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    assert_same(no_grad_logits(model, TOKENS).double(), plain, "logits before the first step")
    start(model)
    twin = dense_twin(model)
    exact = no_grad_logits(twin, TOKENS)
    assert_close(no_grad_logits(model, TOKENS), exact, torch.float32, 4, 128, wrong=(plain,), what="logits")
    for each in (model, twin):
        objective(each.train()(input_ids=TOKENS).logits.double()).backward()
    expected = gradients(twin)
    # Sums of float32 products in another order, forward and backward through both blocks.
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name], torch.float32, 32, 128, what=name)


def test_an_evaluation_between_two_steps_changes_no_gradient(packed: Any) -> None:
    model = wrap(packed)
    start(model)
    found = []
    for _ in range(2):
        model.zero_grad()
        objective(model.train()(input_ids=TOKENS).logits).backward()
        found.append({name: gradient.clone() for name, gradient in gradients(model).items()})
        assert_differs(no_grad_logits(model.eval(), TOKENS), torch.zeros(2, 6, 40), "logits")
    for name, gradient in found[0].items():
        assert_same(found[1][name], gradient, name)


def test_merging_is_undone_bit_for_bit_with_all_that_stands_on_the_parameter(packed: Any) -> None:
    before = content_hash(packed)
    model = wrap(packed)
    start(model)
    model.add_adapter("other", S2FTConfig(heads=1, channels=2, target_modules=TARGETS, seed=3))
    start(model, "other", seed=2)
    tuned = no_grad_logits(model, TOKENS)
    layer = next(iter(own_layers(model).values())).get_base_layer()
    weight, marks = layer.weight, dict(vars(layer.weight))
    for names in (["default"], ["default", "other"]):
        model.merge_adapter(adapter_names=names)
        assert packed_weight.is_packed(layer)
        assert content_hash(model) != before
        model.unmerge_adapter()
        assert content_hash(model) == before
        assert layer.weight is weight
        # One that said it was not packed yet would be packed again when the model is moved.
        assert {name: vars(weight)[name] is value for name, value in marks.items()} == dict.fromkeys(marks, True)
        assert_same(no_grad_logits(model, TOKENS), tuned, f"logits after {names}")
    assert_same(no_grad_logits(model.unload(), TOKENS), no_grad_logits(packed, TOKENS), "the base")


def test_a_merged_adapter_is_nearer_to_the_tuned_model_than_the_base_is(packed: Any) -> None:
    plain = no_grad_logits(packed, TOKENS)
    model = wrap(packed)
    start(model)
    tuned = no_grad_logits(model, TOKENS)
    model.merge_adapter()
    assert (no_grad_logits(model, TOKENS) - tuned).norm() < 0.5 * (plain - tuned).norm()


def test_what_a_host_cast_to_16_bits_trains_in_float32_again(packed: Any) -> None:
    model = wrap(packed)
    start(model)
    parameters = list(trained(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
    for _ in range(2):
        objective(model.train()(input_ids=TOKENS).logits).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}
    # A step of this size is lost in bfloat16 beside numbers of the size of one.
    assert any(bool((parameter.bfloat16().float() != parameter).any()) for parameter in parameters)


def test_lora_beside_it_trains_too(packed: Any) -> None:
    model = get_peft_model(packed, LoraConfig(r=2, target_modules=TARGETS)).train()
    objective(model(input_ids=TOKENS).logits).backward()
    found = {name: each.grad for name, each in model.named_parameters() if "lora_B" in name}
    assert found
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found.values())
