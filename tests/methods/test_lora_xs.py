"""LoRA-XS and its layer: factors, scaling, splits, dropout, preconditioned gradient, what autograd keeps, ranks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import tiny
from leantune import LoraXSConfig
from leantune.core.errors import ConfigError
from leantune.core.linalg import orthonormality_error
from leantune.methods import get, of_config
from leantune.methods._core_factor import CoreFactors
from leantune.methods._rank_budget import allot, uniform_ranks
from leantune.testing.closeness import assert_close, assert_differs, assert_same
from leantune.testing.subject import gradients, no_grad_logits, objective, own_layers, trained

EXACT = torch.float64
OUT, IN = 14, 10


def linear(dtype: torch.dtype = EXACT, shape: tuple[int, int] = (OUT, IN)) -> nn.Sequential:
    layer = nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=EXACT))
    return nn.Sequential(layer).to(dtype)


def wrapped(dtype: torch.dtype = EXACT, shape: tuple[int, int] = (OUT, IN), **options: Any) -> Any:
    return get_peft_model(linear(dtype, shape), LoraXSConfig(**{"r": 4, "target_modules": ["0"], **options}))


def own(model: Any, adapter: str = "default") -> CoreFactors:
    (layer,) = own_layers(model).values()
    return layer.own(adapter)  # type: ignore[no-any-return]


def set_core(model: Any, seed: int = 1) -> None:
    with torch.no_grad():
        core = own(model).weight
        core.copy_(torch.randn(core.shape, generator=torch.Generator().manual_seed(seed), dtype=EXACT))


def points(rows: int = 5, width: int = IN) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(7), dtype=EXACT)


# Factors


def test_lora_xs_starts_from_the_weight_and_from_the_base() -> None:
    model, plain = wrapped(), linear()
    U, S, Vh = torch.linalg.svd(plain[0].weight.detach(), full_matrices=False)
    factors = own(model)
    assert_close(factors.B @ factors.A, (U[:, :4] * S[:4]) @ Vh[:4], EXACT, 16, 4, what="B A")
    assert_close(factors.B.t() @ factors.B, torch.diag(S[:4] ** 2), EXACT, 16, 4, what="B is U S")
    assert orthonormality_error(factors.A.t()) < 1e-12
    assert not factors.weight.any()
    assert_same(model(points()), plain(points()), "output")
    objective(model(points())).backward()
    (gradient,) = gradients(model).values()
    assert bool(gradient.ne(0).all())


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("split", ["core", "left", "right"])
def test_every_split_is_the_same_matrix(split: str, alpha: float | None) -> None:
    """The random weight of ablation D.1, whose product is not zero at the start."""
    first = wrapped(init_weights="kaiming_svd", alpha=alpha, seed=5)
    model = wrapped(init_weights="kaiming_svd", split=split, alpha=alpha, seed=5)
    factors = own(model)
    assert factors.scaling == (1.0 if alpha is None else alpha / 4)
    assert_close(factors.delta(), own(first).delta(), EXACT, 16, 8, what="delta")
    _, S, _ = torch.linalg.svd(factors.delta())
    eye = torch.eye(4, dtype=EXACT)
    where = {"core": factors.weight.detach() * factors.scaling, "left": factors.B, "right": factors.A.t()}
    for name, value in where.items():
        expected = torch.diag(S[:4]) if name == "core" else torch.diag(S[:4] ** 2)
        got = value if name == "core" else value.t() @ value
        assert_close(got, expected if name == split else eye, EXACT, 16, 8, what=f"{name} when {split} is chosen")


def test_a_kaiming_start_is_bounded_like_a_fresh_layer_and_seeded() -> None:
    full = own(wrapped(init_weights="kaiming_svd", r=IN, seed=1)).delta()
    bound = IN**-0.5
    assert float(full.abs().max()) <= bound + 1e-6
    assert abs(float(full.std()) - bound / 3**0.5) < 0.05 * bound
    assert_differs(own(wrapped(init_weights="kaiming_svd", r=IN, seed=2)).delta(), full, "another seed")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_are_orthonormal_whatever_the_base(dtype: torch.dtype) -> None:
    model = wrapped(dtype, (96, 64), r=32, split="core")
    for cast in (None, torch.bfloat16, torch.float16):
        model = model if cast is None else model.to(cast)
        factors = own(model)
        assert factors.B.dtype == factors.A.dtype == torch.float32
        assert max(orthonormality_error(factors.B), orthonormality_error(factors.A.t())) < 1e-5
        assert factors.is_orthonormal()
        assert model(points(width=64).to(cast or dtype)).dtype == (cast or dtype)
    assert not own(wrapped(dtype, (96, 64), r=32)).is_orthonormal()


def test_a_rank_that_no_layer_has_is_clamped_and_said() -> None:
    with pytest.warns(UserWarning, match=r"r=99 is more than 1 of 1 modules have.*0, 14 x 10: 10"):
        model = wrapped(r=99)
    assert own(model).weight.shape == (10, 10)


def test_dropout_is_inverted_on_the_input_and_off_in_evaluation() -> None:
    model = wrapped(dropout=0.5, alpha=2.0)
    set_core(model)
    x, factors = points(), own(model)
    base = linear()(x)
    torch.manual_seed(11)
    dropped = model.train()(x)
    torch.manual_seed(11)
    expected = base + nn.functional.dropout(x, 0.5, True) @ factors.delta().t()
    assert_close(dropped, expected.detach(), EXACT, 16, 4, wrong=(base.detach(),), what="training")
    assert_close(model.eval()(x), (base + x @ factors.delta().t()).detach(), EXACT, 16, 4, what="evaluation")
    assert type(own(wrapped()).dropout) is nn.Identity


@pytest.mark.parametrize("options", [{}, {"split": "core"}, {"split": "right", "alpha": 3.0}], ids=str)
def test_the_preconditioned_gradient_is_the_best_one(options: dict[str, Any]) -> None:
    """Theorem 2: of all ``s B X A`` that of the preconditioned gradient is nearest to the full gradient."""
    found = []
    for precondition in (False, True):
        model = wrapped(precondition=precondition, **options)
        set_core(model)
        objective(model.train()(points())).backward()
        (gradient,) = gradients(model).values()
        found.append(gradient)
    factors, s = own(model), own(model).scaling
    twin = linear()
    with torch.no_grad():
        twin[0].weight.add_(factors.delta())
    objective(twin(points())).backward()
    full = twin[0].weight.grad
    assert full is not None
    assert_close(found[0], s * factors.B.t() @ full @ factors.A.t(), EXACT, 64, 8, what="plain (Lemma 1)")
    best = torch.linalg.pinv(s * factors.B) @ full @ torch.linalg.pinv(factors.A)
    wrong = () if options == {"split": "core"} else (found[0],)
    assert_close(found[1], best, EXACT, 256, 8, wrong=wrong, what="preconditioned")


def test_the_preconditioned_gradient_over_a_weight_of_lower_rank() -> None:
    """Where the factors see two directions of four, it is the best one of those, and no division by zero."""
    base = linear(torch.float32)
    with torch.no_grad():
        base[0].weight.copy_(points(OUT, 2) @ points(2, IN))
    model = get_peft_model(base, LoraXSConfig(r=4, target_modules=["0"], precondition=True))
    twin = linear(torch.float32)
    twin[0].weight.data.copy_(base[0].base_layer.weight)
    for each in (model.train(), twin):
        objective(each(points().float())).backward()
    full, factors = twin[0].weight.grad, own(model)
    assert full is not None
    inverses = [torch.linalg.pinv(each.double(), rtol=1e-6) for each in (factors.B, factors.A)]
    assert int(torch.linalg.matrix_rank(factors.B, rtol=1e-6)) == 2
    (gradient,) = gradients(model).values()
    assert_close(gradient, inverses[0] @ full.double() @ inverses[1], torch.float32, 256, 16, what="preconditioned")


def test_autograd_keeps_one_narrow_product() -> None:
    """Of a layer with 14 outputs and 10 inputs at rank 4; stock LoRA keeps its whole input too."""
    rows = 50
    x = points(rows).requires_grad_()

    def kept(model: Any) -> int:
        there = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
        sizes: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            where = value.untyped_storage().data_ptr()
            if where not in there:
                sizes[where] = value.untyped_storage().nbytes()
            return value

        with saved_tensors_hooks(pack, lambda value: value):
            model.train()(x).sum().backward()
        return sum(sizes.values())

    core = 4 * 4 * 8
    assert kept(wrapped(alpha=2.0)) == rows * 4 * 8 + core
    lora = get_peft_model(linear(), LoraConfig(r=4, target_modules=["0"]))
    assert kept(lora) >= rows * (IN + 4) * 8


# Ranks


def test_ranks_are_the_best_under_the_budget() -> None:
    """Against all ranks there are; spectra of different sizes and speeds."""
    generator = torch.Generator().manual_seed(1)
    spectra = {
        name: (torch.rand(4, generator=generator, dtype=EXACT) * scale).sort(descending=True).values
        for name, scale in (("a", 1.0), ("b", 3.0), ("c", 0.2))
    }
    whole = {path: values**2 for path, values in spectra.items()}
    reached, tried_budgets = 0, list(itertools.product(range(1, 5), repeat=3))
    for uniform in tried_budgets:
        given = dict(zip(spectra, uniform, strict=True))
        budget = sum(rank**2 for rank in uniform)
        ranks = allot(spectra, given)
        cost = sum(rank**2 for rank in ranks.values())
        assert cost <= budget
        captured = sum(float(whole[path][:rank].sum()) for path, rank in ranks.items())
        assert captured >= sum(float(whole[path][:rank].sum()) for path, rank in given.items()) - 1e-12
        # Nothing of the same cost or less captures more.
        best = max(
            sum(float(whole[path][:rank].sum()) for path, rank in zip(whole, tried, strict=True))
            for tried in tried_budgets
            if sum(rank**2 for rank in tried) <= cost
        )
        reached += captured >= best - 1e-12
        assert captured >= 0.9 * best
    # What is left of a budget may fit a smaller step elsewhere, which is not always the best use of all of it.
    assert reached >= 0.8 * len(tried_budgets)


def test_ranks_by_the_spectrum_of_the_weights(tmp_path: Path) -> None:
    base = tiny.model("llama", torch.float32)
    with torch.no_grad():
        base.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(20)
    options = {"r": "auto", "rank_budget": 4, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraXSConfig(**options))
    config = model.peft_config["default"]
    shapes = {path: (layer.out_features, layer.in_features) for path, layer in own_layers(model).items()}
    assert config.ranks == {path: layer.own("default").rank for path, layer in own_layers(model).items()}
    assert len(config.ranks) == 14
    budget = sum(rank**2 for rank in uniform_ranks(shapes, 4).values())
    spent = sum(rank**2 for rank in config.ranks.values())
    assert budget - 2 * max(config.ranks.values()) < spent <= budget
    assert config.ranks["model.layers.0.mlp.down_proj"] == 8 > config.ranks["model.layers.1.mlp.down_proj"]
    assert sum(value.numel() for value in trained(model).values()) == spent

    with torch.no_grad():
        for number, parameter in enumerate(trained(model).values()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    expected = no_grad_logits(model.eval(), tiny.ids(2, 5))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["ranks"] == config.ranks
    with torch.no_grad():
        fresh = tiny.model("llama", torch.float32)
        fresh.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(20)
    for lean in (False, True):
        loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=lean)
        assert_same(no_grad_logits(loaded.eval(), tiny.ids(2, 5)), expected, "logits after loading")
        fresh = loaded.unload()


def test_loading_decomposes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors are in the file; a weight of a large model takes seconds to decompose."""
    model = wrapped()
    set_core(model)
    model.save_pretrained(tmp_path)
    expected = model.eval()(points())

    def refuse(*words: object) -> None:
        raise AssertionError("decomposed a weight")

    monkeypatch.setattr("leantune.methods._low_rank_start.decompose", refuse)
    assert_same(PeftModel.from_pretrained(linear(), tmp_path).eval()(points()), expected, "output")
    with pytest.raises(AssertionError, match="decomposed"):
        wrapped()


