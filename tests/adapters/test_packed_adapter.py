"""Adapters trained over a packed base: loaded only over it, merged into plain numbers, exported for stock PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import fill, make_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from leantune import S2FTConfig, adapters
from leantune.adapters import parity
from leantune.core import packed_weight
from leantune.core.errors import AdapterError
from leantune.models import load_base, quantisation
from leantune.testing.closeness import assert_close
from packed_fixture import IDS, TOKENS, WAYS, load, make_llama

Way = tuple[str, str]
TARGETS = ["o_proj", "down_proj", "up_proj"]
PROMPTS = [[5, 9, 13, 21], [7, 3], [30, 31, 32, 33, 34, 35, 11]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    make_llama().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def ask_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the merged model in this process: another one takes seconds."""

    def ask(exported: Any, ids: Any, native: Any, scratch: Path, *rest: Any) -> list[list[int]]:
        import numpy

        from leantune.adapters import probe

        model = AutoModelForCausalLM.from_pretrained(exported.model).eval()
        for number, prompt in enumerate(ids):
            numpy.save(scratch / f"{number}.npy", probe.logits_of(model, prompt).numpy())
        return [probe.greedy(model, prompt, rest[0], rest[1])[0] for prompt in ids]

    monkeypatch.setattr(parity, "_ask_elsewhere", ask)


def trained(folder: Path, way: Way, method: str = "s2ft") -> tuple[Any, Any]:
    """The base and a model that carries a trained-looking adapter."""
    base = load(folder, way)
    config: Any = S2FTConfig(heads=1, channels=6, target_modules=TARGETS, task_type="CAUSAL_LM")
    if method == "lora":
        config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base.model, config)
    fill(model, 0.1)
    return base, model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def test_an_adapter_goes_back_over_the_same_packed_base_alone(folder: Path, tmp_path: Path) -> None:
    base, model = trained(folder, WAYS[0])
    expected = logits(model)
    saved = adapters.save(model, tmp_path / "adapter", base=base, tokenizer=base.tokenizer)
    facts = json.loads((saved / "leantune.json").read_text(encoding="utf-8"))["base"]
    assert facts["quantization"] == base.quantisation.to_dict()
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert f"4 bits, bitsandbytes {base.quantisation.version}, nf4" in card
    assert torch.equal(logits(adapters.load(None, saved)), expected)
    assert torch.equal(logits(adapters.load(load(folder, WAYS[0]), saved)), expected)
    with pytest.raises(AdapterError, match=r"4bit by bitsandbytes.*not quantised.*with quantization='4bit'"):
        adapters.load(load_base(folder), saved)
    with pytest.raises(AdapterError, match=r"4bit by bitsandbytes.*8bit by bitsandbytes"):
        adapters.load(load(folder, WAYS[1]), saved)
    assert not [path for path in load_file(saved / "adapter_model.safetensors") if "base_layer" in path]


def test_a_changed_scale_is_another_base(folder: Path, tmp_path: Path) -> None:
    base, model = trained(folder, WAYS[0])
    saved = adapters.save(model, tmp_path / "adapter", base=base)
    plain = load_file(folder / "model.safetensors")
    plain["model.layers.0.mlp.down_proj.weight"][0, :64] *= 2
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    # Twice the numbers are the same bits of a block under another scale.
    save_file(plain, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="loaded over another base"):
        adapters.load(load(other, WAYS[0]), saved)


@pytest.mark.parametrize("method", ["s2ft", "lora"])
@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_a_merged_model_is_plain_and_gives_the_same_answers(
    folder: Path, tmp_path: Path, way: Way, method: str, ask_here: None
) -> None:
    base, model = trained(folder, way, method)
    result = adapters.merge(model, tmp_path / "merged", base=base, prompts=PROMPTS, new_tokens=4)
    assert result["parity"]["ok"]
    assert result["merged_onto"] == "the dequantised base"
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text(encoding="utf-8"))
    merged = load_base_without_tokenizer(tmp_path / "merged")
    assert not any(packed_weight.is_packed(module) for module in merged.modules())
    read = quantisation.weight_reader(model.get_base_model())
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    expected = read(layer.get_base_layer()) + layer.get_delta_weight("default")
    weight = merged.model.layers[0].mlp.down_proj.weight
    assert_close(weight.detach(), expected.detach().double(), torch.float32, 1, 1, what="merged weight")
    untouched = model.get_base_model().model.layers[0].self_attn.k_proj
    assert torch.equal(merged.model.layers[0].self_attn.k_proj.weight, read(untouched))


def load_base_without_tokenizer(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_merging_onto_the_original_says_how_far_it_is(folder: Path, tmp_path: Path, ask_here: None) -> None:
    base, model = trained(folder, WAYS[0])
    plain = load_base(folder).model
    result = adapters.merge(model, tmp_path / "merged", base=base, onto=plain, prompts=PROMPTS, new_tokens=4)
    assert result["merged_onto"] == "the original base, before quantisation"
    # Rounding to four bits is no rounding of sums: it is measured, and it does not pass for the same answers.
    assert not result["parity"]["ok"]
    assert result["parity"]["mean_kl"] > 0
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    expected = plain.model.layers[0].mlp.down_proj.weight + layer.get_delta_weight("default")
    weight = load_base_without_tokenizer(tmp_path / "merged").model.layers[0].mlp.down_proj.weight
    assert_close(weight.detach(), expected.detach().double(), torch.float32, 1, 1, what="merged weight")
    assert "the original base" in (tmp_path / "merged/README.md").read_text(encoding="utf-8")


def test_of_a_run_that_was_not_quantised_there_is_no_other_original(folder: Path, tmp_path: Path) -> None:
    base = load_base(folder)
    model = get_peft_model(base.model, S2FTConfig(channels=3, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    adapters.save(model, tmp_path / "adapter", base=base)
    with pytest.raises(AdapterError, match=r"not quantised.*leave it out"):
        adapters.merge_run(tmp_path / "adapter", tmp_path / "merged", onto="original")
    with pytest.raises(AdapterError, match="did you mean 'original'"):
        adapters.merge_run(tmp_path / "adapter", tmp_path / "merged", onto="orginal")


@pytest.mark.parametrize("way", WAYS[:2], ids=IDS[:2])
def test_stock_peft_in_another_process_gives_the_same_answers_as_lora(folder: Path, tmp_path: Path, way: Way) -> None:
    base, model = trained(folder, way)
    adapters.save(model, tmp_path / "adapter", base=base, tokenizer=base.tokenizer)
    result = adapters.export_run(tmp_path / "adapter", tmp_path / "lora", new_tokens=4)
    assert result["parity"]["ok"]
    assert result["conversion"]["max_abs_error"] == 0


def test_a_fresh_process_gives_the_same_bits(folder: Path, tmp_path: Path) -> None:
    base, model = trained(folder, WAYS[0])
    saved = adapters.save(model, tmp_path / "adapter", base=base, tokenizer=base.tokenizer)
    code = (
        "import sys, torch, leantune; torch.set_num_threads(1); from safetensors.torch import save_file;"
        "model = leantune.load(None, sys.argv[1]).eval();"
        f"ids = torch.tensor({TOKENS.tolist()});"
        "save_file({'logits': model(input_ids=ids).logits.detach().contiguous()}, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(saved), str(tmp_path / "out")], check=True, capture_output=True)
    assert torch.equal(load_file(tmp_path / "out")["logits"], logits(model))
