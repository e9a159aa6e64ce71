"""S2FT on thirteen families: gradients of slices, budgets as stored, files, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import tiny
from leantune import S2FTConfig
from leantune.core.errors import ConfigError, LeantuneError, TargetError
from leantune.methods.s2ft import S2FTLinear
from leantune.testing.closeness import assert_close, assert_differs, assert_same
from leantune.testing.subject import gradients, layers_of, no_grad_logits, objective, own_layers, start, trained

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma")


def wrap(base: nn.Module, **options: Any) -> PeftModel:
    """S2FT with all-linear targets and one head and three channels a block, or as ``options`` say."""
    if not {"ratio", "heads", "channels", "match_lora_rank"} & options.keys():
        options = {"heads": 1, "channels": 3, **options}
    options.setdefault("target_modules", sorted(tiny.linears(base)))
    return get_peft_model(base, S2FTConfig(**options)).eval()  # type: ignore[return-value]


def slices(model: nn.Module, adapter: str = "default") -> dict[str, tuple[str, list[int]]]:
    """Path -> (axis, entries) of every slice."""
    found = {}
    for path, layer in layers_of(model).items():
        own = layer.s2ft_slice[adapter]
        found[path] = (own.axis, own.index.tolist())
    return found


def dense_weight(base: nn.Module, path: str) -> Tensor:
    """The plain layer's weight ``(out, in)``, a view of the parameter."""
    layer = base.get_submodule(path)
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight  # type: ignore[return-value,operator]


# Gradients


@pytest.mark.parametrize("coupling", ["shared", "independent"])
@pytest.mark.parametrize("family", tiny.EVERY)
def test_each_gradient_is_the_slice_of_the_dense_gradient(family: str, coupling: str) -> None:
    """In float64, to 1e-10, for every projection of every family: query, key, value, output, gate, up, down."""
    dense = tiny.model(family).requires_grad_(True)
    objective(tiny.answer(dense, family)).backward()
    model = wrap(tiny.model(family), coupling=coupling).train()
    objective(tiny.answer(model, family)).backward()
    checked = set()
    for path, layer in layers_of(model).items():
        own = layer.s2ft_slice["default"]
        weight = dense.get_submodule(path).weight
        exact = weight.grad.t() if layer.transposed else weight.grad
        dim = 1 if own.axis == "in" else 0
        truth = exact.index_select(dim, own.index)
        assert truth.abs().max() > 1e-3, "the truth is zero; nothing was compared"
        torch.testing.assert_close(own.weight.grad, truth, rtol=1e-10, atol=1e-10)
        checked.add(path)
    assert checked == set(tiny.linears(dense))


@pytest.mark.parametrize("family", tiny.EVERY)
def test_gradients_of_a_started_slice_are_those_of_the_merged_model(family: str) -> None:
    """The same away from zero, where a delta that the backward forgets would show."""
    model = wrap(tiny.model(family)).train()
    start(model)
    dense = tiny.model(family).requires_grad_(True)
    with torch.no_grad():
        for path, layer in layers_of(model).items():
            dense.get_submodule(path).weight.add_(layer.get_delta_weight("default"))
    objective(tiny.answer(dense, family)).backward()
    objective(tiny.answer(model, family)).backward()
    for path, layer in layers_of(model).items():
        own = layer.s2ft_slice["default"]
        weight = dense.get_submodule(path).weight
        exact = weight.grad.t() if layer.transposed else weight.grad
        truth = exact.index_select(1 if own.axis == "in" else 0, own.index)
        torch.testing.assert_close(own.weight.grad, truth, rtol=1e-9, atol=1e-9)


# Families


@pytest.mark.parametrize("family", tiny.EVERY)
def test_forward_and_merge(family: str) -> None:
    plain = tiny.quiet(tiny.model(family), family)
    model = wrap(tiny.model(family))
    assert_same(tiny.quiet(model, family), plain, "logits before the first step")
    start(model)
    tuned = tiny.quiet(model, family)
    assert_differs(tuned, plain, "logits")
    whole = model.merge_and_unload()
    assert_close(tiny.quiet(whole, family), tuned, torch.float64, 64, 16, wrong=(plain,), what="merged")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_merged_weights_are_rounded_once(family: str, dtype: torch.dtype) -> None:
    """A merged entry is the float32 sum of weight and delta, rounded to the base's dtype; the rest has its old bits."""
    model = wrap(tiny.model(family, dtype))
    start(model)
    base = tiny.model(family, dtype)
    whole_expected = {}
    for path, layer in layers_of(model).items():
        own = layer.s2ft_slice["default"]
        assert own.weight.dtype == torch.float32
        dim = 1 if own.axis == "in" else 0
        old = dense_weight(base, path).detach()
        summed = (old.index_select(dim, own.index).float() + own.weight.detach()).to(dtype)
        whole_expected[path] = old.index_copy(dim, own.index, summed)
    whole = model.merge_and_unload()
    for path, expected in whole_expected.items():
        assert_same(dense_weight(whole, path).detach(), expected, path)


