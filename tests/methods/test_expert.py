"""Slices in experts that are 3-D parameters: against dense weights, and all that an adapter must do there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import leantune
import tiny
from leantune import S2FTConfig
from leantune.adapters.merging import merged_state
from leantune.core.errors import AdapterError, TargetError
from leantune.methods._expert import ExpertLayer, routes
from leantune.testing.closeness import assert_close, assert_differs, assert_same, assert_same_state
from leantune.testing.subject import gradients, objective, start, trained

FAMILIES = list(tiny.EXPERTS)
BOTH = {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
DOWN_ALONE = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
LAYOUTS: dict[str, dict[str, Any]] = {
    "down": DOWN_ALONE,
    "up": {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
    "shared": BOTH,
    "independent": {**BOTH, "coupling": "independent"},
}


# Mixtral's router computes in float32, and the gradient of a block goes through the routers above it.
GRADIENTS = {"mixtral": torch.float32, "qwen2_moe": torch.float64, "gpt_oss": torch.float64}


@pytest.fixture(autouse=True)
def _quiet_rope(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """GPT-OSS at this size tells of its rope scaling."""
    with caplog.at_level("ERROR", logger="transformers"):
        yield


def wrapped(family: str = "mixtral", dtype: torch.dtype = torch.float64, *, begun: bool = True, **options: Any) -> Any:
    model = get_peft_model(tiny.model(family, dtype), S2FTConfig(**{"heads": 1, "channels": 3, **BOTH, **options}))
    if begun:
        start(model)
    return model.eval()


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.ids() if ids is None else ids).logits


def expert_layers(model: Any) -> dict[str, ExpertLayer]:
    inner = model.get_base_model()
    return {name: each for name, each in inner.named_modules() if isinstance(each, ExpertLayer)}


def dense_twin(family: str, model: Any, adapter: str = "default") -> Any:
    """The base with the deltas written into its weights entry by entry."""
    twin = tiny.model(family)
    with torch.no_grad():
        for path, layer in expert_layers(model).items():
            experts = twin.get_submodule(path)
            inner = experts.down_proj.shape[1 if experts.is_transposed else 2]
            for name, own in layer.slices(adapter).items():
                weight = getattr(experts, name)
                for expert, channels in enumerate(own.index.tolist()):
                    for place, row in enumerate(rows_of(experts, name, channels, inner)):
                        if (name == "down_proj") == experts.is_transposed:
                            weight[expert, row, :] += own.weight[expert, place]
                        else:
                            weight[expert, :, row] += own.weight[expert, place]
        for path, module in model.get_base_model().named_modules():
            if path.endswith("o_proj") and adapter in getattr(module, "s2ft_slice", {}):
                own = module.s2ft_slice[adapter]
                twin.get_submodule(path).weight[:, own.index] += own.weight
    return twin


def rows_of(experts: Any, name: str, channels: list[int], inner: int) -> list[int]:
    """Where a channel's gate and up rows stand, written out: side by side in GPT-OSS, apart elsewhere."""
    if name == "down_proj":
        return channels
    if not experts.is_concatenated:
        return [row for channel in channels for row in (2 * channel, 2 * channel + 1)]
    return channels + [inner + channel for channel in channels]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_dense_weights(family: str, layout: str) -> None:
    model = wrapped(family, **LAYOUTS[layout]).train()
    twin = dense_twin(family, model)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    plain = logits(tiny.model(family))
    output, exact = model(input_ids=tiny.ids()).logits, twin(input_ids=tiny.ids()).logits
    assert_close(output, exact.detach(), torch.float64, 64, 8, wrong=(plain,), what="logits")
    objective(output).backward()
    objective(exact).backward()
    for path, layer in expert_layers(model).items():
        experts = twin.get_submodule(path)
        for name, own in layer.slices("default").items():
            gradient = getattr(experts, name).grad
            gradient = gradient if (name == "down_proj") == experts.is_transposed else gradient.transpose(1, 2)
            inner = gradient.shape[1] if name == "down_proj" else gradient.shape[1] // 2
            picked = [
                each[rows_of(experts, name, c, inner)] for each, c in zip(gradient, own.index.tolist(), strict=True)
            ]
            assert_close(own.weight.grad, torch.stack(picked), GRADIENTS[family], 64, 8, what=f"{path}.{name}")
    inner_model = model.get_base_model()
    assert all(p.grad is None for n, p in inner_model.named_parameters() if ".s2ft_" not in n)


