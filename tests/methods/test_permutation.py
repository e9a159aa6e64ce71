"""Co-permutation: the same function, the same gradients, the same file, and the base back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from leantune import S2FTConfig, initialize
from leantune.core.errors import AdapterError, TargetError
from leantune.methods._permutation import require_dense, unit_order
from leantune.testing.closeness import assert_close, assert_differs, assert_same, assert_same_state
from leantune.testing.subject import gradients, layers_of, no_grad_logits, objective, own_layers, start


def wrap(base: nn.Module, permute: bool = True, **options: Any) -> Any:
    # Two key/value groups of the grouped-query models: query heads alone would be chosen otherwise than by group.
    options = {"heads": 3, "channels": 4, **options}
    options.setdefault("target_modules", sorted(tiny.linears(base)))
    return get_peft_model(base, S2FTConfig(permute=permute, **options)).eval()  # type: ignore[arg-type]


# T5's heads carry a bias of position that all blocks share: see the refusal below.
PERMUTABLE = [family for family in tiny.EVERY if family != "t5"]


def state(base: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in base.state_dict().items()}


def same_numbers(model: Any, twin: Any, seed: int = 1) -> None:
    """Give each checkpoint entry of both adapters the same delta, in whatever order it stands there."""
    for path, layer in own_layers(model).items():
        mine, other = layer.s2ft_slice["default"], twin.get_base_model().get_submodule(path).s2ft_slice["default"]
        assert sorted(mine.index.tolist()) == sorted(other.index.tolist()), path
        generator = torch.Generator().manual_seed(seed)
        length = layer.in_features if mine.axis == "in" else layer.out_features
        width = layer.out_features if mine.axis == "in" else layer.in_features
        noise = torch.randn(length, width, generator=generator, dtype=torch.float64) * 0.3
        with torch.no_grad():
            for own in (mine, other):
                rows = noise[own.index]
                own.weight.copy_(rows.t() if own.axis == "in" else rows)


OPTIONS: list[dict[str, Any]] = [{}, {"coupling": "independent"}, {"selection": "weight"}]


@pytest.mark.parametrize("options", OPTIONS, ids=["shared", "independent", "weight"])
@pytest.mark.parametrize("family", PERMUTABLE)
def test_the_same_function_and_the_same_gradients(family: str, options: dict[str, Any]) -> None:
    plain = tiny.quiet(tiny.model(family), family)
    if options.get("coupling") == "independent":
        # Unpermuted, the output's columns of grouped-query attention may be chosen by query head.
        options = {
            **options,
            "target_modules": [path for path in tiny.linears(tiny.model(family)) if "o_proj" not in path],
        }
    model, twin = wrap(tiny.model(family), **options), wrap(tiny.model(family), permute=False, **options)
    assert_close(tiny.quiet(model, family), plain, torch.float64, 64, 16, what="logits before the first step")
    same_numbers(model, twin)
    exact = tiny.quiet(twin, family)
    tuned = tiny.quiet(model, family)
    assert_close(tuned, exact, torch.float64, 64, 16, wrong=(plain,), what="logits")
    for each in (model, twin):
        objective(tiny.answer(each.train(), family)).backward()
    got, expected = gradients(model), gradients(twin)
    for path, layer in own_layers(model).items():
        mine, other = layer.s2ft_slice["default"], twin.get_base_model().get_submodule(path).s2ft_slice["default"]
        name = f"base_model.model.{path}.s2ft_slice.default.weight"
        # Into the order of the other: entry by entry of the checkpoint.
        order = torch.tensor([mine.index.tolist().index(entry) for entry in other.index.tolist()])
        aligned = got[name].index_select(1 if mine.axis == "in" else 0, order)
        assert_close(aligned, expected[name], torch.float64, 256, 16, what=name)


@pytest.mark.parametrize("family", PERMUTABLE)
def test_the_base_is_permuted_and_comes_back_bit_for_bit(family: str) -> None:
    base = tiny.model(family, torch.bfloat16)
    before = state(base)
    model = wrap(base)
    inside = {name.replace(".base_layer", ""): value for name, value in model.get_base_model().state_dict().items()}
    changed = [name for name, value in before.items() if not torch.equal(inside[name], value)]
    assert len(changed) >= 2 * tiny.LAYERS, "nothing was permuted"
    start(model)
    model.merge_adapter()
    model.unmerge_adapter()
    bare = model.unload()
    assert_same_state(state(bare), before, "base after unload")


@pytest.mark.parametrize("family", PERMUTABLE)
def test_merge_and_unload_gives_the_checkpoints_layout(family: str) -> None:
    model, twin = wrap(tiny.model(family)), wrap(tiny.model(family), permute=False)
    same_numbers(model, twin)
    expected = state(twin.merge_and_unload())
    assert_same_state(state(model.merge_and_unload()), expected, "merged weights")


def test_heads_with_a_bias_of_position_are_refused_and_the_rest_of_the_model_is_not() -> None:
    with pytest.raises(
        TargetError, match=r"permute: decoder\.block\.0\.layer\.0 \(attention\): something outside of its"
    ):
        wrap(tiny.model("t5"))
    before = state(tiny.model("t5"))
    plain = tiny.quiet(tiny.model("t5"), "t5")
    model = wrap(tiny.model("t5"), target_modules=["EncDecAttention.o", "EncDecAttention.v", "wi_1", "wo"])
    assert_close(tiny.quiet(model, "t5"), plain, torch.float64, 64, 16, what="logits before the first step")
    start(model)
    assert_differs(tiny.quiet(model, "t5"), plain, "logits")
    assert_same_state(state(model.unload()), before, "base after unload")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_chosen_units_stand_in_one_run(family: str) -> None:
    model = wrap(tiny.model(family))
    for path, layer in own_layers(model).items():
        where = layer.s2ft_slice["default"].entries
        if path.endswith("c_attn"):
            # Three parts, each with its own run.
            assert isinstance(where, Tensor)
            continue
        assert where == slice(0, layer.s2ft_slice["default"].index.numel()), path


def test_only_the_chosen_block_order_is_in_question() -> None:
    """Norms, embeddings and the head are not touched by a permutation."""
    base = tiny.model("qwen3")
    outside = {
        name: value for name, value in state(base).items() if "norm" in name or "embed" in name or "head" in name
    }
    model = wrap(base)
    inside = model.get_base_model().state_dict()
    assert_same_state({name: inside[name] for name in outside}, outside, "outside of the blocks' linear layers")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_files_keep_the_checkpoints_layout(family: str, tmp_path: Path) -> None:
    model, twin = wrap(tiny.model(family)), wrap(tiny.model(family), permute=False)
    same_numbers(model, twin)
    exact, plain = no_grad_logits(twin, tiny.ids()), no_grad_logits(tiny.model(family), tiny.ids())
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("position" in name for name in stored)
    for permute in (False, True):
        config = S2FTConfig.from_pretrained(tmp_path)
        assert isinstance(config, S2FTConfig)
        config.permute = permute
        loaded = PeftModel.from_pretrained(tiny.model(family), tmp_path, config=config).eval()
        logits = no_grad_logits(loaded, tiny.ids())
        assert_close(logits, exact, torch.float64, 64, 16, wrong=(plain,), what=f"loaded, permute={permute}")


def test_lora_factors_are_in_the_checkpoints_layout() -> None:
    model, twin = wrap(tiny.model("llama")), wrap(tiny.model("llama"), permute=False)
    same_numbers(model, twin)
    for path, layer in own_layers(twin).items():
        B, A = own_layers(model)[path].lora_factors("default")
        assert_same(B @ A, layer.get_delta_weight("default"), path)


def test_an_adapter_that_was_there_before_is_not_broken() -> None:
    """A base with an adapter on it cannot be permuted for a second one behind the first one's back."""
    model = wrap(tiny.model("llama"), permute=False)
    start(model)
    expected = no_grad_logits(model, tiny.ids())
    config = S2FTConfig(permute=True, heads=1, channels=4, target_modules=["o_proj", "down_proj"], seed=3)
    with pytest.raises(TargetError, match="permute: other adapters stand on this base"):
        model.add_adapter("other", config)
    assert_same(no_grad_logits(model, tiny.ids()), expected, "logits after the refusal")


