"""S2FT on models that no table knows: the promises that the families keep, on structures that were traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
import unknown_models
from leantune import S2FTConfig, convert_to_lora, load
from leantune.core.errors import AdapterError, TargetError
from leantune.methods.s2ft import S2FTConv2d, S2FTLinear
from leantune.testing.closeness import assert_close, assert_differs, assert_same, assert_same_state
from leantune.testing.subject import layers_of, objective, own_layers, start, trained
from unknown_models import UNKNOWN

DEFAULTS: dict[str, set[str]] = {
    "loom": {"tie", "wring"},
    "camera": {"film", "name"},
    "bottleneck": {"narrow.0", "narrow.1"},
    "falcon": {"dense", "dense_4h_to_h"},
    "bloom": {"dense", "dense_4h_to_h"},
    "bart": {"out_proj", "fc2"},
}
CONVOLUTIONS = ("camera", "bottleneck")


def every_layer(name: str) -> list[str]:
    """Layers that can train, but for the model's own head and a convolution by channel."""
    model = unknown_models.model(name)
    return [
        path
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and path not in ("cloth", "lm_head")
    ]


def wrap(name: str, **options: Any) -> Any:
    if not {"ratio", "match_lora_rank", "heads", "channels"} & options.keys():
        options = {"heads": 3, "channels": 3, **options}
    options.setdefault("target_modules", every_layer(name))
    return get_peft_model(unknown_models.model(name), S2FTConfig(**options)).eval()


def answer(model: nn.Module, name: str) -> Tensor:
    result = model(**unknown_models.inputs(name))
    logits: Tensor = result if isinstance(result, Tensor) else result.logits
    return logits


