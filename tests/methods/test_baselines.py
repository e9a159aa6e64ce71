"""Stock PEFT behind our interface: what its variants start from, and that their files mean the same over any base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.config import LoraGAConfig
from torch import Tensor

import leantune
import tiny
from leantune import methods
from leantune.adapters import convert_to_lora
from leantune.adapters.folder import save
from leantune.adapters.merging import refuse_unmergeable
from leantune.core.errors import AdapterError, ConfigError, MethodError
from leantune.methods._offset import OffsetFactor, OffsetLinear
from leantune.methods.prefix import starting_text
from leantune.testing.closeness import assert_close, assert_same, assert_same_state
from leantune.testing.subject import calibration_batches, calibration_loss, layers_of, no_grad_logits, start, trained

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
# 2026-11-25: stock LoRA says that it sets fan_in_fan_out for Conv1D by itself.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")


def wrap(name: str, family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A method on a tiny model, its start computed."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM", **options}
    config = methods.get(name).make_config(**settings)
    model = methods.get(name).apply(tiny.model(family, dtype), config)
    if methods.get(name).needs_batches(config):
        leantune.initialize(model, calibration_batches(model), loss=calibration_loss)
    return model.eval()


def halves(layer: Any) -> tuple[Tensor, Tensor]:
    """``B0`` and ``A0``: what trains, before it has trained."""
    return layer.lora_B["default"].trained.detach(), layer.lora_A["default"].trained.detach()


def exact_gradients(family: str, paths: list[str]) -> dict[str, Tensor]:
    """``dL/dW`` of the calibration loss, by autograd on the plain model."""
    model = tiny.model(family, torch.float32)
    for batch in calibration_batches(model):
        calibration_loss(model, batch).backward()
    return {path: model.get_parameter(f"{path}.weight").grad for path in paths}


# PiSSA and LoRA-GA


@pytest.mark.parametrize("family", TARGETS)
def test_pissa_starts_where_pefts_does(family: str) -> None:
    config = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS[family], init_lora_weights="pissa")
    theirs: dict[str, Any] = layers_of(get_peft_model(tiny.model(family, torch.float32), config))
    for path, layer in layers_of(wrap("pissa", family)).items():
        B, A = halves(layer)
        assert_same(B, theirs[path].lora_B["default"].weight.detach(), f"{path}, B")
        assert_same(A, theirs[path].lora_A["default"].weight.detach(), f"{path}, A")


# A randomised SVD of few iterations is near the best; the exact one is it, up to float32.
@pytest.mark.parametrize(("start_at", "above"), [("pissa", 1e-5), ("pissa_niter_6", 0.05)])
def test_pissa_takes_the_best_part_of_the_weight(start_at: str, above: float) -> None:
    for path, layer in layers_of(wrap("pissa", init_lora_weights=start_at)).items():
        B, A = (factor.double() for factor in halves(layer))
        weight = layer.get_base_layer().weight.double()
        best = torch.linalg.svdvals(weight)[3:].norm()
        assert best * (1 - 1e-5) <= (weight - layer.scaling["default"] * B @ A).norm() <= best * (1 + above), path


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_lora_ga_starts_where_pefts_does_on_the_same_gradient(family: str, direction: str) -> None:
    model = wrap("lora-ga", family, lora_ga_config=LoraGAConfig(direction=direction, scale="gd_scale"))  # type: ignore[arg-type]
    layers: dict[str, Any] = layers_of(model)
    base = tiny.model(family, torch.float32)
    for path, gradient in exact_gradients(family, list(layers)).items():
        base.get_submodule(path)._peft_loraga_grad = gradient
    config = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS[family], init_lora_weights="lora_ga")
    config.lora_ga_config = LoraGAConfig(direction=direction, scale="gd_scale")  # type: ignore[arg-type]
    config.fan_in_fan_out = family == "gpt2"
    theirs: dict[str, Any] = layers_of(get_peft_model(base, config))
    for path, layer in layers.items():
        B, A = halves(layer)
        assert B.norm() > 0
        for got, factor in ((B, theirs[path].lora_B), (A, theirs[path].lora_A)):
            # Singular vectors have a sign by chance; a randomised SVD is close to the exact one.
            wanted = factor["default"].weight.detach()
            rows = (got, wanted) if got is A else (got.t(), wanted.t())
            for mine, other in zip(*rows, strict=True):
                sign = torch.sign(mine @ other)
                assert (mine - sign * other).norm() < 2e-3 * other.norm(), path


@pytest.mark.parametrize("name", ["pissa", "lora-ga"])
@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_start_away_from_zero_changes_neither_function_nor_base(name: str, family: str, dtype: torch.dtype) -> None:
    plain = tiny.model(family, dtype)
    model = wrap(name, family, dtype)
    for path, layer in layers_of(model).items():
        assert_same(layer.get_base_layer().weight, plain.get_parameter(f"{path}.weight"), path)
        assert layer.get_delta_weight("default").abs().max() < 1e-6 * max(factor.norm() for factor in halves(layer))
    # Two blocks of two adapted layers, each of which rounds a share that is zero: depth 4. A rounding of the base is
    # seen through the layers above it.
    quiet = no_grad_logits(plain, tiny.ids()).double()
    assert_close(no_grad_logits(model, tiny.ids()), quiet, dtype, 16, 4, what="logits")


def test_lora_ga_draws_nothing_from_the_run() -> None:
    torch.manual_seed(3)
    first = wrap("lora-ga")
    torch.manual_seed(4)
    second = wrap("lora-ga")
    assert_same_state(get_peft_model_state_dict(second), get_peft_model_state_dict(first), "start")


# 2026-11-25: PEFT says that it could not undo a start in the base with such patterns; here none is in the base.
@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA:UserWarning")
@pytest.mark.parametrize("name", ["pissa", "lora-ga"])
def test_its_file_is_plain_lora_of_twice_the_rank(name: str, tmp_path: Path) -> None:
    model = wrap(name, use_rslora=True, rank_pattern={"down_proj": 2})
    layers: Any = layers_of(model).values()
    scalings = {path: layer.scaling["default"] for path, layer in layers_of(model).items()}
    assert sorted(set(scalings.values())) == pytest.approx([5 / 3**0.5, 5 / 2**0.5])
    start(model)
    expected = no_grad_logits(model, tiny.ids())
    folder = save(model, tmp_path / "adapter")
    # As stock PEFT reads it, over the base as everybody has it.
    read = PeftModel.from_pretrained(tiny.model("llama", torch.float32), folder).eval()
    assert {type(layer) for layer in layers_of(read).values()} == {LoraLinear}
    config: Any = read.peft_config["default"]
    assert (config.init_lora_weights, config.r, config.rank_pattern) == (True, 6, {"down_proj": 4})
    assert {path: layer.scaling["default"] for path, layer in layers_of(read).items()} == scalings
    assert_same(no_grad_logits(read, tiny.ids()), expected, "logits of stock PEFT")
    exported = convert_to_lora(model, tmp_path / "lora")
    size = max(layer.lora_B["default"].weight.norm() * layer.lora_A["default"].weight.norm() for layer in layers)
    assert exported.rank == 6
    assert exported.max_abs_error < 1e-6 * size


def test_half_of_a_factor_trains() -> None:
    model = wrap("pissa")
    parameters = trained(model)
    shapes = {path: (layer.out_features, layer.in_features) for path, layer in layers_of(model).items()}
    assert sum(each.numel() for each in parameters.values()) == sum(3 * (out + width) for out, width in shapes.values())
    before = {name: value.clone() for name, value in model.named_buffers() if name.endswith("fixed")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.1)
    calibration_loss(model, calibration_batches(model)[0]).backward()
    optimizer.step()
    assert_same_state({name: model.get_buffer(name) for name in before}, before, "frozen halves")
    assert all(layer.get_delta_weight("default").abs().max() > 1e-3 for layer in layers_of(model).values())


def test_a_factor_reads_what_it_wrote_and_nothing_of_another_shape() -> None:
    first, second = OffsetFactor((2, 4), 0, False), OffsetFactor((2, 4), 0, True)
    first.start(torch.randn(2, 4))
    with torch.no_grad():
        first.trained.add_(1)
    second.load_state_dict(first.state_dict())
    assert not second.waits
    assert_same(second.weight, first.weight, "weight")
    assert_same(second.fixed, first.weight[2:], "frozen half")
    with pytest.raises(RuntimeError, match="size mismatch"):
        OffsetFactor((3, 4), 0, False).load_state_dict(first.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        first.load_state_dict({})


@pytest.mark.parametrize(("name", "r", "most"), [("pissa", 21, 20), ("lora-ga", 11, 10)])
def test_a_rank_that_the_layer_has_not_is_refused(name: str, r: int, most: int) -> None:
    with pytest.raises(MethodError, match=f"at most {most}"):
        wrap(name, r=r)


def test_other_layers_than_linear_ones_are_refused() -> None:
    with pytest.raises((MethodError, ValueError), match=r"embed_tokens|nitialization"):
        wrap("pissa", target_modules=["q_proj", "embed_tokens"])


def test_packed_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leantune.core.packed_weight.is_packed", lambda layer: True)
    with pytest.raises(MethodError, match="over packed weights"):
        wrap("pissa")


def test_peft_is_given_a_config_that_keeps_the_base() -> None:
    plain = tiny.model("llama", torch.float32)
    config = methods.get("pissa").make_config(r=3, target_modules=["q_proj"])
    model = get_peft_model(tiny.model("llama", torch.float32), config)
    for path, layer in layers_of(model).items():
        assert isinstance(layer, OffsetLinear)
        assert_same(layer.get_base_layer().weight, plain.get_parameter(f"{path}.weight"), path)


# The others


def test_dora_is_exact_at_its_start_where_the_base_is_not_16_bits() -> None:
    for dtype in (torch.float32, torch.float64):
        assert_same(
            no_grad_logits(wrap("dora", dtype=dtype), tiny.ids()),
            no_grad_logits(tiny.model("llama", dtype), tiny.ids()),
            f"logits in {dtype}",
        )


def test_a_name_is_found_again_by_its_config() -> None:
    for name in ("lora", "rslora", "dora", "pissa", "lora-ga", "vera", "prefix", "lisa", "galore"):
        assert methods.of_config(methods.get(name).make_config()).name == name


def test_a_prefix_is_refused_where_nothing_would_read_it() -> None:
    for task in (None, "SEQ_CLS"):
        with pytest.raises(MethodError, match="a causal language model"):
            methods.get("prefix").apply(tiny.model("llama"), methods.get("prefix").make_config(task_type=task))


def test_a_prefix_of_no_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_virtual_tokens: 0; at least 1"):
        methods.get("prefix").make_config(task_type="CAUSAL_LM", num_virtual_tokens=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma"])
def test_a_prefix_starts_as_a_text_that_the_model_has_read(family: str) -> None:
    model = tiny.model(family, torch.float64)
    text = starting_text(model, 3)
    with torch.no_grad():
        exact = model(input_ids=torch.cat([text.expand(3, 3), tiny.ids()], 1)).logits[:, 3:]
        plain = model(input_ids=tiny.ids()).logits
    config = methods.get("prefix").make_config(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = methods.get("prefix").apply(model, config)
    assert_close(no_grad_logits(wrapped, tiny.ids()), exact, torch.float64, 64, 8, wrong=(plain,), what="logits")
    assert text[0, 0] == 1, "the token that begins a text"
    zeros = methods.get("prefix").make_config(task_type="CAUSAL_LM", num_virtual_tokens=3, init_weights="zero")
    values = trained(methods.get("prefix").apply(tiny.model(family), zeros)).values()
    assert not any(each.any() for each in values)


def test_a_prefix_is_neither_merged_nor_exported(tmp_path: Path) -> None:
    config = methods.get("prefix").make_config(task_type="CAUSAL_LM")
    model: Any = methods.get("prefix").apply(tiny.model("llama", torch.float32), config)
    sentence = "a prefix is keys and values in front of the text and no change of weights"
    with pytest.raises(AdapterError, match=sentence):
        refuse_unmergeable(model, "default")
    with pytest.raises(AdapterError, match=sentence):
        convert_to_lora(model, tmp_path / "lora")


def test_a_prefix_counts_keys_and_values_of_every_layer() -> None:
    config = methods.get("prefix").make_config(task_type="CAUSAL_LM", num_virtual_tokens=7)
    model = methods.get("prefix").apply(tiny.model("llama", torch.float32), config)
    width = tiny.KV_HEADS * tiny.HIDDEN // tiny.HEADS
    each = methods.get("prefix").trainable_parameters(config, width, tiny.HIDDEN)
    assert sum(value.numel() for value in trained(model).values()) == tiny.LAYERS * 2 * each == 2 * 2 * 7 * width