def test_a_further_adapter_finds_its_entries_in_a_permuted_base() -> None:
    options: dict[str, Any] = {
        "heads": 2,
        "channels": 5,
        "seed": 9,
        "target_modules": ["o_proj", "up_proj", "down_proj"],
    }
    model = wrap(tiny.model("llama"))
    model.add_adapter("other", S2FTConfig(**options))
    model.set_adapter("other")
    alone = get_peft_model(tiny.model("llama"), S2FTConfig(**options)).eval()
    for path, layer in layers_of(alone).items():
        mine, other = own_layers(model)[path].s2ft_slice["other"], layer.s2ft_slice["default"]
        assert sorted(mine.index.tolist()) == other.index.tolist()
        noise = torch.randn(layer.in_features if mine.axis == "in" else layer.out_features, 24, dtype=torch.float64)
        with torch.no_grad():
            for own in (mine, other):
                own.weight.copy_(noise[own.index].t() if own.axis == "in" else noise[own.index])
    exact, plain = no_grad_logits(alone, tiny.ids()), no_grad_logits(tiny.model("llama"), tiny.ids())
    assert_close(
        no_grad_logits(model, tiny.ids()), exact, torch.float64, 64, 16, wrong=(plain,), what="the further one"
    )
    model.merge_adapter(adapter_names=["other"])
    assert_close(no_grad_logits(model, tiny.ids()), exact, torch.float64, 64, 16, wrong=(plain,), what="merged")
    for layer in own_layers(model).values():
        if layer.merged:
            layer.unmerge()
    assert_same_state(state(model.unload()), state(tiny.model("llama")), "base after unload")


def test_a_base_is_permuted_once() -> None:
    model = wrap(tiny.model("llama"))
    config = S2FTConfig(permute=True, heads=3, channels=4, target_modules=["o_proj", "down_proj"], seed=5)
    with pytest.raises(TargetError, match=r"permute: this base is permuted for another adapter; .*; permute=False"):
        model.add_adapter("other", config)