@pytest.mark.parametrize("family", tiny.EVERY)
def test_save_and_load(family: str, tmp_path: Path) -> None:
    model = wrap(tiny.model(family, torch.float32))
    start(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.model(family, torch.float32), tmp_path).eval()
    assert slices(loaded) == slices(model)
    assert_same(
        tiny.quiet(loaded, family, torch.float32), tiny.quiet(model, family, torch.float32), "logits after loading"
    )


@pytest.mark.parametrize("family", tiny.EVERY)
def test_default_targets_are_output_and_down(family: str) -> None:
    found = slices(get_peft_model(tiny.model(family), S2FTConfig(heads=1, channels=2)))
    expected = {
        "gpt2": ("attn.c_proj", "mlp.c_proj"),
        "bert": ("attention.output.dense", "output.dense"),
        "roberta": ("attention.output.dense", "output.dense"),
        "neox": ("attention.dense", "mlp.dense_4h_to_h"),
        "opt": ("self_attn.out_proj", "fc2"),
        "t5": ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"),
        "vit": ("attention.o_proj", "mlp.fc2"),
    }.get(family, ("self_attn.o_proj", "mlp.down_proj"))
    for suffix in expected:
        assert sum(path.endswith(suffix) for path in found) >= tiny.LAYERS
    assert len(found) == (5 if family == "t5" else 2) * tiny.LAYERS
    assert all(axis == "in" for axis, _ in found.values())


def test_biases_stay_and_do_not_train() -> None:
    base = tiny.model("qwen2")
    before = {name: value.clone() for name, value in base.named_parameters() if name.endswith(".bias")}
    assert before, "Qwen2 has biases"
    model = wrap(base).train()
    start(model)
    objective(model(input_ids=tiny.ids()).logits).backward()
    whole = model.merge_and_unload()
    for name, value in before.items():
        parameter = whole.get_parameter(name)
        assert parameter.grad is None
        assert_same(parameter.detach(), value, name)


# Budgets


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": 0.1},
        {"ratio": 1e-6},
        {"ratio": 0.9, "coupling": "independent"},
        {"match_lora_rank": 2},
        {"heads": 2, "channels": 3},
        {"channels": 3},
    ],
)
@pytest.mark.parametrize("targets", [None, "all-linear", ["v_proj", "up_proj"]])
def test_every_block_trains_alike_and_the_achieved_ratio_is_the_real_one(options: dict[str, Any], targets: Any) -> None:
    base = tiny.model("llama", torch.float32)
    sizes = {path: layer.weight.numel() for path, layer in tiny.linears(base).items()}
    model = get_peft_model(base, S2FTConfig(target_modules=targets, **options))
    per_block = [0] * tiny.LAYERS
    for name, parameter in trained(model).items():
        per_block[int(name.split(".layers.")[1].split(".")[0])] += parameter.numel()
    assert min(per_block) == max(per_block) > 0
    leaves = {"o_proj", "down_proj"} if targets is None else set(targets) if isinstance(targets, list) else None
    targeted = sum(size for path, size in sizes.items() if leaves is None or path.rpartition(".")[2] in leaves)
    config = model.peft_config["default"]
    assert isinstance(config, S2FTConfig)
    assert config.achieved_ratio == sum(per_block) / targeted


def test_the_ratio_is_two_percent_when_nothing_is_said() -> None:
    assert S2FTConfig().budget.ratio == 0.02
    assert S2FTConfig(channels=4).budget.ratio is None
    assert S2FTConfig(match_lora_rank=4).budget.ratio is None


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_match_lora_rank_trains_what_lora_would(rank: int) -> None:
    """As many parameters as LoRA of that rank on the same modules, less what whole units do not fill."""
    for target, unit in (("down_proj", tiny.HIDDEN), ("o_proj", tiny.HIDDEN * 4)):
        lora = get_peft_model(tiny.model("llama"), LoraConfig(r=rank, target_modules=[target]))
        ours = get_peft_model(tiny.model("llama"), S2FTConfig(match_lora_rank=rank, target_modules=[target]))
        count = [sum(value.numel() for value in trained(each).values()) for each in (lora, ours)]
        short = count[0] - count[1]
        # At least one head trains, also where LoRA of rank 1 has fewer parameters than a head.
        assert 0 <= short < unit * tiny.LAYERS or count[1] == unit * tiny.LAYERS


