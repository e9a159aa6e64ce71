"""The LoRA form: the same weights number for number, in the most portable file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import TARGETS, answers, fill, make_tokenizer, state_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import leantune
from leantune.adapters import conversion as converting
from leantune.adapters import folder as adapter_folder
from leantune.adapters import layer as layers
from leantune.core.errors import AdapterError
from leantune.models import load_base
from leantune.testing.closeness import assert_same_state

Maker = Callable[..., Any]
KINDS = ["s2ft", "lora"]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, family: str) -> PeftModel:
    """Each kind of adapter on each family."""
    return request.getfixturevalue(request.param)(family)


def dense_change(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the adapter does to each weight, found without its own formulas: outputs for unit inputs, in float64."""
    changes = {}
    for path, layer in layers.adapted_modules(model, "default"):
        layer = layer.double().eval()
        eye = torch.eye(layers.shape_of(layer)[1], dtype=torch.float64)
        with torch.no_grad():
            changes[path] = (layer(eye) - layer.get_base_layer()(eye)).T
    return changes


def products(folder: Path) -> dict[str, torch.Tensor]:
    """``B A`` of each module, from the file, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    paths = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in tensors}
    return {
        path: tensors[f"base_model.model.{path}.lora_B.weight"].double()
        @ tensors[f"base_model.model.{path}.lora_A.weight"].double()
        for path in paths
    }


def test_the_file_holds_the_change_of_every_weight(model: PeftModel, tmp_path: Path) -> None:
    done = leantune.convert_to_lora(model, tmp_path / "lora")
    changes, exported = dense_change(model), products(tmp_path / "lora")
    assert set(changes) == set(exported)
    assert done.modules == len(changes)
    for path, change in changes.items():
        assert change.abs().max() > 0.01
        torch.testing.assert_close(exported[path], change, rtol=0, atol=1e-6)


def test_s2ft_is_exact(s2ft: Maker, family: str, tmp_path: Path) -> None:
    done = leantune.convert_to_lora(s2ft(family), tmp_path / "lora")
    assert done.max_abs_error == 0
    assert done.native_bytes < done.lora_bytes == (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size


def test_stock_peft_answers_the_same(model: PeftModel, family: str, base: Maker, tmp_path: Path) -> None:
    leantune.convert_to_lora(model, tmp_path / "lora")
    with warnings.catch_warnings():
        # A wrong fan_in_fan_out makes PEFT warn and mend it; an export must not need that.
        warnings.simplefilter("error", UserWarning)
        exported = PeftModel.from_pretrained(base(family), tmp_path / "lora")
    for got, wanted in zip(answers(exported), answers(model), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)
    merged = exported.merge_and_unload()
    for got, wanted in zip(answers(merged), answers(model), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)


def test_the_model_stays_as_it_was(model: PeftModel, tmp_path: Path) -> None:
    before, random_state = state_of(model), torch.get_rng_state()
    leantune.convert_to_lora(model, tmp_path / "lora")
    assert_same_state(state_of(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_from_a_folder_it_is_the_same_file(model: PeftModel, tmp_path: Path) -> None:
    saved = adapter_folder.save(model, tmp_path / "adapter", tokenizer=make_tokenizer())
    one = leantune.convert_to_lora(saved, tmp_path / "one")
    two = leantune.convert_to_lora(model, tmp_path / "two")
    assert_same_state(
        load_file(tmp_path / "one" / "adapter_model.safetensors"),
        load_file(tmp_path / "two" / "adapter_model.safetensors"),
    )
    assert {**one.to_dict(), "folder": ""} == {**two.to_dict(), "folder": ""}
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (saved / "tokenizer.json").read_bytes()


def test_from_a_folder_no_base_weight_is_read(s2ft: Maker, base_folders: dict[str, Path], tmp_path: Path) -> None:
    saved = adapter_folder.save(s2ft(selection="weight"), tmp_path / "adapter")
    config_alone = tmp_path / "config-alone"
    config_alone.mkdir()
    (config_alone / "config.json").write_bytes((base_folders["llama"] / "config.json").read_bytes())
    done = leantune.convert_to_lora(saved, tmp_path / "lora", base=str(config_alone))
    assert done.max_abs_error == 0


def test_portable_fields(s2ft: Maker, family: str, tmp_path: Path, base_folders: dict[str, Path]) -> None:
    done = leantune.convert_to_lora(s2ft(family), tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert type(config["lora_alpha"]) is type(config["r"]) is int
    assert config["lora_alpha"] == config["r"] == done.rank == done.padded_rank
    assert config["target_modules"] == sorted(TARGETS[family])
    assert config["fan_in_fan_out"] == (family == "gpt2")
    assert config["base_model_name_or_path"] == str(base_folders[family])
    assert (config["use_rslora"], config["use_dora"], config["lora_bias"], config["bias"]) == (False,) * 3 + ("none",)
    assert (config["rank_pattern"], config["alpha_pattern"], config["modules_to_save"]) == ({}, {}, None)
    assert config["task_type"] == "CAUSAL_LM"
    plain = LoraConfig(r=1).to_dict()
    assert set(config) <= set(plain), "a field that PEFT does not know makes it warn"


def test_nothing_but_pairs_in_the_file(model: PeftModel, tmp_path: Path) -> None:
    done = leantune.convert_to_lora(model, tmp_path / "lora")
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = list(file.keys())
        shapes = {name: file.get_slice(name).get_shape() for name in names}
    stems = {name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for name in names}
    assert set(names) == {f"{stem}.lora_{side}.weight" for stem in stems for side in "AB"}
    assert all(stem.startswith("base_model.model.") and "default" not in stem for stem in stems)
    for stem in stems:
        assert shapes[f"{stem}.lora_A.weight"][0] == shapes[f"{stem}.lora_B.weight"][1] == done.padded_rank


def test_ranks_differ_so_padding_matters(s2ft: Maker) -> None:
    ranks = {
        layers.lora_factors(path, layer, "default")[1].shape[0]
        for path, layer in layers.adapted_modules(s2ft(), "default")
    }
    assert len(ranks) > 1


@pytest.mark.parametrize(("pad_rank", "rank"), [(True, 5), ("server", 8)])
def test_padding_is_zeros(pad_rank: bool | str, rank: int, lora: Maker, tmp_path: Path) -> None:
    done = leantune.convert_to_lora(lora(), tmp_path / "lora", pad_rank=pad_rank)
    assert (done.rank, done.padded_rank) == (5, rank)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        own = 5 if "down_proj" in name else 2
        kept, padding = (tensor[:own], tensor[own:]) if "lora_A" in name else (tensor[:, :own], tensor[:, own:])
        assert kept.abs().min() > 0
        assert torch.count_nonzero(padding) == 0


def test_without_padding_each_module_keeps_its_rank(model: PeftModel, family: str, base: Maker, tmp_path: Path) -> None:
    done = leantune.convert_to_lora(model, tmp_path / "lora", pad_rank=False)
    shapes = {
        t.shape[0] for name, t in load_file(done.folder / "adapter_model.safetensors").items() if "lora_A" in name
    }
    assert len(shapes) > 1
    exported = PeftModel.from_pretrained(base(family), tmp_path / "lora")
    torch.testing.assert_close(answers(exported)[0], answers(model)[0], rtol=1e-5, atol=2e-5)


def test_a_wrong_padding_is_refused(lora: Maker, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="pad_rank: 'always'"):
        leantune.convert_to_lora(lora(), tmp_path / "lora", pad_rank="always")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("start", ["pissa", "olora", "corda"])
def test_a_start_that_changed_the_base_is_refused(start: str, lora: Maker, tmp_path: Path) -> None:
    model = lora()
    model.peft_config["default"].init_lora_weights = start
    with pytest.raises(AdapterError, match="changes the base weights too"):
        leantune.convert_to_lora(model, tmp_path / "lora")


def test_rank_stabilised_scaling_is_folded_in(lora: Maker, tmp_path: Path) -> None:
    model = lora(use_rslora=True)
    leantune.convert_to_lora(model, tmp_path / "lora")
    exported = products(tmp_path / "lora")
    for path, change in dense_change(model).items():
        torch.testing.assert_close(exported[path], change, rtol=0, atol=1e-6)


def test_reduced_precision_is_reported_honestly(s2ft: Maker, tmp_path: Path) -> None:
    done = leantune.convert_to_lora(s2ft(), tmp_path / "lora", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(done.folder / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    assert 1e-5 < done.max_abs_error < 1e-2
    with pytest.raises(AdapterError, match="dtype: 'int8'"):
        leantune.convert_to_lora(s2ft(), tmp_path / "other", dtype="int8")


def test_another_adapter_of_the_model(base: Maker, s2ft: Maker, tmp_path: Path) -> None:
    first, second = s2ft(), s2ft(seed=5)
    fill(second, std=0.3)
    adapter_folder.save(second, tmp_path / "second")
    leantune.load(first, tmp_path / "second", adapter_name="other")
    leantune.convert_to_lora(first, tmp_path / "lora", adapter_name="other")
    exported = products(tmp_path / "lora")
    for path, change in dense_change(second).items():
        torch.testing.assert_close(exported[path], change, rtol=0, atol=1e-6)
    with pytest.raises(AdapterError, match="adapter 'third': not on this model"):
        leantune.convert_to_lora(first, tmp_path / "x", adapter_name="third")


@pytest.mark.parametrize("from_folder", [False, True])
def test_a_permuted_base_is_exported_in_the_layout_of_its_checkpoint(
    from_folder: bool, s2ft: Maker, base: Maker, tmp_path: Path
) -> None:
    model = s2ft(permute=True)
    assert not torch.equal(
        model.get_submodule("base_model.model.model.layers.0.mlp.down_proj").base_layer.weight,
        base().model.layers[0].mlp.down_proj.weight,
    )
    source = adapter_folder.save(model, tmp_path / "adapter") if from_folder else model
    done = leantune.convert_to_lora(source, tmp_path / "lora")
    assert done.max_abs_error == 0
    exported = PeftModel.from_pretrained(base(), tmp_path / "lora")
    torch.testing.assert_close(answers(exported)[0], answers(model)[0], rtol=1e-5, atol=2e-5)


class TestTargets:
    """Names that select exactly the adapted modules."""

    def test_leaf_names(self, s2ft: Maker, tmp_path: Path) -> None:
        assert leantune.convert_to_lora(s2ft(), tmp_path / "lora").target_modules == sorted(TARGETS["llama"])

    def test_some_layers_only(self, s2ft: Maker, base: Maker, tmp_path: Path) -> None:
        model = s2ft(target_modules=["down_proj"], layers_to_transform=[1])
        done = leantune.convert_to_lora(model, tmp_path / "lora")
        assert done.target_modules == ["1.mlp.down_proj"]
        exported = PeftModel.from_pretrained(base(), tmp_path / "lora")
        assert [path for path, _ in layers.adapted_modules(exported, "default")] == ["model.layers.1.mlp.down_proj"]

    def test_one_leaf_in_two_places(self, s2ft: Maker, tmp_path: Path) -> None:
        model = s2ft("gpt2", target_modules=["mlp.c_proj"])
        assert leantune.convert_to_lora(model, tmp_path / "lora").target_modules == ["mlp.c_proj"]


class TestRefusals:
    """What a plain LoRA cannot hold is named, and the other way out with it."""

    def test_whole_modules(self, s2ft: Maker, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match=r"whole modules beside the adapter \(lm_head\).*leantune merge"):
            leantune.convert_to_lora(s2ft(modules_to_save=["lm_head"]), tmp_path / "lora")
        assert not (tmp_path / "lora").exists()

    def test_biases(self, lora: Maker, tmp_path: Path) -> None:
        model = lora("gpt2", bias="lora_only")
        with pytest.raises(AdapterError, match=r"trains biases \(.*h\.0\.attn\.c_attn.*bias"):
            leantune.convert_to_lora(model, tmp_path / "lora")

    # PEFT takes the one-dimensional bias for a torn tensor.
    @pytest.mark.filterwarnings("ignore:Adapter 'default'. 6 LoRA tensor:UserWarning")
    @pytest.mark.parametrize(
        ("options", "words"), [({"use_dora": True}, "variant"), ({"lora_bias": True}, "a bias of its own")]
    )
    def test_variants(self, options: dict[str, Any], words: str, lora: Maker, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match=words):
            leantune.convert_to_lora(lora("gpt2", **options), tmp_path / "lora")

    def test_embeddings(self, lora: Maker, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match=r"embed_tokens: a Embedding layer has no LoRA form"):
            leantune.convert_to_lora(
                lora(target_modules=["embed_tokens"], rank_pattern={}, alpha_pattern={}), tmp_path / "lora"
            )

    def test_an_occupied_folder(self, lora: Maker, tmp_path: Path) -> None:
        (tmp_path / "lora").mkdir()
        (tmp_path / "lora" / "mine.txt").write_text("x")
        with pytest.raises(AdapterError, match="already there"):
            leantune.convert_to_lora(lora(), tmp_path / "lora")
        leantune.convert_to_lora(lora(), tmp_path / "lora", overwrite=True)
        assert not (tmp_path / "lora" / "mine.txt").exists()


class TestCard:
    """The base is named as what it is."""

    def card(self, base_facts: dict[str, Any], lora: Maker, tmp_path: Path) -> tuple[str, Any]:
        known = load_base(str(self.folder))
        for name, value in base_facts.items():
            setattr(known, name, value)
        leantune.convert_to_lora(lora(), tmp_path / "lora", base=known)
        config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
        return (tmp_path / "lora" / "README.md").read_text(), config

    @pytest.fixture(autouse=True)
    def _folder(self, base_folders: dict[str, Path]) -> None:
        self.folder = base_folders["llama"]

    def test_hub_weights_name_the_hub(self, lora: Maker, tmp_path: Path) -> None:
        facts = {"source": "hub", "hub_id": "some/model", "name": "some/model", "revision": "abc"}
        text, config = self.card(facts, lora, tmp_path)
        assert (config["base_model_name_or_path"], config["revision"]) == ("some/model", "abc")
        assert 'base_model: "some/model"' in text
        assert "base_model:adapter:some/model" in text

    def test_a_copy_says_that_it_is_one(self, lora: Maker, tmp_path: Path) -> None:
        facts = {"source": "embedded", "hub_id": "some/model", "note": "dequantised from 4 bits", "revision": "abc"}
        text, config = self.card(facts, lora, tmp_path)
        assert config["base_model_name_or_path"] == str(self.folder)
        assert config["revision"] is None
        assert "base_model:" not in text
        assert "dequantised from 4 bits" in text
        assert "not byte for byte those on the Hub" in text

    def test_without_a_record_the_model_keeps_the_name_it_was_loaded_by(self, lora: Maker, tmp_path: Path) -> None:
        """No question to the Hub: the name is passed on as PEFT itself would."""
        model = lora()
        model.get_base_model().config._name_or_path = "some/model"
        leantune.convert_to_lora(model, tmp_path / "lora")
        config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "some/model"
        assert "base_model:" not in (tmp_path / "lora" / "README.md").read_text()


class TestAdvice:
    """When another way is wiser, the export says so."""

    def test_narrow_adapters_need_none(self, base: Maker, tmp_path: Path) -> None:
        model = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"]))
        assert leantune.convert_to_lora(model, tmp_path / "lora").advice is None

    def test_wide_ones_are_better_merged(self, s2ft: Maker, tmp_path: Path) -> None:
        advice = leantune.convert_to_lora(s2ft(heads=3), tmp_path / "lora").advice
        assert advice is not None
        assert "merging is wiser" in advice
        assert "above half of the full rank" in advice

    def test_beyond_what_servers_take(self) -> None:
        model = get_peft_model(nn.Sequential(nn.Linear(4000, 4000, device="meta")), LoraConfig(target_modules=["0"]))
        layer = model.get_submodule("base_model.model.0")
        advice = converting._advice([("x", layer)], 513, 10, 10)
        assert advice is not None
        assert "513 is above 512" in advice
        assert converting._advice([("x", layer)], 512, 10, 10) is None
        assert "4.1 times" in str(converting._advice([("x", layer)], 512, 41, 10))


class TestFaults:
    """A wrong factor cannot hide: the reported error is measured against the layer's own delta."""

    def layer_class(self, model: PeftModel) -> Any:
        return type(layers.adapted_modules(model, "default")[0][1])

    @pytest.mark.parametrize("fault", ["scaling", "sign", "row"])
    def test_error_is_measured(self, fault: str, s2ft: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, kind = s2ft(target_modules=["down_proj"]), self.layer_class(s2ft())
        honest = kind.lora_factors

        def wrong(self: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
            B, A = honest(self, adapter)
            return {"scaling": (B / 2, A), "sign": (-B, A), "row": (B, A.roll(1, 1))}[fault]

        monkeypatch.setattr(kind, "lora_factors", wrong)
        assert leantune.convert_to_lora(model, tmp_path / "lora").max_abs_error > 0.05

    def test_transposed_factors_are_refused(self, s2ft: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, kind = s2ft(target_modules=["down_proj"]), self.layer_class(s2ft())
        honest = kind.lora_factors

        def swapped(self: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
            B, A = honest(self, adapter)
            return A.T, B.T

        monkeypatch.setattr(kind, "lora_factors", swapped)
        with pytest.raises(AdapterError, match="lora_factors: B A of"):
            leantune.convert_to_lora(model, tmp_path / "lora")
        assert not (tmp_path / "lora").exists()