def test_plain_layers_have_no_order_and_take_any_number_of_adapters() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), S2FTConfig(target_modules=["0", "1"], permute=True)
    )
    model.add_adapter("second", S2FTConfig(target_modules=["0", "1"], permute=True, seed=1))
    assert {name for name, _ in model.named_parameters() if ".second." in name}


@pytest.mark.parametrize("selection", ["random", "activation"])
def test_a_file_of_another_choice_is_right_over_a_base_that_is_permuted_already(selection: str, tmp_path: Path) -> None:
    model = wrap(tiny.model("llama"), permute=False, selection=selection, seed=1)
    if selection == "activation":
        initialize(model, [{"input_ids": tiny.ids()}])
    start(model)
    exact = no_grad_logits(model, tiny.ids())
    model.save_pretrained(tmp_path)
    plain = no_grad_logits(tiny.model("llama"), tiny.ids())
    config = S2FTConfig.from_pretrained(tmp_path)
    assert isinstance(config, S2FTConfig)
    config.permute, config.seed, config.selection = True, 2, "random"
    alone = PeftModel.from_pretrained(tiny.model("llama"), tmp_path, config=config).eval()
    beside = wrap(tiny.model("llama"), seed=2)
    beside.load_adapter(tmp_path, adapter_name="late")
    beside.set_adapter("late")
    for name, loaded in {"alone": alone, "beside": beside}.items():
        logits = no_grad_logits(loaded, tiny.ids())
        assert_close(logits, exact, torch.float64, 64, 16, wrong=(plain,), what=name)
    assert_same_state(state(beside.unload()), state(tiny.model("llama")), "base after unload")


@pytest.mark.parametrize("wrong", [-1, 10_000])
def test_an_entry_that_does_not_exist_is_refused_over_a_permuted_base(wrong: int, tmp_path: Path) -> None:
    model = wrap(tiny.model("llama"))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    stored[next(name for name in stored if name.endswith("down_proj.s2ft_slice.index"))][0] = wrong
    save_file(stored, file)
    with pytest.raises(AdapterError, match=rf"s2ft_slice.*index: .*{wrong}"):
        PeftModel.from_pretrained(tiny.model("llama"), tmp_path)


def test_a_weight_that_only_looks_dense_is_not_reordered() -> None:
    """torchao's packed weights are parameters of a floating dtype."""

    class Packed(Tensor):
        def __tensor_flatten__(self) -> None:
            raise NotImplementedError

    Packed.__module__ = "torchao.quantization"
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4).as_subclass(Packed))
    with pytest.raises(TargetError, match=r"here \(Linear\) holds a quantised weight"):
        require_dense("here", layer)


def test_disabled_and_mixed_rows_see_the_permuted_bases_own_function() -> None:
    plain = no_grad_logits(tiny.model("llama"), tiny.ids())
    model = wrap(tiny.model("llama"))
    start(model)
    tuned = no_grad_logits(model, tiny.ids())
    with model.disable_adapter():
        assert_close(
            no_grad_logits(model, tiny.ids()), plain, torch.float64, 64, 16, wrong=(tuned,), what="adapter off"
        )
    mixed = no_grad_logits(model, tiny.ids(), adapter_names=["__base__", "default", "__base__"])
    assert_close(mixed[0], plain[0], torch.float64, 64, 16, wrong=(tuned[0],), what="a row of the base")
    assert_close(mixed[1], tuned[1], torch.float64, 64, 16, wrong=(plain[1],), what="a row of the adapter")


def test_a_reference_copy_over_a_permuted_base() -> None:
    model = wrap(tiny.model("llama"))
    start(model)
    expected = no_grad_logits(model, tiny.ids())
    model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).copy_(parameter)
    model.set_adapter("ref")
    assert_same(no_grad_logits(model, tiny.ids()), expected, "logits of the reference")
    assert_differs(expected, no_grad_logits(tiny.model("llama"), tiny.ids()), "logits")


units = st.sets(st.integers(0, 15))


@given(inward=units, outward=units, spare=st.integers(0, 4))
def test_both_choices_are_runs_in_the_order_of_units(inward: set[int], outward: set[int], spare: int) -> None:
    choices = max(inward | outward, default=0) + 1 + spare
    order = unit_order(torch.tensor(sorted(inward)), torch.tensor(sorted(outward)), choices).tolist()
    assert sorted(order) == list(range(choices))
    for chosen in (inward, outward):
        places = sorted(order.index(unit) for unit in chosen)
        assert places == list(range(places[0], places[0] + len(places))) if places else True


def test_pefts_own_conversion_refuses_a_permuted_base() -> None:
    model = get_peft_model(tiny.model("llama"), S2FTConfig(heads=1, channels=3, permute=True))
    assert not model.supports_lora_conversion()
    assert get_peft_model(tiny.model("llama"), S2FTConfig(heads=1, channels=3)).supports_lora_conversion()
