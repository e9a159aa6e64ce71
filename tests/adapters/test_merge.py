"""Merging: the adapter in the weights of a plain model, and the trained model untouched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from adapter_models import PROMPTS, answers, fill, make_gpt2, make_llama, make_tokenizer, state_of
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from leantune import S2FTConfig
from leantune.adapters import layer as layers
from leantune.adapters import merge, merging, parity, probe
from leantune.core.errors import AdapterError, ParityError
from leantune.testing.closeness import assert_same_state

Maker = Callable[..., Any]


@pytest.fixture(params=["s2ft", "lora"])
def model(request: pytest.FixtureRequest, family: str) -> PeftModel:
    """Each kind of adapter on each family."""
    return request.getfixturevalue(request.param)(family)


def merged(model: PeftModel, folder: Path, **options: Any) -> Any:
    """The merged model as stock transformers loads it."""
    merge(model, folder, verify=False, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=next(model.parameters()).dtype).eval()


def test_stock_transformers_answers_the_same(model: PeftModel, tmp_path: Path) -> None:
    plain = merged(model, tmp_path / "merged")
    for got, wanted in zip(answers(plain), answers(model), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)


def test_only_the_adapted_weights_differ_from_the_base(
    s2ft: Maker, family: str, base_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = s2ft(family)
    merge(model, tmp_path / "merged", verify=False)
    before, after = (load_file(f / "model.safetensors") for f in (base_folders[family], tmp_path / "merged"))
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    paths = {path.removeprefix("transformer.") for path, _ in layers.adapted_modules(model, "default")}
    assert {name.removesuffix(".weight").removeprefix("transformer.") for name in changed} == paths


def test_the_trained_model_stays_as_it_was(model: PeftModel, tmp_path: Path) -> None:
    model.train()
    before, classes = state_of(model), [type(module) for module in model.modules()]
    config = model.get_base_model().config.to_dict()
    merge(model, tmp_path / "merged", verify=False)
    assert_same_state(state_of(model), before)
    assert [type(module) for module in model.modules()] == classes
    assert model.get_base_model().config.to_dict() == config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_the_dtype_of_the_base(dtype: torch.dtype, base: Maker, tmp_path: Path) -> None:
    """Rounded once: the float32 delta plus the weight, then cast."""
    model = get_peft_model(
        base().to(dtype), S2FTConfig(target_modules=["down_proj"], channels=3, task_type="CAUSAL_LM")
    )
    fill(model)
    result = merge(model, tmp_path / "merged", verify=False)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert result["dtype"] == str(dtype).removeprefix("torch.")
    for path, layer in layers.adapted_modules(model, "default"):
        delta = layers.delta_weight(layer, "default")
        wanted = (layer.get_base_layer().weight.to(delta.dtype) + delta).to(dtype)
        assert torch.equal(tensors[f"{path}.weight"], wanted)


def test_whole_modules_and_biases_come_along(s2ft: Maker, lora: Maker, tmp_path: Path) -> None:
    for number, model in enumerate([s2ft(modules_to_save=["lm_head"]), lora("gpt2", bias="lora_only")]):
        fill(model, std=0.1)
        plain = merged(model, tmp_path / str(number))
        torch.testing.assert_close(answers(plain)[0], answers(model)[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_tied_embeddings_stay_tied(make: Maker, tmp_path: Path) -> None:
    targets = ["down_proj"] if make is make_llama else ["c_proj"]
    base = make(tie_word_embeddings=True)
    model = get_peft_model(base, S2FTConfig(target_modules=targets, channels=2, heads=1, task_type="CAUSAL_LM"))
    fill(model)
    plain = merged(model.eval(), tmp_path / "merged")
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    torch.testing.assert_close(answers(plain)[0], answers(model)[0], rtol=1e-5, atol=2e-5)


def test_an_adapted_head_is_untied(tmp_path: Path) -> None:
    """The head changes and the embedding does not: one tensor cannot be both."""
    base = make_llama(tie_word_embeddings=True)
    # PEFT warns that its own merge would change both.
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    fill(model)
    plain = merged(model.eval(), tmp_path / "merged")
    assert not plain.config.tie_word_embeddings
    assert base.config.tie_word_embeddings
    assert torch.equal(plain.get_input_embeddings().weight, base.get_input_embeddings().weight)
    torch.testing.assert_close(answers(plain)[0], answers(model)[0], rtol=1e-5, atol=2e-5)


def test_a_reordered_base_gives_the_same_function(s2ft: Maker, tmp_path: Path) -> None:
    model = s2ft(permute=True)
    plain = merged(model, tmp_path / "merged")
    torch.testing.assert_close(answers(plain)[0], answers(model)[0], rtol=1e-5, atol=2e-5)


def test_what_lies_beside_the_weights(s2ft: Maker, tmp_path: Path) -> None:
    model = s2ft()
    model.get_base_model().generation_config.max_new_tokens = 17
    result = merge(model, tmp_path / "merged", tokenizer=make_tokenizer(), verify=False, card={"license": "mit"})
    folder = tmp_path / "merged"
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 17
    assert (folder / "tokenizer.json").exists()
    assert 'license: "mit"' in (folder / "README.md").read_text()
    assert json.loads((folder / "leantune.json").read_text())["kind"] == "merged"
    assert result["bytes"] == (folder / "model.safetensors").stat().st_size
    assert not list(folder.glob("adapter*"))


class TestRefusals:
    """What cannot be merged says why."""

    def refused(self, model: PeftModel, folder: Path) -> str:
        with pytest.raises(AdapterError) as caught:
            merge(model, folder, verify=False)
        assert not folder.exists()
        assert not list(folder.parent.glob(".*"))
        return str(caught.value)

    def test_merged_already(self, s2ft: Maker, tmp_path: Path) -> None:
        model = s2ft()
        model.merge_adapter()
        assert "unmerge_adapter" in self.refused(model, tmp_path / "merged")

    def test_no_change_of_weights(self, base: Maker, tmp_path: Path) -> None:
        model = get_peft_model(base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        assert "prompt_tuning is no change of weights" in self.refused(model, tmp_path / "merged")

    def test_a_quantised_base(self, s2ft: Maker, tmp_path: Path) -> None:
        model = s2ft()
        model.get_base_model().hf_quantizer = object()
        assert "quantised" in self.refused(model, tmp_path / "merged")

    def test_an_adapter_that_is_not_there(self, s2ft: Maker, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="adapter 'x': not on this model"):
            merge(s2ft(), tmp_path / "merged", adapter_name="x", verify=False)

    def test_an_occupied_folder(self, s2ft: Maker, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("x")
        with pytest.raises(AdapterError, match="already there"):
            merge(s2ft(), tmp_path, verify=False)

    def test_values_that_are_no_numbers(self, s2ft: Maker, tmp_path: Path) -> None:
        model = s2ft()
        next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("nan")
        with pytest.raises(AdapterError, match=r"module model\.layers\.0.*NaNs detected"):
            merge(model, tmp_path / "merged", verify=False)
        assert not (tmp_path / "merged").exists()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the merged folder here instead of in another process, which takes seconds."""

    def ask(exported: parity.Exported, ids: Any, native: Any, scratch: Path, new_tokens: int, stop: Any) -> Any:
        plain = AutoModelForCausalLM.from_pretrained(exported.model).eval()
        for number, prompt in enumerate(ids):
            numpy.save(scratch / f"{number}.npy", probe.logits_of(plain, prompt).numpy())
        return [probe.greedy(plain, prompt, new_tokens, stop)[0] for prompt in ids]

    monkeypatch.setattr(parity, "_ask_elsewhere", ask)


def test_verified(model: PeftModel, in_this_process: None, tmp_path: Path) -> None:
    result = merge(model, tmp_path / "merged", prompts=PROMPTS, new_tokens=5, tokenizer=make_tokenizer())
    assert result["parity"]["ok"]
    assert result["parity"]["greedy_agreement"] == 1
    assert json.loads((tmp_path / "merged" / "leantune.json").read_text())["parity"] == result["parity"]
    assert "parity: max abs logit difference" in (tmp_path / "merged" / "README.md").read_text()


def test_a_merge_that_forgets_the_adapter_is_not_written(
    s2ft: Maker, base: Maker, in_this_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dict(base().state_dict())
    monkeypatch.setattr(merging, "merged_state", lambda *_: plain)
    with pytest.raises(ParityError, match="100% of the adapter's effect is lost"):
        merge(s2ft(), tmp_path / "merged", prompts=PROMPTS, new_tokens=0)
    assert not (tmp_path / "merged").exists()
