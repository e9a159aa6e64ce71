"""Regimes: precision, optimizer, accumulation, clipping, checkpointing, compilation. Each trains, and each is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import tiny
from leantune import S2FTConfig
from leantune.core.errors import ConfigError
from leantune.data import Collator, PackCollator
from leantune.methods import TrainingPlan
from leantune.methods._base import AdapterLayer
from leantune.models import load_base
from leantune.testing.closeness import assert_close, assert_same_state
from leantune.train import LeanTrainer, Run, RunConfig, fit
from leantune.train.loss import Selection, selected_losses

SLICES = {"heads": 1, "channels": 3, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}


@pytest.fixture
def config(llama_folder: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a short run."""
    return {
        "model": str(llama_folder),
        "data": rows_file,
        "out": tmp_path / "run",
        "method_options": SLICES,
        "max_steps": 6,
        "batch_size": 8,
        "schedule": "constant",
        "lr": 3e-2,
        "device": "cpu",
    }


def adapted(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A tiny Llama with slices away from their start, in training mode."""
    base = tiny.model("llama", torch.float64).to(dtype)
    return get_peft_model(base, S2FTConfig(**{**SLICES, "init_weights": False, **options})).train()


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if not each.requires_grad}


def batch(rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    ids = tiny.ids(rows, length)
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradient(model: nn.Module, autocast: bool = False) -> Tensor:
    """The gradient of everything that trains, end to end."""
    model.zero_grad()
    inputs = batch()
    selection = Selection.of(inputs.pop("labels"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = selected_losses(model, inputs, selection).mean()
    loss.backward()
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


# Every regime trains, and the base stays what it was


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"precision": "bf16", "device": "auto"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "precision": "bf16", "gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_accumulation": 2, "batch_size": 4},
        {"optimizer": "sgd", "lr": 0.5},
        {"optimizer": "adafactor"},
        {"optimizer": "adagrad"},
        {"optimizer": "rmsprop", "weight_decay": 0.01},
        {"optimizer": "adamw_torch_fused", "clip": 0.1},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_a_regime_trains_the_slices_alone(config: dict[str, Any], options: dict[str, Any]) -> None:
    settings = RunConfig(**{**config, **options})
    run = fit(settings, progress=False)
    losses = run.summary
    assert losses["last_loss"] < losses["first_loss"] - 0.02
    trained = {name: each for name, each in run.model.named_parameters() if "s2ft_slice" in name}
    assert trained
    assert {each.dtype for each in trained.values()} == {torch.float32}
    assert any(bool(each.any()) for each in trained.values())
    base = load_base(config["model"], dtype=settings.dtype).model
    after = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): each
        for name, each in run.model.named_parameters()
    }
    assert_same_state({name: after[name] for name, _ in base.named_parameters()}, dict(base.named_parameters()))
    assert next(base.parameters()).dtype == getattr(torch, settings.dtype)


def test_an_optimizer_that_needs_what_is_not_here_says_so(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"optimizer galore_adamw: .*; install what it needs, or name another"):
        fit(RunConfig(**config, optimizer="galore_adamw"), progress=False)


def test_the_named_optimizer_gets_rate_and_decay(config: dict[str, Any]) -> None:
    from leantune.train.setup import prepare

    trainer = prepare(RunConfig(**config, optimizer="sgd", weight_decay=0.25)).trainer
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.SGD
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(3e-2, 0.25)]
    given = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert given == {id(each) for each in trainer.model.parameters() if each.requires_grad}


# Accumulation, clipping, checkpointing, autocast: against the plain way


def descent(groups: list[dict[str, Any]], rate: float, arguments: TrainingArguments) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=rate)


def train(model: Any, folder: Path, rows: list[dict[str, Any]], **options: Any) -> LeanTrainer:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    plan, collator = options.pop("plan", TrainingPlan(optimizer=descent)), options.pop("data_collator", Collator(0))
    arguments = TrainingArguments(output_dir=str(folder), **{**settings, **options})
    trainer = LeanTrainer(model, plan=plan, args=arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    return trainer


def slices(model: nn.Module) -> Tensor:
    return torch.cat([each.detach().flatten() for each in model.parameters() if each.requires_grad])


def test_four_passes_of_one_row_step_as_one_of_four(tmp_path: Path, examples: list[dict[str, Any]]) -> None:
    model = adapted()
    start = slices(model)
    ends = []
    for size, passes in ((4, 1), (1, 4)):
        own = copy.deepcopy(model)
        train(own, tmp_path, examples[:4], per_device_train_batch_size=size, gradient_accumulation_steps=passes)
        ends.append(slices(own) - start)
    assert float(ends[0].norm()) > 1e-3
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-12 * float(ends[0].abs().max()))


def test_clipping_is_torchs_own(tmp_path: Path, examples: list[dict[str, Any]]) -> None:
    model = adapted()
    by_hand = copy.deepcopy(model)
    inputs = Collator(0)(examples[:4])
    loss = selected_losses(by_hand, inputs, Selection.of(inputs.pop("labels"))).mean()
    loss.backward()
    parameters = [each for each in by_hand.parameters() if each.requires_grad]
    norm = float(nn.utils.clip_grad_norm_(parameters, 0.01))
    assert norm > 0.02, "there is something to clip"
    descent([{"params": parameters}], 0.1, TrainingArguments()).step()
    start = slices(model)
    trainer = train(model, tmp_path, examples[:4], max_grad_norm=0.01)
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-9)
    torch.testing.assert_close(slices(model) - start, slices(by_hand) - start, rtol=1e-9, atol=1e-15)
    assert float((slices(model) - start).norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_checkpointing_gives_the_same_gradients_bit_for_bit(dtype: torch.dtype) -> None:
    model = adapted(dtype)
    plain = gradient(model)
    model.activation_checkpointing_enable()
    model.get_base_model().disable_input_require_grads()
    assert torch.equal(gradient(model), plain)
    assert bool(plain.any())


# Matrix products in a row that a gradient passes: seven a layer and the attention's two, forth and back, and the head.
PRODUCTS = 2 * (2 * 9) + 2


def test_autocast_is_off_by_the_roundings_of_its_products() -> None:
    truth = adapted()
    exact = gradient(truth)
    model = copy.deepcopy(truth).float()
    rough = gradient(model, autocast=True)
    assert_close(rough, exact, torch.bfloat16, k=1, depth=PRODUCTS, what="gradient under autocast")
    assert_close(gradient(model), exact, torch.float32, k=8, depth=PRODUCTS, what="gradient in float32")
    error = float((rough.double() - exact).norm() / exact.norm())
    assert error > torch.finfo(torch.bfloat16).eps / 8, "it did compute in bfloat16"


def test_bfloat16_weights_beside_float32_slices_are_off_by_as_much() -> None:
    # The truth is that of the rounded weights.
    model = adapted(torch.bfloat16)
    exact = gradient(copy.deepcopy(model).double())
    assert_close(gradient(model), exact, torch.bfloat16, k=1, depth=PRODUCTS, what="gradient")


# Compilation


def layer_of(model: nn.Module, name: str) -> AdapterLayer:
    return next(each for path, each in model.named_modules() if isinstance(each, AdapterLayer) and path.endswith(name))


def assert_compiles(layer: nn.Module, x: Tensor) -> None:
    """One graph, no break, the same output and gradients."""
    results = []
    torch._dynamo.reset()
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        own = x.clone().requires_grad_()
        layer.zero_grad()
        y = call(own)
        y.float().square().sum().backward()
        grads = [each.grad for each in layer.parameters() if each.grad is not None]
        results.append([y.detach(), own.grad, *grads])
    assert len(results[0]) > 2
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["o_proj", "q_proj"], ids=["columns", "rows"])
def test_a_layer_compiles_in_one_graph(name: str, dtype: torch.dtype) -> None:
    layer = layer_of(adapted(dtype), name)
    assert_compiles(layer, torch.randn(2, 5, layer.in_features, dtype=dtype))


@pytest.mark.parametrize("name", ["o_proj", "q_proj"], ids=["columns", "rows"])
def test_two_adapters_compile_in_one_graph(name: str) -> None:
    model = adapted(torch.float32)
    model.add_adapter("second", S2FTConfig(**{**SLICES, "init_weights": False, "seed": 4}))
    model.base_model.set_adapter(["default", "second"])
    layer = layer_of(model, name)
    assert_compiles(layer, torch.randn(2, 5, layer.in_features))
    assert sum(each.grad is not None for each in layer.parameters()) == 2


def test_a_layer_under_autocast_has_no_graph_break() -> None:
    layer = layer_of(adapted(torch.float32), "o_proj")
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch._dynamo.explain(layer)(torch.randn(2, 5, layer.in_features))
    assert found.graph_break_count == 0
    assert found.graph_count == 1


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packs"])
def test_a_compiled_run_takes_the_same_steps(tmp_path: Path, examples: list[dict[str, Any]], packed: bool) -> None:
    # One layer of one method: what is compiled is traced for seconds.
    base = LlamaForCausalLM(LlamaConfig(**{**tiny._DECODER, "num_hidden_layers": 1})).double()
    model = get_peft_model(base, S2FTConfig(**{**SLICES, "target_modules": ["o_proj"], "init_weights": False}))
    rows: Any = examples[:8]
    if packed:
        rows = [{"documents": examples[start : start + 2]} for start in range(0, 8, 2)]
    losses = []
    for backend in (None, "eager"):
        torch._dynamo.reset()
        counters.clear()
        trainer = train(
            copy.deepcopy(model),
            tmp_path,
            rows,
            max_steps=4,
            per_device_train_batch_size=1 if packed else 2,
            data_collator=PackCollator(0),
            torch_compile=backend is not None,
            torch_compile_backend=backend,
        )
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert len(set(losses[0])) == 4
    assert not counters["graph_break"]
    # One for the first shape, one when the number of loss tokens varies, one when the length does.
    assert counters["stats"]["unique_graphs"] <= 3


def test_a_compiled_run_leaves_an_adapter_like_any_other(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from leantune.train import setup

    make: Callable[..., Any] = setup._arguments

    def with_backend(*given: Any) -> Any:
        arguments = make(*given)
        assert arguments.torch_compile
        arguments.torch_compile_backend = "eager"
        return arguments

    monkeypatch.setattr(setup, "_arguments", with_backend)
    run = fit(RunConfig(**{**config, "max_steps": 3, "save_steps": 2}, compile=True), progress=False)
    assert run.summary["steps"] == 3
    _, model = Run.open(config["out"]).load()
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, run.model(input_ids=ids).logits)
    assert (config["out"] / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors").is_file()