def test_the_paper_trains_all_linear_layers_of_the_blocks() -> None:
    for family, names in {
        "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "bert": {"query", "key", "value", "dense"},
        "gpt2": {"c_attn", "c_proj", "c_fc"},
    }.items():
        model = get_peft_model(tiny.model(family, torch.float32), LoraXSConfig(r=2))
        assert model.peft_config["default"].target_modules == names
        assert all("lm_head" not in path and "classifier" not in path for path in own_layers(model))


# Options


def test_all_wrong_options_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as told:
        LoraXSConfig(
            r=0,
            rank_budget=0,
            alpha=-1.0,
            dropout=1.0,
            init_weights="weight_sdv",  # type: ignore[arg-type]
            split="top",  # type: ignore[arg-type]
            noise=-1.0,
        )
    for option in ("r:", "rank_budget", "alpha", "dropout", "init_weights", "split", "noise"):
        assert f"LoraXSConfig.{option}" in str(told.value)
    assert "weight_svd" in str(told.value)
    with pytest.raises(ConfigError, match=r"noise: 0\.01 with init_weights=True"):
        LoraXSConfig(noise=0.01)
    with pytest.raises(ConfigError, match="sketch: 64 with init_weights=True"):
        LoraXSConfig(sketch=64)
    with pytest.raises(ConfigError, match="rank_budget: 8 with r=32; r='auto'"):
        LoraXSConfig(rank_budget=8)
    with pytest.raises(ConfigError, match="sketch: 16; a width of at least 64"):
        LoraXSConfig(r="auto", init_weights="update_svd", sketch=16)


def test_the_names_are_presets_of_one_config() -> None:
    for name, start in (("lora-xs", "weight_svd"), ("lora-sb", "update_svd")):
        config = get(name).make_config()
        assert config.start == start
        assert of_config(config).name == name
        assert get(name).needs_batches(config) == (start == "update_svd")
    assert get("lora-sb").calibration_share == 0.001
    assert get("lora-xs").trainable_parameters(LoraXSConfig(r=16), 4096, 4096) == 256
    assert get("lora-xs").trainable_parameters(LoraXSConfig(r=16), 4096, 8) == 64


def test_nothing_of_it_is_taken_for_lora_by_name() -> None:
    """TRL looks for ``lora_`` in the names of parameters."""
    assert not [name for name in wrapped().state_dict() if "lora_" in name]