def test_the_achieved_ratio_is_in_the_file(tmp_path: Path) -> None:
    model = wrap(tiny.model("llama", torch.float32), ratio=0.1)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert stored["achieved_ratio"] == model.peft_config["default"].achieved_ratio > 0.05  # type: ignore[attr-defined]


# The choice on a model


def test_query_heads_are_chosen_on_the_output_alone_and_groups_with_key_or_value() -> None:
    one = slices(wrap(tiny.model("llama"), heads=1, target_modules=["o_proj"]))
    assert all(len(index) == 4 for _, index in one.values())
    grouped = slices(wrap(tiny.model("llama"), heads=1, target_modules=["q_proj", "v_proj", "o_proj"]))
    for block in range(tiny.LAYERS):
        path = f"model.layers.{block}.self_attn"
        value = grouped[f"{path}.v_proj"][1]
        group = value[0] // 4
        assert value == list(range(group * 4, group * 4 + 4))
        run = list(range(group * 12, group * 12 + 12))
        assert grouped[f"{path}.o_proj"] == ("in", run)
        assert grouped[f"{path}.q_proj"] == ("out", run)


def test_head_dim_comes_from_the_config() -> None:
    for family, head_dim in (("mistral", 6), ("qwen3", 6), ("gemma", 8)):
        for axis, index in slices(wrap(tiny.model(family), heads=1, target_modules=["o_proj"])).values():
            assert axis == "in"
            assert index == list(range(index[0], index[0] + head_dim))
            assert index[0] % head_dim == 0


def test_shared_coupling_trains_the_same_units_on_both_sides() -> None:
    found = slices(wrap(tiny.model("llama"), channels=4, heads=1))
    for block in range(tiny.LAYERS):
        mlp = {found[f"model.layers.{block}.mlp.{name}_proj"][1].__repr__() for name in ("gate", "up", "down")}
        assert len(mlp) == 1


def test_independent_coupling_chooses_each_side_alone() -> None:
    found = slices(wrap(tiny.model("llama"), channels=4, heads=1, coupling="independent"))
    blocks = [f"model.layers.{block}" for block in range(tiny.LAYERS)]
    assert all(found[f"{b}.mlp.gate_proj"] == found[f"{b}.mlp.up_proj"] for b in blocks)
    assert any(found[f"{b}.mlp.up_proj"][1] != found[f"{b}.mlp.down_proj"][1] for b in blocks)
    # The output's columns go by query head although key and value train by group on the other side.
    assert all(len(found[f"{b}.self_attn.o_proj"][1]) == 4 for b in blocks)
    assert all(len(found[f"{b}.self_attn.q_proj"][1]) == 12 for b in blocks)


def test_the_choice_of_a_seed_is_pinned_on_a_model() -> None:
    found = slices(wrap(tiny.model("llama"), channels=4, heads=1, target_modules=["o_proj", "down_proj"], seed=7))
    assert {path.removeprefix("model.layers."): index for path, (_, index) in found.items()} == {
        "0.self_attn.o_proj": [16, 17, 18, 19],
        "0.mlp.down_proj": [1, 2, 11, 18],
        "1.self_attn.o_proj": [4, 5, 6, 7],
        "1.mlp.down_proj": [6, 7, 9, 16],
    }


def test_blocks_and_seeds_draw_apart() -> None:
    first, second = (slices(wrap(tiny.model("llama"), channels=6, seed=seed)) for seed in (0, 1))
    assert first != second
    downs = {path: index for path, (_, index) in first.items() if path.endswith("down_proj")}
    assert len({repr(index) for index in downs.values()}) == tiny.LAYERS


@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_choice_by_weight_finds_the_unit_that_was_made_to_stand_out(order: str) -> None:
    base = tiny.model("llama")
    factor = 100.0 if order == "largest" else 0.01
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight[:, 13] *= factor
        base.model.layers[1].self_attn.o_proj.weight[:, 8:12] *= factor
    model = wrap(base, selection="weight", order=order, heads=1, channels=1, target_modules=["o_proj", "down_proj"])
    found = slices(model)
    assert found["model.layers.1.mlp.down_proj"] == ("in", [13])
    assert found["model.layers.1.self_attn.o_proj"] == ("in", [8, 9, 10, 11])