def quiet(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return answer(model, name)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _truth(gradient: Tensor, own: Any) -> Tensor:
    """The chosen part of a dense gradient, a convolution's unfolded."""
    return gradient.flatten(1).index_select(1 if own.axis == "in" else 0, own.index)


@pytest.mark.parametrize("name", UNKNOWN)
def test_the_output_sides_train_by_default(name: str) -> None:
    model = get_peft_model(unknown_models.model(name), S2FTConfig(heads=1, channels=1))
    config = model.peft_config["default"]
    assert isinstance(config, S2FTConfig)
    assert config.target_modules == DEFAULTS[name]
    assert all(layer.s2ft_slice["default"].axis == "in" for layer in layers_of(model).values())
    assert config.traced
    assert config.achieved_ratio == sum(p.numel() for p in trained(model).values()) / sum(
        layer.get_base_layer().weight.numel() for layer in layers_of(model).values()
    )


@pytest.mark.parametrize("coupling", ["shared", "independent"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_each_gradient_is_the_slice_of_the_dense_gradient(name: str, coupling: str) -> None:
    dense = unknown_models.model(name).requires_grad_(True)
    objective(answer(dense, name)).backward()
    model = wrap(name, coupling=coupling)
    assert_same(quiet(model, name), answer(dense, name).detach(), "logits before the first step")
    objective(answer(model, name)).backward()
    compared = set()
    for path, layer in layers_of(model).items():
        own = layer.s2ft_slice["default"]
        truth = _truth(dense.get_submodule(path).weight.grad, own)
        assert truth.abs().max() > 1e-4, "the truth is zero; nothing was compared"
        torch.testing.assert_close(own.weight.grad, truth, rtol=1e-10, atol=1e-10)
        compared.add(path)
    assert compared == set(every_layer(name))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in UNKNOWN),
        *((name, {"ratio": 0.2, "selection": "weight"}) for name in ("loom", "camera")),
        *((name, {"match_lora_rank": 2}) for name in ("loom", "camera")),
    ],
    ids=str,
)
def test_merge_unmerge_and_files(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    before = state(unknown_models.model(name))
    plain = quiet(unknown_models.model(name), name)
    model = wrap(name, **options)
    start(model)
    tuned = quiet(model, name)
    assert_differs(tuned, plain, "logits")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(unknown_models.model(name), tmp_path).eval()
    assert_close(quiet(loaded, name), tuned, torch.float64, 64, 16, wrong=(plain,), what="loaded")
    model.merge_adapter()
    assert_close(quiet(model, name), tuned, torch.float64, 64, 16, wrong=(plain,), what="merged")
    model.unmerge_adapter()
    assert_same_state(state(model.unload()), before, "base after unmerging")
    whole = loaded.merge_and_unload()
    assert_close(quiet(whole, name), tuned, torch.float64, 64, 16, wrong=(plain,), what="merged for good")


@pytest.mark.parametrize("name", UNKNOWN)
def test_as_plain_lora(name: str, tmp_path: Path) -> None:
    """Convolutions too: stock PEFT stores a factor as a kernel and the other as 1 x 1."""
    model = wrap(name)
    start(model)
    tuned, plain = quiet(model, name), quiet(unknown_models.model(name), name)
    assert convert_to_lora(model, tmp_path / "lora", base="a base").max_abs_error == 0
    stock = PeftModel.from_pretrained(unknown_models.model(name), tmp_path / "lora").eval()
    assert not any(isinstance(module, S2FTLinear) for module in stock.modules())
    assert_close(quiet(stock, name), tuned, torch.float64, 64, 16, wrong=(plain,), what="stock LoRA")


@pytest.mark.parametrize("name", ["loom", "falcon", "bart"])
def test_permuted(name: str) -> None:
    """The same function, the same numbers as a twin that is not permuted, and the base back bit for bit."""
    before, plain = state(unknown_models.model(name)), quiet(unknown_models.model(name), name)
    model, twin = wrap(name, permute=True), wrap(name)
    assert_close(quiet(model, name), plain, torch.float64, 64, 16, what="logits before the first step")
    inside = {key.replace(".base_layer", ""): value for key, value in model.get_base_model().state_dict().items()}
    assert sum(not torch.equal(inside[key], value) for key, value in before.items()) >= 4, "nothing was permuted"
    for path, layer in own_layers(model).items():
        mine, other = (each.s2ft_slice["default"] for each in (layer, own_layers(twin)[path]))
        generator = torch.Generator().manual_seed(1)
        entries = layer.in_features if mine.axis == "in" else layer.out_features
        noise = torch.randn(entries, 200, generator=generator, dtype=torch.float64) * 0.3
        with torch.no_grad():
            for own in (mine, other):
                rows = noise[own.index][:, : own.weight.shape[0 if own.axis == "in" else 1]]
                own.weight.copy_(rows.t() if own.axis == "in" else rows)
    tuned = quiet(twin, name)
    assert_close(quiet(model, name), tuned, torch.float64, 64, 16, wrong=(plain,), what="logits")
    assert_same_state(state(model.unload()), before, "base after unload")


@pytest.mark.parametrize("name", ["camera", "bottleneck", "bloom"])
def test_units_that_something_else_belongs_to_are_not_reordered(name: str) -> None:
    base = unknown_models.model(name)
    before = state(base)
    with pytest.raises(
        TargetError, match=r"permute: .*something outside of its layers .* belongs to each unit; units in"
    ):
        get_peft_model(base, S2FTConfig(permute=True, heads=1, channels=2))
    assert_same_state({key.replace(".base_layer", ""): v for key, v in state(base).items()}, before, "the base")


def test_the_file_says_what_was_traced(tmp_path: Path) -> None:
    """Loading does not trace: an adapter fits its base also where the base no longer says how to run it."""
    model = wrap("loom")
    start(model)
    model.save_pretrained(tmp_path)
    silent = unknown_models.model("loom")
    del silent.dummy_inputs
    loaded = PeftModel.from_pretrained(silent, tmp_path).eval()
    assert_same(quiet(loaded, "loom"), quiet(model, "loom"), "logits after loading")


def test_what_was_traced_of_another_model_is_not_used() -> None:
    config = S2FTConfig(heads=1, channels=2, target_modules=["tie", "wring", "film", "name"])
    get_peft_model(unknown_models.model("loom"), config)
    second = get_peft_model(unknown_models.model("camera"), config)
    fresh = S2FTConfig(heads=1, channels=2, target_modules=["tie", "wring", "film", "name"])
    twin = get_peft_model(unknown_models.model("camera"), fresh)
    assert config.traced == fresh.traced
    assert {p: layer.s2ft_slice["default"].index.tolist() for p, layer in layers_of(second).items()} == {
        p: layer.s2ft_slice["default"].index.tolist() for p, layer in layers_of(twin).items()
    }


def test_known_families_are_not_traced() -> None:
    for targets in (None, "all-linear", ["lm_head", "o_proj"]):
        config = S2FTConfig(target_modules=targets)
        get_peft_model(tiny.model("llama"), config)
        assert config.traced is None


def test_layers_that_the_table_knows_need_no_trace_of_the_rest() -> None:
    config = S2FTConfig(target_modules=["dense_4h_to_h"])
    get_peft_model(unknown_models.model("bloom"), config)
    assert config.traced is None


def test_heads_are_whole_also_where_they_are_fused_by_group() -> None:
    model = wrap("falcon", heads=3, target_modules=["query_key_value", "self_attention.dense"])
    for path, layer in layers_of(model).items():
        index = layer.s2ft_slice["default"].index.tolist()
        if path.endswith("query_key_value"):
            # One group: three query heads, its key, its value.
            assert index == list(range(index[0], index[0] + 20))
            assert index[0] in (0, 20)
            group = index[0] // 20
            assert layers_of(model)[path.replace("query_key_value", "dense")].s2ft_slice[
                "default"
            ].index.tolist() == list(range(group * 12, group * 12 + 12))


def test_without_targets_and_inputs_both_ways_out_are_named() -> None:
    base = unknown_models.model("loom")
    del base.dummy_inputs
    with pytest.raises(TargetError, match=r"target_modules: not given.*are ask, cloth, dip.*or set model.dummy_inputs"):
        get_peft_model(base, S2FTConfig())


# Convolutions


def test_channels_of_a_convolution_train_whole() -> None:
    model = wrap("camera", channels=2)
    lens, film = (layers_of(model)[name] for name in ("lens", "film"))
    assert isinstance(film, S2FTConv2d)
    rows, columns = (layer.s2ft_slice["default"] for layer in (lens, film))
    assert (rows.axis, columns.axis) == ("out", "in")
    assert [place // 9 for place in columns.index.tolist()[::9]] == rows.index.tolist()
    assert columns.index.tolist() == [
        place for channel in rows.index.tolist() for place in range(9 * channel, 9 * channel + 9)
    ]


@pytest.mark.parametrize(
    "options",
    [{"padding": 1}, {"padding": "same"}, {"stride": 2}, {"dilation": 2}, {"padding": 1, "padding_mode": "circular"}],
    ids=str,
)
@pytest.mark.parametrize("axis", ["in", "out"])
def test_every_kind_of_convolution_is_the_merged_one(axis: str, options: dict[str, Any]) -> None:
    made = nn.Sequential(nn.Conv2d(4, 6, 3, **options), nn.Tanh(), nn.Conv2d(6, 5, 1)).double().eval()
    made.dummy_inputs = {"input": torch.zeros(2, 4, 9, 9)}
    target = ["0"]
    # Alone, the first layer is the input side of the second one; without an example it is plain.
    if axis == "in":
        del made.dummy_inputs
    model: Any = get_peft_model(made, S2FTConfig(target_modules=target, channels=2)).eval()  # type: ignore[arg-type]
    assert layers_of(model)["0"].s2ft_slice["default"].axis == axis
    start(model)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    tuned = model(x).detach()
    with model.disable_adapter():
        plain = model(x).detach()
    mixed = model(x, adapter_names=["__base__", "default"]).detach()
    assert_close(mixed, torch.stack([plain[0], tuned[1]]), torch.float64, 64, 16, what="mixed rows")
    assert_close(model.merge_and_unload()(x), tuned, torch.float64, 64, 16, wrong=(plain,), what="merged")


def test_a_reference_copy_and_another_choice_share_a_convolution() -> None:
    model = wrap("camera", channels=2)
    start(model)
    expected = quiet(model, "camera")
    model.add_adapter("other", S2FTConfig(channels=4, seed=3, target_modules=["film"]))
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            with torch.no_grad():
                model.get_parameter(name.replace(".default.", ".ref.")).copy_(parameter)
    model.set_adapter("ref")
    assert_same(quiet(model, "camera"), expected, "logits of the reference")


def test_an_input_channel_that_a_convolution_does_not_have_is_refused(tmp_path: Path) -> None:
    """Of eight channels there is no ninth, though there are 72 columns."""
    wrap("camera", channels=2, target_modules=["film"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    index = next(name for name in stored if name.endswith("index"))
    stored[index][-9:] = torch.arange(72, 81)
    save_file(stored, file)
    with pytest.raises(AdapterError, match=r"indices of film: \d to 8; 0 to 7"):
        load(unknown_models.model("camera"), tmp_path)


def test_calibration_does_not_rank_channels_of_a_convolution() -> None:
    with pytest.raises(
        TargetError, match=r"selection='gradient' of a convolution \(film\); a linear layer; use selection="
    ):
        wrap("camera", selection="gradient", target_modules=["film"])


def test_a_convolution_of_groups_is_refused() -> None:
    with pytest.raises(TargetError, match=r"Target module Conv2d is not supported"):
        wrap("bottleneck", target_modules=["by_channel.0"])


def test_a_gradient_of_one_convolution_number_by_number() -> None:
    """Against differences of the loss, which know nothing of slices."""
    model = wrap("camera", channels=1, target_modules=["film"])
    start(model)
    own = layers_of(model)["film"].s2ft_slice["default"]
    objective(answer(model, "camera")).backward()
    for place in ((0, 0), (5, 4), (11, 8)):
        step = 1e-6
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                own.weight[place] += sign * step
                losses.append(objective(answer(model, "camera")).item())
                own.weight[place] -= sign * step
        numeric = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close(own.weight.grad[place].item(), numeric, rtol=1e-4, atol=1e-5)