def test_the_routers_gradient_is_there_for_those_who_ask() -> None:
    """Whoever trains the router as well gets the gradient through the slices too."""
    model = wrapped().train()
    twin = dense_twin("mixtral", model)
    grads = []
    for each in (model.get_base_model(), twin):
        router = each.model.layers[0].mlp.gate.weight
        router.requires_grad_(True)
        (grad,) = torch.autograd.grad(objective(each(input_ids=tiny.ids()).logits), router)
        grads.append(grad)
    assert_close(grads[0], grads[1], GRADIENTS["mixtral"], 64, 8, what="router")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_is_the_base_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    """With transformers' own kernel for experts, whichever that is."""
    plain = logits(tiny.model(family, dtype))
    model = wrapped(family, dtype, begun=False)
    assert_same(logits(model), plain, "logits")
    assert {p.dtype for p in trained(model).values()} == {torch.float32}


def test_training_touches_the_slices_alone() -> None:
    model = wrapped(dtype=torch.float32, begun=False).train()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    assert all(".s2ft_" in name for name in trained(model)), "no router"
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tiny.ids(), labels=tiny.ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, value in model.state_dict().items():
        if name in trained(model):
            assert_differs(value, before[name], name)
        else:
            assert_same(value, before[name], name)
    assert any(name.endswith("mlp.gate.weight") for name in before)


def test_an_expert_that_no_token_reaches_gets_a_zero_gradient() -> None:
    model = wrapped().train()
    ids = torch.full((1, 1), 7)
    objective(model(input_ids=ids).logits).backward()
    for path, layer in expert_layers(model).items():
        router = model.get_base_model().get_submodule(path.replace("experts", "gate"))
        assert router.top_k == 2
        for name, own in layer.slices("default").items():
            reached = own.weight.grad.flatten(1).any(1)
            assert int(reached.sum()) == 2, f"{path}.{name}: of four experts one token reaches two"


def test_no_token_at_all() -> None:
    layer = next(iter(expert_layers(wrapped()).values())).train()
    x = torch.zeros(0, 24, dtype=torch.float64)
    output = layer(x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.float64))
    assert output.shape == (0, 24)
    output.sum().backward()
    for own in layer.slices("default").values():
        assert own.weight.grad is not None
        assert not own.weight.grad.any()


class LargeTensors(TorchDispatchMode):
    """Notes every tensor of at least so many entries that is no parameter of the model, nor a view of one."""

    def __init__(self, entries: int, model: nn.Module) -> None:
        super().__init__()
        self.entries = entries
        self.own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(tensor, Tensor) or tensor.untyped_storage().data_ptr() in self.own:
                continue
            if tensor.untyped_storage().nbytes() >= self.entries * tensor.element_size():
                self.found.append(f"{func}: {tuple(tensor.shape)}")
        return result


def test_nothing_of_a_weights_size_is_ever_formed() -> None:
    """Neither a copy nor a gradient of an expert weight: 4 experts of 24 x 16 here, against 2 tokens."""
    model = wrapped(**DOWN_ALONE).train()
    with LargeTensors(4 * 24 * 16, model) as seen:
        objective(model(input_ids=tiny.ids(1, 2)).logits).backward()
    assert seen.found == []
    twin = dense_twin("mixtral", model)
    with LargeTensors(4 * 24 * 16, twin) as seen:
        twin.requires_grad_(True)
        objective(twin(input_ids=tiny.ids(1, 2)).logits).backward()
    assert seen.found, "a dense gradient must be seen"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_and_its_undoing(family: str, dtype: torch.dtype) -> None:
    model = wrapped(family, dtype)
    model.add_adapter("other", S2FTConfig(heads=1, channels=4, seed=5, **BOTH))
    start(model, "other", seed=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = logits(tiny.model(family, dtype))
    unmerged = logits(model)
    model.merge_adapter()
    if dtype == torch.float64:
        assert_close(logits(model), unmerged, dtype, 64, 8, wrong=(plain,), what="merged")
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["default", "other"])
    assert_differs(logits(model), unmerged)
    model.unmerge_adapter()
    assert_same_state(dict(model.state_dict()), before, "after unmerging")
    model.merge_adapter()
    bare = model.unload()
    assert_same_state(dict(bare.state_dict()), dict(tiny.model(family, dtype).state_dict()), "unloaded")


def test_a_broken_adapter_is_not_merged() -> None:
    model = wrapped()
    layer = expert_layers(model)["model.layers.1.mlp.experts"]
    with torch.no_grad():
        layer.slices("default")["down_proj"].weight[2, 1, 3] = float("nan")
    before = {name: value.clone() for name, value in layer.base_layer.state_dict().items()}
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert_same_state(dict(layer.base_layer.state_dict()), before, "experts")


def test_a_merged_model_is_the_stock_one(tmp_path: Path) -> None:
    """Written with transformers' names for experts and read again by transformers alone."""
    model = wrapped(dtype=torch.float32)
    state = merged_state(model, "default")
    expected = logits(model)
    plain = tiny.model("mixtral", torch.float32)
    plain.load_state_dict(state)
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path).eval()
    assert_close(
        logits(again), expected.double(), torch.float32, 64, 8, wrong=(logits(tiny.model("mixtral", torch.float32)),)
    )
    whole = model.merge_and_unload()
    assert_same_state(dict(whole.state_dict()), state, "merge_and_unload")