def test_fused_query_key_value_trains_rows_of_all_three_parts() -> None:
    found = slices(wrap(tiny.model("gpt2"), heads=1, channels=1))
    for path, (axis, index) in found.items():
        if path.endswith("c_attn"):
            head = index[0] // 4
            rows = [part * tiny.HIDDEN + head * 4 + row for part in range(3) for row in range(4)]
            assert (axis, index) == ("out", rows)


def test_other_modules_train_by_name_as_plain_channels() -> None:
    model = get_peft_model(tiny.model("llama"), S2FTConfig(target_modules=["lm_head"], channels=5))
    (only,) = slices(model).values()
    assert only[0] == "in"
    assert len(only[1]) == 5


def test_unlike_selections_share_one_base() -> None:
    model = wrap(tiny.model("llama"), seed=0)
    start(model)
    first = no_grad_logits(model, tiny.ids())
    options: dict[str, Any] = {"heads": 2, "channels": 5, "seed": 1, "selection": "weight"}
    model.add_adapter("other", S2FTConfig(target_modules=["o_proj", "up_proj"], **options))
    start(model, "other")
    alone = get_peft_model(tiny.model("llama"), S2FTConfig(target_modules=["o_proj", "up_proj"], **options))
    here = {path: layer.s2ft_slice["other"].index for path, layer in own_layers(model).items() if layer.has("other")}
    assert {path: index.tolist() for path, index in here.items()} == {p: i for p, (_, i) in slices(alone).items()}
    assert_same(no_grad_logits(model, tiny.ids()), first, "logits of the first")
    names = ["other", "default", "__base__"]
    mixed = no_grad_logits(model, tiny.ids(), adapter_names=names)
    torch.testing.assert_close(mixed[1], first[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixed[2], no_grad_logits(tiny.model("llama"), tiny.ids())[2], rtol=1e-10, atol=1e-10)
    model.set_adapter("other")
    torch.testing.assert_close(mixed[0], no_grad_logits(model, tiny.ids())[0], rtol=1e-10, atol=1e-10)


def test_a_name_can_be_used_again_with_another_choice() -> None:
    model = wrap(tiny.model("llama"))
    for seed in (1, 2):
        config = S2FTConfig(heads=1, channels=6, seed=seed, target_modules=["o_proj", "down_proj"])
        model.add_adapter("other", config)
        found = {
            path: layer.s2ft_slice["other"].index.tolist()
            for path, layer in own_layers(model).items()
            if layer.has("other")
        }
        alone = slices(get_peft_model(tiny.model("llama"), config))
        assert found == {path: index for path, (_, index) in alone.items()}
        model.delete_adapter("other")


def test_a_choice_by_weight_reads_the_base_not_another_merged_adapter() -> None:
    """A second adapter chosen while the first is merged must be the one it would be on the bare base."""
    options: dict[str, Any] = {
        "selection": "weight",
        "heads": 1,
        "channels": 4,
        "target_modules": ["o_proj", "down_proj"],
    }
    alone = slices(get_peft_model(tiny.model("llama"), S2FTConfig(**options)))
    model = wrap(tiny.model("llama"), heads=2, channels=8)
    start(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("other", S2FTConfig(**options))
    found = {
        p: layer.s2ft_slice["other"].index.tolist() for p, layer in own_layers(model).items() if layer.has("other")
    }
    assert found == {path: index for path, (_, index) in alone.items()}


# The file decides


@pytest.mark.parametrize("permute", [False, True])
def test_unload_while_merged_gives_back_the_base(permute: bool) -> None:
    base = tiny.model("llama")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, S2FTConfig(heads=1, channels=3, permute=permute, init_weights=False))
    model.merge_adapter()
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert_same(after[name], value)


def test_the_file_wins_over_what_the_config_would_choose(tmp_path: Path) -> None:
    """Another version may draw otherwise, and a merged base ranks otherwise; what was trained is in the file."""
    model = wrap(tiny.model("llama", torch.float32), selection="weight")
    start(model)
    model.save_pretrained(tmp_path)
    expected = no_grad_logits(model, tiny.ids())
    base = tiny.model("llama", torch.float32)
    written = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    for change in ({"selection": "random", "seed": 5}, {"heads": 2, "channels": 7}, {"order": "smallest"}):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**written, **change}), encoding="utf-8")
        loaded = PeftModel.from_pretrained(tiny.model("llama", torch.float32), tmp_path).eval()
        assert slices(loaded) == slices(model)
        assert_same(no_grad_logits(loaded, tiny.ids()), expected, f"logits with a config that says {change}")
    assert_differs(no_grad_logits(base, tiny.ids()), expected, "logits")


