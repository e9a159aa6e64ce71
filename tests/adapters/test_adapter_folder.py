"""The adapter folder: what is saved is what is loaded, and whatever is wrong is said before the base is changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import answers, fill, make_llama, make_tokenizer, state_of
from peft import PeftModel
from safetensors.torch import load_file, save_file

import leantune
from leantune.adapters import folder as adapter_folder
from leantune.core.errors import AdapterError
from leantune.models import load_base
from leantune.testing.closeness import assert_same_state

Maker = Callable[..., Any]


@pytest.fixture
def saved(s2ft: Maker, tmp_path: Path) -> Path:
    return adapter_folder.save(s2ft(), tmp_path / "adapter")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(base: Any, folder: Path, **options: Any) -> str:
    """The error text of a refused load, after which the base is bit for bit as before."""
    before, modules = state_of(base), [type(module) for module in base.modules()]
    with pytest.raises(AdapterError) as caught:
        leantune.load(base, folder, **options)
    assert_same_state(state_of(base), before)
    assert [type(module) for module in base.modules()] == modules
    assert not hasattr(base, "peft_config") or isinstance(base, PeftModel)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["s2ft", "lora"])
def test_what_is_saved_is_what_is_loaded(
    kind: str, family: str, base: Maker, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)(family)
    adapter_folder.save(model, tmp_path / "adapter")
    loaded = leantune.load(base(family), tmp_path / "adapter")
    for got, wanted in zip(answers(loaded), answers(model), strict=True):
        assert torch.equal(got, wanted)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_stock_peft_reads_the_folder(saved: Path, base: Maker, s2ft: Maker) -> None:
    loaded = PeftModel.from_pretrained(base(), saved)
    assert torch.equal(answers(loaded)[0], answers(s2ft())[0])


def test_loaded_to_go_on_training(saved: Path, base: Maker) -> None:
    loaded = leantune.load(base(), saved, trainable=True)
    trained = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("s2ft_" in name for name in trained)


def test_a_second_adapter_beside_the_first(saved: Path, lora: Maker, s2ft: Maker, base: Maker, tmp_path: Path) -> None:
    other = s2ft(seed=3)
    fill(other, std=0.1)
    adapter_folder.save(other, tmp_path / "other")
    model = leantune.load(base(), saved, adapter_name="first")
    assert leantune.load(model, tmp_path / "other", adapter_name="second", trainable=True) is model
    assert torch.equal(answers(model)[0], answers(s2ft())[0])
    model.set_adapter("second")
    assert torch.equal(answers(model)[0], answers(other)[0])
    assert "already on this model" in refused(model, saved, adapter_name="second")


def test_a_refused_second_adapter_leaves_the_first(saved: Path, base: Maker) -> None:
    model = leantune.load(base(), saved)
    rewrite(saved, lambda tensors: tensors.popitem())
    refused(model, saved, adapter_name="second")
    assert list(model.peft_config) == ["default"]


def test_any_adapter_is_saved_flat(saved: Path, base: Maker, tmp_path: Path) -> None:
    model = leantune.load(base(), saved, adapter_name="other")
    adapter_folder.save(model, tmp_path / "flat", adapter_name="other")
    assert sorted(path.name for path in (tmp_path / "flat").iterdir()) == sorted(path.name for path in saved.iterdir())
    assert torch.equal(answers(leantune.load(base(), tmp_path / "flat"))[0], answers(model)[0])


def test_tokenizer_and_template_travel_along(s2ft: Maker, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    folder = adapter_folder.save(s2ft(), tmp_path / "adapter", tokenizer=tokenizer)
    assert (folder / "tokenizer.json").exists()
    assert (folder / "chat_template.jinja").read_text() == tokenizer.chat_template


def test_no_base_weight_enters_the_file(saved: Path) -> None:
    names = load_file(saved / "adapter_model.safetensors")
    assert names
    assert all(".s2ft_slice." in name and "base_layer" not in name for name in names)


def test_an_older_adapter_is_replaced_and_nothing_else_is(s2ft: Maker, saved: Path, tmp_path: Path) -> None:
    adapter_folder.save(s2ft(seed=4), saved)
    assert json.loads((saved / "adapter_config.json").read_text())["seed"] == 4
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "a.jpg").write_text("x")
    with pytest.raises(AdapterError, match="a folder of other files"):
        adapter_folder.save(s2ft(), precious)
    assert (precious / "a.jpg").exists()


def test_a_diverged_adapter_does_not_replace_a_good_one(s2ft: Maker, saved: Path) -> None:
    good = (saved / "adapter_model.safetensors").read_bytes()
    model = s2ft()
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"1 of \d+ values are not finite.*lower the learning rate"):
        adapter_folder.save(model, saved)
    assert (saved / "adapter_model.safetensors").read_bytes() == good
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_every_problem_is_in_one_error(saved: Path, base: Maker) -> None:
    names = sorted(load_file(saved / "adapter_model.safetensors"))
    weights = [name for name in names if name.endswith("weight")]

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[weights[0]]
        tensors[weights[1]] = tensors[weights[1]][:, :-1].contiguous()
        tensors[weights[2]][0, 0] = float("inf")
        tensors["base_model.model.model.norm.weight"] = torch.zeros(16)
        tensors["base_model.model.nowhere.weight"] = torch.zeros(2)

    rewrite(saved, spoil)
    text = refused(base(), saved)
    assert text.startswith("5 problems:")
    assert f"{weights[0]}: missing; shape" in text
    assert f"{weights[1]}: shape" in text
    assert f"{weights[2]}: 1 of " in text
    assert "model.norm.weight: a weight of the base model" in text
    assert "nowhere.weight: belongs to no module of this adapter" in text


def test_a_renamed_tensor_suggests_its_name(saved: Path, base: Maker) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("weight"))
        tensors[name.replace("s2ft_slice", "s2ft_slices")] = tensors.pop(name)

    rewrite(saved, rename)
    assert "did you mean" in refused(base(), saved)


@pytest.mark.parametrize(
    ("values", "words"), [([0, 1, 99], "0 to 99; 0 to"), ([-1, 1, 2], "-1 to 2"), ([1, 1, 2], "twice")]
)
def test_indices_that_name_no_entry_are_refused(values: list[int], words: str, saved: Path, base: Maker) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "down_proj" in name and name.endswith("index"))
        tensors[name] = torch.tensor(values)

    rewrite(saved, spoil)
    text = refused(base(), saved)
    assert words in text
    assert "down_proj" in text


def test_the_file_decides_which_entries_train(saved: Path, base: Maker) -> None:
    """A choice of another size, drawn by another version, loads: the file holds what was trained."""

    def fewer(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "down_proj" in name]:
            tensors[name] = (tensors[name][..., :2] if name.endswith("weight") else tensors[name][:2]).contiguous()

    rewrite(saved, fewer)
    model = leantune.load(base(), saved)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    assert layer.get_delta_weight("default").any(0).sum() == 2


@pytest.mark.parametrize("kept", [0, 5, 40, 2000])
def test_a_torn_file_is_refused(kept: int, saved: Path, base: Maker) -> None:
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"torn or no safetensors file ({kept} bytes" in refused(base(), saved)


def test_a_missing_file_is_named(saved: Path, base: Maker) -> None:
    (saved / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: missing" in refused(base(), saved)


def test_a_pickle_is_refused_unread(saved: Path, base: Maker) -> None:
    (saved / "adapter_model.safetensors").unlink()
    (saved / "adapter_model.bin").write_bytes(b"would crash whoever reads it")
    assert "a pickle, which can run code" in refused(base(), saved)


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("peft_type", "words"),
    [("S2FTT", "did you mean 'S2FT'?"), ("LORRA", "did you mean 'LORA'?"), ("ZZZ", "known: "), (None, "no peft_type")],
)
def test_an_unknown_method_is_explained(peft_type: str | None, words: str, saved: Path, base: Maker) -> None:
    set_config(saved, peft_type=peft_type)
    assert words in refused(base(), saved)


def test_a_config_that_is_no_json(saved: Path, base: Maker) -> None:
    (saved / "adapter_config.json").write_text('{"peft_type": "S2F')
    assert "adapter_config.json: not JSON" in refused(base(), saved)


def test_a_wrong_config_value_is_named(saved: Path, base: Maker) -> None:
    set_config(saved, selection="sideways")
    assert "S2FTConfig.selection" in refused(base(), saved)


def test_another_architecture_is_refused(saved: Path, base: Maker) -> None:
    assert "does not fit GPT2LMHeadModel" in refused(base("gpt2"), saved)


def test_another_width_is_refused(lora: Maker, tmp_path: Path) -> None:
    adapter_folder.save(lora(), tmp_path / "adapter")
    text = refused(make_llama(intermediate_size=32), tmp_path / "adapter")
    assert "on this base" in text
    assert text.count("down_proj") == 2


def test_places_that_hold_no_adapter(tmp_path: Path, base: Maker) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds nothing" in refused(base(), tmp_path / "empty")
    assert "not a folder" in refused(base(), tmp_path / "a" / "b" / "c")
    assert "nor found on the Hub" in refused(base(), Path("nobody/nothing"))


def test_a_run_folder_stands_for_its_adapter(saved: Path, base: Maker) -> None:
    assert isinstance(leantune.load(base(), saved.parent), PeftModel)


class TestBase:
    """An adapter knows the weights it was trained on."""

    @pytest.fixture
    def known(self, base_folders: dict[str, Path], s2ft: Maker, tmp_path: Path) -> Path:
        return adapter_folder.save(s2ft(), tmp_path / "adapter", base=load_base(str(base_folders["llama"])))

    def test_same_weights_load_in_any_form(self, known: Path, base: Maker, base_folders: dict[str, Path]) -> None:
        for given in (base(), load_base(str(base_folders["llama"])), str(base_folders["llama"]), None):
            assert isinstance(leantune.load(given, known), PeftModel)

    def test_other_weights_are_refused(self, known: Path, base: Maker) -> None:
        other = base()
        other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
        assert "loaded over another base" in refused(other, known)

    def test_other_weights_on_purpose(self, known: Path, base: Maker) -> None:
        other = base()
        other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
        with pytest.warns(UserWarning, match="another base"):
            leantune.load(other, known, force=True)
        assert isinstance(leantune.load(base(), known, verify_base=False), PeftModel)

    def test_another_dtype_cannot_be_compared(self, known: Path, base: Maker) -> None:
        assert isinstance(leantune.load(base().bfloat16(), known), PeftModel)

    def test_the_run_record_will_do(self, known: Path, base: Maker) -> None:
        record = json.loads((known / "leantune.json").read_text())
        (known / "leantune.json").unlink()
        facts = {name: value for name, value in record["base"].items() if name != "dtype"}
        (known.parent / "run.json").write_text(json.dumps({"base": facts, "config": {"dtype": "float32"}}))
        assert isinstance(leantune.load(base().bfloat16(), known), PeftModel)
        other = base()
        other.lm_head.weight.data.zero_()
        assert "loaded over another base" in refused(other, known)

    def test_a_torn_record_is_no_obstacle(self, known: Path, base: Maker) -> None:
        (known / "leantune.json").write_text('{"base": {"na')
        assert isinstance(leantune.load(base(), known), PeftModel)

    def test_without_a_base_name(self, saved: Path) -> None:
        (saved / "leantune.json").unlink()
        set_config(saved, base_model_name_or_path=None)
        with pytest.raises(AdapterError, match="does not name its base model"):
            leantune.load(None, saved)


def test_a_kill_between_two_renames_leaves_the_old_adapter(saved: Path, base: Maker) -> None:
    shutil.move(saved, saved.with_name(f".{saved.name}.previous"))
    assert isinstance(leantune.load(base(), saved), PeftModel)
