"""Bases in 4 and 8 bits, packed by the real libraries: what is packed, what it weighs, and its hash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel, BitsAndBytesConfig

from leantune.core import packed_weight
from leantune.core.errors import DependencyError, ModelError
from leantune.models import content_hash, load_base, quantisation
from packed_fixture import IDS, TOKENS, WAYS, load, make_llama, need

Way = tuple[str, str]
LINEARS = 14


def make_bert() -> BertModel:
    settings = {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertModel(BertConfig(**settings, intermediate_size=128, max_position_embeddings=64))


ENCODERS: dict[str, Callable[[], Any]] = {"bert": make_bert, "llama": make_llama}


@pytest.fixture
def folder(saved: Callable[..., Path]) -> Path:
    return saved("llama", model=make_llama())


def gradient_below(model: Any) -> torch.Tensor:
    """Of the embedded input, through every packed layer, in training mode."""
    x = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    model.train()(inputs_embeds=x, use_cache=False).logits.square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_blocks_are_packed_and_nothing_else(folder: Path, way: Way) -> None:
    base = load(folder, way)
    packed = {name for name, module in base.model.named_modules() if packed_weight.is_packed(module)}
    assert len(packed) == LINEARS
    assert all(".layers." in name for name in packed)
    found = base.quantisation
    assert found is not None
    assert (found.name, found.backend, found.modules) == (*way, LINEARS)
    plain = make_llama()
    weights = sum(plain.get_submodule(name).weight.numel() for name in packed)
    assert found.dense_bytes == 4 * weights
    # A scale for 64 numbers in about a byte and the table of levels, or a scale for each row.
    assert weights * found.bits / 8 < found.packed_bytes < weights * (found.bits / 8 + 0.05) + 2000 * LINEARS
    outside = {id(each): each for name, each in plain.named_parameters() if name.removesuffix(".weight") not in packed}
    buffers = sum(each.numel() for each in plain.buffers())
    assert found.other_bytes == 4 * (sum(each.numel() for each in outside.values()) + buffers)
    assert base.note is not None
    assert f"{found.bits} bits" in base.note
    assert found.version in base.note
    assert quantisation.parameter_count(base.model) == sum(each.numel() for each in plain.parameters())
    assert load_base(folder).quantisation is None


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_weights_are_rounded_and_no_more(folder: Path, way: Way) -> None:
    base, plain = load(folder, way), make_llama()
    read = quantisation.weight_reader(base.model)
    # Of a block's largest number: half of the widest gap between two levels of nf4; half a step of 8 bits, and the
    # float16 that bitsandbytes rounds to before.
    bound = {"4bit": 0.16, "8bit": 0.5 / 127 + 2**-11}[way[0]]
    for name, module in base.model.named_modules():
        if packed_weight.is_packed(module):
            exact = plain.get_submodule(name).weight
            error = (read(module) - exact).abs().max()
            assert 0 < error < bound * exact.abs().max()


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_the_hash_is_of_bits_and_scales_and_survives_use(folder: Path, way: Way) -> None:
    base = load(folder, way)
    assert load(folder, way).content_hash == base.content_hash == content_hash(base.model)
    assert load_base(folder).content_hash != base.content_hash
    base.model.train()(TOKENS)
    base.model.eval()(TOKENS)
    with torch.no_grad():
        base.model(TOKENS)
    assert content_hash(base.model) == base.content_hash
    layer = base.model.model.layers[1].mlp.down_proj
    for name, part in packed_weight.parts(layer):
        if part.numel() < 2 or "quant_map" in name or "quant_state" in name:  # constants, and a copy made on asking
            continue
        kept = part.clone()
        part.view(torch.uint8).view(-1)[3] ^= 1
        assert content_hash(base.model) != base.content_hash, name
        part.copy_(kept)
        assert content_hash(base.model) == base.content_hash


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_training_and_evaluation_compute_one_function_in_any_order(folder: Path, way: Way) -> None:
    model = load(folder, way).model
    trained = model.train()(TOKENS).logits.detach()
    gradient = gradient_below(model)
    with torch.inference_mode():
        evaluated = model.eval()(TOKENS).logits
    assert torch.equal(evaluated, trained)
    # After an evaluation too: bitsandbytes left alone repacks its weights then, and has no gradient from there on.
    assert torch.equal(gradient_below(model), gradient)


def test_layers_that_transformers_loaded_are_steadied(folder: Path) -> None:
    need("bitsandbytes")
    for options in ({"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}, {"load_in_8bit": True}):
        config = BitsAndBytesConfig(**options)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
        four = "load_in_4bit" in options
        layers = [module for module in model.modules() if packed_weight.is_packed(module)]
        if four:
            for layer in layers:
                layer.support_avx512bf16_for_cpu = True
        assert packed_weight.steady(model) == len(layers) == LINEARS
        assert packed_weight.steady(model) == 0
        model.eval()
        assert all(not layer.support_avx512bf16_for_cpu if four else layer.training for layer in layers)


@pytest.mark.parametrize(("task", "kind"), [("classification", "bert"), ("classification", "llama")])
def test_heads_are_not_packed(saved: Callable[..., Path], task: str, kind: str) -> None:
    base = load(saved(kind, model=ENCODERS[kind]()), WAYS[0], task=task, num_labels=3)
    packed = [name for name, module in base.model.named_modules() if packed_weight.is_packed(module)]
    assert packed
    assert not [name for name in packed if "classifier" in name or "score" in name or "pooler" in name]
    heads = {name.rpartition(".")[0] for name in base.new_parameters}
    assert heads
    assert all(base.model.get_submodule(name).weight.dtype == torch.float32 for name in heads)


def test_a_base_saved_packed_is_read_packed(folder: Path, saved: Callable[..., Path], tmp_path: Path) -> None:
    base = load(folder, WAYS[0])
    base.model.save_pretrained(tmp_path / "packed")
    base.tokenizer.save_pretrained(tmp_path / "packed")
    again = load_base(tmp_path / "packed", device="cpu")
    assert again.quantisation == base.quantisation
    with torch.no_grad():
        assert torch.equal(again.model(TOKENS).logits, base.model(TOKENS).logits)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"quantization": "5bit"}, "quantization: '5bit'; one of none, 4bit, 8bit; did you mean"),
        ({"quantization": "4bit", "quantization_backend": "torchau"}, "did you mean 'torchao'"),
        ({"quantization": "4bit", "quantization_backend": "torchao"}, "need CUDA kernels"),
        ({"quantization": "8bit", "dtype": "float64"}, "dtype: float64 with quantization '8bit'"),
        ({"quantization": "8bit", "dtype": "auto"}, "dtype: auto with quantization '8bit'"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, options: dict[str, str], text: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_base(folder, **options)  # type: ignore[arg-type]
    assert text in str(caught.value)


def test_widths_that_the_library_unpacks_wrongly_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation, "_keeps_numbers", lambda width: width != 128)
    with pytest.raises(ModelError, match=r"2 layers such as model\.layers\.0\.mlp\.down_proj \(128 inputs\).*'8bit'"):
        load(folder, WAYS[0])
    assert load(folder, WAYS[1]).quantisation is not None


@pytest.mark.parametrize("width", [48, 64, 100])
def test_whether_numbers_come_back_is_found_out(width: int) -> None:
    need("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    numbers = torch.randn((64, width), generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(numbers, blocksize=64, compress_statistics=False, quant_type="nf4")
    bytes_ = packed.flatten().long()
    levels = state.code[torch.stack([bytes_ >> 4, bytes_ & 15], dim=1).flatten()]
    by_hand = (levels.view(-1, 64) * state.absmax[:, None]).view(64, width)
    # The packed bits are right at every width; what a kernel makes of them is the question.
    assert (by_hand - numbers).norm() < 0.12 * numbers.norm()
    kernel = dequantize_4bit(packed, state)
    assert quantisation._keeps_numbers(width) == torch.allclose(kernel, by_hand, atol=1e-5)


def test_a_library_that_is_missing_is_named_with_the_fix(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"bitsandbytes: not installed; .* 4bit base; .*leantune\[quant\]"):
        load_base(folder, quantization="4bit")


def test_the_first_library_that_is_installed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torchao"}
    monkeypatch.setattr(quantisation, "find_spec", lambda name: name if name in installed else None)
    assert quantisation.resolve("8bit") == "torchao"
    installed.add("bitsandbytes")
    assert quantisation.resolve("8bit") == "bitsandbytes"
    assert quantisation.resolve("8bit", "torchao") == "torchao"
    assert quantisation.resolve("none") == "auto"