# Errors


def test_two_budgets_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"S2FTConfig: ratio and match_lora_rank; one way to set the budget"):
        S2FTConfig(ratio=0.1, match_lora_rank=4)
    with pytest.raises(ConfigError, match=r"ratio and heads/channels"):
        S2FTConfig(ratio=0.1, heads=1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"selection": "wieght"},
            r"S2FTConfig.selection: 'wieght'; one of random, weight, activation, product, gradient; did you mean 'we",
        ),
        ({"order": "biggest"}, r"S2FTConfig.order: 'biggest'; one of largest, smallest"),
        ({"coupling": "share"}, r"did you mean 'shared'\?"),
        ({"ratio": 0.0}, r"S2FTConfig.ratio: 0.0; a share in \(0, 1\]"),
        ({"ratio": 1.5}, r"a share in \(0, 1\]"),
        ({"ratio": float("nan")}, r"a share in \(0, 1\]"),
        ({"heads": -1}, r"S2FTConfig.heads: -1; a positive count"),
        ({"match_lora_rank": 0}, r"S2FTConfig.match_lora_rank: 0; a positive count"),
        ({"heads": 0, "channels": 0}, r"no heads and no channels; something to train"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        S2FTConfig(**options)


def test_all_problems_of_a_config_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        S2FTConfig(selection="wieght", coupling="share", ratio=2.0)
    assert all(word in str(caught.value) for word in ("3 problems", "selection", "coupling", "ratio"))


def test_targets_that_are_not_there_list_what_is() -> None:
    with pytest.raises(TargetError, match=r"down_proj, gate_proj, k_proj.*did you mean 'down_proj'\?") as caught:
        get_peft_model(tiny.model("llama"), S2FTConfig(target_modules=["down_prj"]))
    assert isinstance(caught.value, LeantuneError)


def test_a_model_without_known_layers_asks_for_targets() -> None:
    with pytest.raises(TargetError, match=r"S2FTConfig.target_modules: not given.*0, 1"):
        get_peft_model(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), S2FTConfig())  # type: ignore[arg-type]


def test_heads_of_plain_layers_choose_nothing_and_say_so() -> None:
    with pytest.raises(TargetError, match="choose nothing of"):
        get_peft_model(nn.Sequential(nn.Linear(3, 4)), S2FTConfig(target_modules=["0"], heads=1))  # type: ignore[arg-type]


def test_modules_that_are_not_linear_are_refused() -> None:
    with pytest.raises(TargetError, match="Embedding"):
        get_peft_model(tiny.model("llama"), S2FTConfig(target_modules=["embed_tokens"]))


# The layer


def test_the_layer_says_what_it_is() -> None:
    layer = next(iter(layers_of(wrap(tiny.model("llama"))).values()))
    assert isinstance(layer, S2FTLinear)
    assert repr(layer).startswith("s2ft")


@pytest.mark.parametrize("hook", ["forward", "pre_forward"])
def test_a_hook_on_the_base_layer_is_still_called(hook: str) -> None:
    """The kernel takes the base layer's place only where nobody watches it."""
    model = wrap(tiny.model("llama"))
    start(model)
    expected = no_grad_logits(model, tiny.ids())
    calls = []
    for layer in layers_of(model).values():
        base = layer.get_base_layer()
        if hook == "forward":
            base.register_forward_hook(lambda *args: calls.append(1))
        else:
            base.register_forward_pre_hook(lambda *args: calls.append(1))
    watched = no_grad_logits(model, tiny.ids())
    assert len(calls) == len(layers_of(model))
    torch.testing.assert_close(watched, expected, rtol=1e-10, atol=1e-10)


def test_autocast_gives_gradients_in_float32() -> None:
    model = wrap(tiny.model("llama", torch.float32)).train()
    start(model)
    exact = wrap(tiny.model("llama")).train()
    start(exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids=tiny.ids()).logits
    assert_close(output, no_grad_logits(exact, tiny.ids()), torch.bfloat16, 2, 32, what="logits under autocast")
    objective(output.double()).backward()
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32, name
        assert torch.isfinite(gradient).all(), name