@pytest.mark.parametrize("lean", [False, True])
def test_saving_and_loading(lean: bool, tmp_path: Path) -> None:
    model = wrapped(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.mlp.experts.s2ft_down_proj.weight" in keys
    base = tiny.model("mixtral", torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=lean, adapter_name="again").eval()
    assert_same_state(
        get_peft_model_state_dict(loaded, adapter_name="again"), get_peft_model_state_dict(model), "adapter"
    )
    assert_same(logits(loaded), logits(model), "logits")
    assert loaded.peft_config["again"].target_parameters == model.peft_config["default"].target_parameters
    assert loaded.peft_config["again"].achieved_ratio == model.peft_config["default"].achieved_ratio


def test_the_file_decides_the_channels(tmp_path: Path) -> None:
    """Another number of them too; and what names no channel is refused."""
    model = wrapped(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.mlp.experts.s2ft_down_proj."
    narrow = {key + "index": tensors[key + "index"][:, 1:], key + "weight": tensors[key + "weight"][:, 1:]}
    save_file({**tensors, **{name: value.contiguous() for name, value in narrow.items()}}, file)
    loaded = leantune.load(tiny.model("mixtral", torch.float32), tmp_path, verify_base=False)
    own = expert_layers(loaded)["model.layers.1.mlp.experts"].slices("default")["down_proj"]
    assert own.index.shape == (4, 2)
    assert_differs(logits(loaded.eval()), logits(tiny.model("mixtral", torch.float32)))
    wrong = tensors[key + "index"].clone()
    wrong[2, 0] = 64
    save_file({**tensors, key + "index": wrong}, file)
    with pytest.raises(AdapterError, match=r"indices of model\.layers\.1\.mlp\.experts"):
        leantune.load(tiny.model("mixtral", torch.float32), tmp_path, verify_base=False)


def test_several_adapters() -> None:
    plain = logits(tiny.model("mixtral"))
    model = wrapped()
    first = logits(model)
    model.add_adapter("other", S2FTConfig(channels=2, seed=4, **DOWN_ALONE))
    assert not any(p.requires_grad for p in trained(model, "other").values())
    start(model, "other", seed=2)
    assert_same(logits(model), first, "the first adapter, beside another")
    model.set_adapter("other")
    second = logits(model)
    assert_close(second, logits(dense_twin("mixtral", model, "other")), torch.float64, 64, 8, wrong=(first, plain))
    with model.disable_adapter():
        assert_same(logits(model), plain, "with adapters off")
    # Rows with adapters of their own.
    ids = tiny.ids(5)
    names = ["other", "__base__", "default", "other", "default"]
    alone = {"other": logits(model, ids), "__base__": logits(tiny.model("mixtral"), ids)}
    model.set_adapter("default")
    alone["default"] = logits(model, ids)
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        wrong = [each[row] for other, each in alone.items() if other != name]
        assert_close(mixed[row], alone[name][row], torch.float64, 64, 8, wrong=wrong, what=f"row {row}")
    model.delete_adapter("other")
    assert_same(logits(model), first, "after deleting the other")
    assert not [name for name in model.state_dict() if "other" in name.split(".")]


def test_copies() -> None:
    model = wrapped()
    expected = logits(model)
    twin = copy.deepcopy(model)
    model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).copy_(parameter)
    model.set_adapter("ref")
    assert_same(logits(model), expected, "a reference adapter")
    assert_same(logits(twin), expected, "a deep copy")
    for layer in expert_layers(model).values():
        for name, own in layer.slices("ref").items():
            assert own.index.data_ptr() != layer.slices("default")[name].index.data_ptr(), "a file may move one of them"
    with torch.no_grad():
        for value in twin.state_dict().values():
            value.zero_()
    assert_same(logits(model), expected, "the original after the copy was erased")


def test_checkpointing() -> None:
    expected, found = [], []
    for into, enable in ((expected, False), (found, True)):
        model = wrapped().train()
        if enable:
            name = "activation_checkpointing_enable"
            inner = model.get_base_model()
            getattr(inner, name if hasattr(inner, name) else "gradient_checkpointing_enable")({"use_reentrant": False})
        objective(model(input_ids=tiny.ids(), use_cache=False).logits).backward()
        into.append(gradients(model))
    for name, gradient in found[0].items():
        assert_close(gradient, expected[0][name], torch.float64, 64, 8, what=name)


def test_what_trains_by_default_and_by_budget() -> None:
    model = get_peft_model(tiny.model("mixtral"), S2FTConfig(ratio=0.25))
    config = model.peft_config["default"]
    assert (config.target_modules, config.target_parameters) == ({"o_proj"}, {"experts.down_proj"})
    # A quarter of 24 x 24 is one head of 24 x 4; a quarter of 16 channels is 4, in each of 4 experts.
    layer = expert_layers(model)["model.layers.0.mlp.experts"].slices("default")
    assert {name: tuple(own.index.shape) for name, own in layer.items()} == {"down_proj": (4, 4)}
    assert config.achieved_ratio == (24 * 4 + 4 * 4 * 24) / (24 * 24 + 4 * 16 * 24)
    index = layer["down_proj"].index
    assert len({tuple(each.tolist()) for each in index}) > 1, "each expert draws for itself"
    shared = get_peft_model(tiny.model("qwen2_moe"), S2FTConfig(ratio=0.3))
    names = {name.split(".s2ft_")[0].rpartition("layers.")[2] for name in trained(shared)}
    assert names == {f"{block}.{each}" for block in (0, 1) for each in ("self_attn.o_proj", "mlp.experts")} | {
        f"{block}.mlp.shared_expert.down_proj" for block in (0, 1)
    }
    rank = get_peft_model(tiny.model("mixtral"), S2FTConfig(match_lora_rank=2, **DOWN_ALONE))
    own = expert_layers(rank)["model.layers.0.mlp.experts"].slices("default")["down_proj"]
    assert own.index.shape == (4, 2 * (16 + 24) // 24)
    blocks = get_peft_model(tiny.model("mixtral"), S2FTConfig(channels=2, layers_to_transform=[1], **DOWN_ALONE))
    assert list(expert_layers(blocks)) == ["model.layers.1.mlp.experts"]
    heads = get_peft_model(tiny.model("mixtral"), S2FTConfig(heads=1, target_modules=["o_proj"]))
    assert not expert_layers(heads)


def test_names_that_match_nothing_are_told() -> None:
    with pytest.raises(TargetError, match=r"experts\.down_porj named nothing.*did you mean 'experts.down_proj'"):
        get_peft_model(tiny.model("mixtral"), S2FTConfig(target_parameters=["experts.down_porj"]))
    with pytest.raises(TargetError, match="the model has no such experts"):
        get_peft_model(tiny.model("llama"), S2FTConfig(target_parameters=["experts.down_proj"]))


def test_experts_with_a_formula_of_their_own_are_refused() -> None:
    base = tiny.model("mixtral")
    base.model.layers[0].mlp.experts.has_post_expert_norm = True
    before = [type(module) for module in base.modules()]
    with pytest.raises(TargetError, match=r"model\.layers\.0\.mlp\.experts: MixtralExperts has a norm behind each"):
        get_peft_model(base, S2FTConfig())
    assert [type(module) for module in base.modules()] == before, "no linear layer was wrapped either"


@pytest.mark.parametrize("wrong", [-1, tiny.CHANNELS])
@pytest.mark.parametrize("layout", ["down", "up"])
def test_a_channel_that_an_expert_does_not_have_is_refused(layout: str, wrong: int, tmp_path: Path) -> None:
    """Nor is it taken for one of the expert before or behind."""
    model = get_peft_model(tiny.model("mixtral"), S2FTConfig(channels=3, **LAYOUTS[layout]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    stored[next(name for name in stored if name.endswith("index"))][1, 0] = wrong
    save_file(stored, file)
    with pytest.raises(AdapterError, match=r"indices of model\.layers\.0\.mlp\.experts"):
        leantune.load(tiny.model("mixtral"), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_that_are_active_together_act_as_both_merged(family: str) -> None:
    """Both change the same channels, and one's columns read what the other's rows feed."""
    model = wrapped(family, channels=12)
    model.add_adapter("other", S2FTConfig(heads=1, channels=14, seed=5, coupling="independent", **BOTH))
    start(model, "other")
    alone = logits(model)
    model.base_model.set_adapter(["default", "other"])
    together = logits(model)
    model.merge_adapter()
    wrong = (alone,)
    assert_close(together, logits(model), torch.float64, 64, 16, wrong=wrong, what="both at once")
    model.unmerge_adapter()
    assert_same(logits(model), together, "after undoing the merge")


def test_a_lora_export_is_refused_in_one_sentence(tmp_path: Path) -> None:
    model = wrapped(dtype=torch.float32)
    with pytest.raises(AdapterError, match=r"no LoRA form that PEFT, vLLM and others read alike.*leantune merge"):
        leantune.convert_to_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_routes_are_the_tokens_of_each_expert() -> None:
    experts = torch.tensor([[2, 0], [2, 3], [0, 2]])
    found = {expert: sorted(zip(t.tolist(), s.tolist(), strict=True)) for expert, t, s in routes(experts, 5)}
    assert found == {0: [(0, 1), (2, 0)], 2: [(0, 0), (1, 0), (2, 1)], 3: [(1, 1)]}
