"""LoRA-SB's start: against optimizers that really take their first step, on the whole weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer as TokenizerBackend
from tokenizers import models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.optimization import Adafactor

import tiny
from leantune import LoraXSConfig, initialize
from leantune.core.errors import MethodError
from leantune.core.linalg import orthonormality_error, subspace_overlap
from leantune.methods._first_step import first_step
from leantune.testing.closeness import assert_close, assert_differs, assert_same, assert_same_state
from leantune.testing.subject import no_grad_logits, own_layers, trained
from packed_fixture import TOKENS, load, make_llama

EXACT = torch.float64
RATE, RANK = 0.01, 3

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    # The eps of Adam is no part of the method's step; see _first_step.
    "adamw_torch": lambda given: torch.optim.AdamW(given, lr=RATE, weight_decay=0, eps=1e-30),
    "adam": lambda given: torch.optim.Adam(given, lr=RATE, eps=1e-30),
    "adagrad": lambda given: torch.optim.Adagrad(given, lr=RATE, eps=1e-30),
    "sgd": lambda given: torch.optim.SGD(given, lr=RATE, momentum=0.9),
    "rmsprop": lambda given: torch.optim.RMSprop(given, lr=RATE, eps=1e-30),
    "adafactor": lambda given: Adafactor(given, lr=RATE, scale_parameter=False, relative_step=False),
}


def batches() -> list[dict[str, Tensor]]:
    found = []
    for rows, length, seed in ((3, 7, 1), (2, 6, 2)):
        ids = tiny.ids(rows, length, seed)
        labels = ids.clone()
        labels[0, :3] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


LABELS = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches())


def mean_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """A batch's share of the mean over all labels, in float64 (transformers forms its own in float32)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum") / LABELS


def real_steps(make: Callable[[Any], torch.optim.Optimizer], family: str = "llama") -> dict[str, Tensor]:
    """Path -> what one real step of full fine-tuning adds to each weight, ``(out, in)``, in float64."""
    model = tiny.model(family)
    layers = tiny.linears(model)
    before = {path: layer.weight.detach().clone() for path, layer in layers.items()}
    sum(mean_loss(model, batch) for batch in batches()).backward()  # type: ignore[union-attr]
    given: Any = list(model.parameters())
    if family == "gpt2":
        # Its weights stand the other way round, and Adafactor is the only one to mind: none of those here is.
        assert "Conv1D" in {type(layer).__name__ for layer in layers.values()}
    make(given).step()
    steps = {path: layer.weight.detach() - before[path] for path, layer in layers.items()}
    return {path: step.t() if type(layers[path]).__name__ == "Conv1D" else step for path, step in steps.items()}


def started(base: Any = None, optimizer: Any = "adamw_torch", **options: Any) -> Any:
    base = tiny.model("llama") if base is None else base
    model = get_peft_model(base, LoraXSConfig(**{"r": RANK, "init_weights": "update_svd", **options}))
    told = initialize(model, batches(), RATE, mean_loss, optimizer=optimizer)
    model.told = told
    return model


def deltas(model: Any) -> dict[str, Tensor]:
    return {path: layer.own("default").delta() for path, layer in own_layers(model).items()}


def best(matrix: Tensor, rank: int = RANK) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_start_is_the_best_approximation_of_the_real_first_step(optimizer: str) -> None:
    steps = real_steps(OPTIMIZERS[optimizer])
    model = started(optimizer=optimizer)
    assert len(own_layers(model)) == 14
    kept = total = 0.0
    for path, delta in deltas(model).items():
        step = steps[path]
        wrong = (best(step, RANK - 1), best(step, RANK + 1), -best(step))
        assert_close(delta, best(step), EXACT, 2**20, 16, wrong=wrong, what=path)
        core = own_layers(model)[path].own("default")
        assert core.is_orthonormal()
        assert bool((core.weight.diagonal() > 0).all())
        kept += float(best(step).square().sum())
        total += float(step.square().sum())
    told = model.told
    assert (told["optimizer"], told["step_size"], told["passes"]) == (optimizer, RATE, 1)
    assert abs(told["captured"] - kept / total) < 1e-6


def test_the_start_over_transposed_weights() -> None:
    steps = real_steps(OPTIMIZERS["adamw_torch"], "gpt2")
    for path, delta in deltas(started(tiny.model("gpt2"))).items():
        assert_close(delta, best(steps[path]), EXACT, 2**20, 16, what=path)


def test_lion_takes_the_same_first_step() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="Lion comes with bitsandbytes, which is not installed")
    parameter = nn.Parameter(torch.zeros(70, 80))
    parameter.grad = torch.randn(70, 80)
    expected = first_step("lion_32bit", parameter.grad.clone(), RATE)
    bitsandbytes.optim.Lion([parameter], lr=RATE, optim_bits=32).step()
    assert_close(parameter.detach(), expected.double(), torch.float32, 4, 2, what="Lion")
    assert_same(first_step("paged_lion_8bit", torch.randn(3, 4).abs(), RATE), torch.full((3, 4), -RATE), "sign")


def test_weight_decay_is_left_out() -> None:
    """Its share of a real step is ``-eta lambda W``, which is no news about the data."""
    plain = real_steps(OPTIMIZERS["adamw_torch"])
    decayed = real_steps(lambda given: torch.optim.AdamW(given, lr=RATE, weight_decay=0.5, eps=1e-30))
    for path, layer in tiny.linears(tiny.model("llama")).items():
        if path in plain and isinstance(layer, nn.Linear):
            share = -RATE * 0.5 * layer.weight.detach()
            assert_close(decayed[path] - plain[path], share, EXACT, 2**12, 4, what=path)


def test_a_step_of_ones_own() -> None:
    """An optimizer that is not known gives its own step; without it the known ones are named."""
    steps = real_steps(OPTIMIZERS["sgd"])

    def twice(gradient: Tensor, step_size: float) -> Tensor:
        return -2 * step_size * gradient

    model = started(optimizer=twice)
    assert model.told["optimizer"] == "twice"
    for path, delta in deltas(model).items():
        assert_close(delta, 2 * best(steps[path]), EXACT, 2**16, 16, what=path)
    with pytest.raises(MethodError, match=r"optimizer 'galore_adamw': .*adamw_torch, .*function"):
        started(optimizer="galore_adamw")


def test_an_unknown_optimizer_is_refused_before_the_batches_are_read() -> None:
    def unread(model: Any, batch: Any) -> Tensor:
        raise AssertionError("went through a batch")

    model = get_peft_model(tiny.model("llama"), LoraXSConfig(r=RANK, init_weights="update_svd"))
    with pytest.raises(MethodError, match="its first step is not known"):
        initialize(model, batches(), RATE, unread, optimizer="stable_adamw")


def test_a_step_of_adafactor_that_is_clipped() -> None:
    """Of a gradient that is no product of rows and columns: its rescaled form has a norm above one."""
    gradient = torch.eye(6, 8, dtype=EXACT) + 1e-3 * torch.randn(6, 8, dtype=EXACT)
    parameter = nn.Parameter(torch.zeros(6, 8, dtype=EXACT))
    parameter.grad = gradient.clone()
    OPTIMIZERS["adafactor"]([parameter]).step()
    step = first_step("adafactor", gradient.clone(), RATE)
    assert_close(step, parameter.detach(), EXACT, 16, 8, what="step")
    assert float(step.square().mean().sqrt()) == pytest.approx(RATE, rel=1e-6)


def test_a_step_size_is_asked_for() -> None:
    model = get_peft_model(tiny.model("llama"), LoraXSConfig(r=RANK, init_weights="update_svd"))
    with pytest.raises(MethodError, match=r"no step_size.*step_size=\.\.\."):
        initialize(model, batches())
    assert not any(layer.own("default").weight.any() for layer in own_layers(model).values())


def test_scaling_does_not_change_the_start() -> None:
    """``R = S / s``: the paper's eq. 2."""
    plain = deltas(started())
    for path, delta in deltas(started(alpha=12.0)).items():
        assert_close(delta, plain[path], EXACT, 16, 4, what=path)


@pytest.mark.parametrize("split", ["left", "right"])
def test_ablation_d2_starts_from_the_same_step(split: str) -> None:
    plain, model = deltas(started()), started(split=split)
    for path, delta in deltas(model).items():
        assert_close(delta, plain[path], EXACT, 64, 8, what=path)
        core = own_layers(model)[path].own("default")
        assert_same(core.weight.detach(), torch.eye(RANK, dtype=EXACT), "R")
        assert (orthonormality_error(core.B) < 1e-5) == (split == "right")
        assert (orthonormality_error(core.A.t()) < 1e-5) == (split == "left")


def test_ablation_d1_adds_noise_to_the_step() -> None:
    """Little of it changes little; much of it leaves nothing of the step; the seed decides which."""
    plain = started()
    overlaps = []
    for noise in (1e-6, 1.0):
        model = started(noise=noise)
        pairs = [
            (layer.own("default"), own_layers(plain)[path].own("default")) for path, layer in own_layers(model).items()
        ]
        overlaps.append(sum(subspace_overlap(one.B, two.B) for one, two in pairs) / len(pairs))
    assert overlaps[0] > 1 - 1e-6
    assert overlaps[1] < 0.5
    assert_same_state(deltas(started(noise=1.0)), deltas(started(noise=1.0)), "same seed")
    other = deltas(started(noise=1.0, seed=1))
    assert_differs(next(iter(other.values())), next(iter(deltas(started(noise=1.0)).values())), "another seed")


# Under what circumstances


def test_layer_by_layer_is_the_same() -> None:
    """In groups of one layer, a pass over the batches for each."""
    whole = deltas(started())
    model = get_peft_model(tiny.model("llama"), LoraXSConfig(r=RANK, init_weights="update_svd"))
    told = initialize(model, batches(), RATE, mean_loss, gradient_bytes=1)
    assert told["passes"] == 14
    for path, delta in deltas(model).items():
        assert_close(delta, whole[path], EXACT, 2**20, 16, what=path)


def test_checkpointing_and_dropout_change_nothing() -> None:
    expected = deltas(started())
    base = tiny.model("llama")
    base.config.attention_dropout = 0.5
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model = get_peft_model(base, LoraXSConfig(r=RANK, init_weights="update_svd", dropout=0.5)).train()
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(base, new if hasattr(base, new) else old)()
    before = torch.get_rng_state()
    initialize(model, batches(), RATE, mean_loss)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    for path, delta in deltas(model).items():
        assert_close(delta, expected[path], EXACT, 2**20, 16, what=path)


def test_over_bfloat16_the_factors_stay_float32_and_orthonormal() -> None:
    exact, rough = started(), started(tiny.model("llama", torch.bfloat16))
    overlaps = []
    for path, layer in own_layers(rough).items():
        core = layer.own("default")
        assert {core.B.dtype, core.A.dtype, core.weight.dtype} == {torch.float32}
        assert max(orthonormality_error(core.B), orthonormality_error(core.A.t())) < 1e-5
        overlaps.append(subspace_overlap(core.B.double(), own_layers(exact)[path].own("default").B))
    # The gradients are those of a rounded model.
    assert sum(overlaps) / len(overlaps) > 0.8


def test_gradients_over_float16_do_not_vanish() -> None:
    """A mean over many tokens has gradients below float16's smallest number: no sign would be left of them."""
    # A trained model of size has gradients some hundred times smaller than this one.
    times, size = 500, 300
    many = [{name: value.repeat(times, 1) for name, value in batch.items()} for batch in batches()]
    exact, rough = tiny.model("llama"), tiny.model("llama", torch.float16)
    found = []
    for base in (exact, rough):
        model = get_peft_model(base, LoraXSConfig(r=RANK, init_weights="update_svd"))
        initialize(model, many, RATE, lambda each, batch: mean_loss(each, batch) / times / size)
        found.append(own_layers(model))
    for path, layer in found[1].items():
        core, other = layer.own("default"), found[0][path].own("default")
        assert subspace_overlap(core.B.double(), other.B) > 0.9, path


@pytest.mark.parametrize("way", [("4bit", "bitsandbytes"), ("8bit", "torchao")], ids=" ".join)
def test_over_packed_weights(way: tuple[str, str], tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    backend = TokenizerBackend(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="</s>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>").save_pretrained(tmp_path)
    base = load(tmp_path, way).model
    labels = [{"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS}]
    model = get_peft_model(base, LoraXSConfig(r=RANK, init_weights="update_svd"))
    initialize(model, labels, RATE)
    weights = get_peft_model(load(tmp_path, way).model, LoraXSConfig(r=RANK))
    assert len(own_layers(model)) == 14
    for path, layer in own_layers(model).items():
        core = layer.own("default")
        assert core.is_orthonormal()
        # Signs of a million entries: their energy is eta^2 times their number, of which rank 3 holds a part.
        energy = float(core.delta().square().sum()) / (RATE**2 * layer.out_features * layer.in_features)
        assert 0.1 < energy < 1
        weight = own_layers(weights)[path]
        assert isinstance(weight.own("default").B, Tensor)
        exact = torch.linalg.svdvals(weight.dense_weight().double())[:RANK]
        assert_close(torch.linalg.vector_norm(weight.own("default").B, dim=0), exact, torch.float32, 64, 4, what=path)
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in trained(model).values())


def test_adapters_of_one_config_share_the_start_and_a_file_needs_no_data(tmp_path: Path) -> None:
    config = LoraXSConfig(r=RANK, init_weights="update_svd", task_type="CAUSAL_LM")
    model = get_peft_model(tiny.model("llama", torch.float32), config)
    model.add_adapter("twin", config)
    told = initialize(model, batches(), RATE)
    assert told["adapters"] == ["default", "twin"]
    for layer in own_layers(model).values():
        assert_same(layer.own("twin").B, layer.own("default").B, "B")
        assert layer.own("twin").B.data_ptr() != layer.own("default").B.data_ptr()
    expected = no_grad_logits(model.eval(), tiny.ids(2, 5))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(tiny.model("llama", torch.float32), tmp_path, is_trainable=True)
    assert_same(no_grad_logits(loaded.eval(), tiny.ids(2, 5)), expected, "logits")
    assert trained(loaded)
    with pytest.raises(MethodError, match="no adapter of this model waits"):
        initialize(loaded, batches(), RATE)


def test_ranks_by_the_spectrum_of_the_step(tmp_path: Path) -> None:
    model = started(tiny.model("llama", torch.float32), r="auto", rank_budget=4, task_type="CAUSAL_LM")
    config, layers = model.peft_config["default"], own_layers(model)
    steps = real_steps(OPTIMIZERS["adamw_torch"])
    ranks = {path: layer.own("default").rank for path, layer in layers.items()}
    assert config.ranks == ranks
    assert sum(rank**2 for rank in ranks.values()) <= 14 * 4**2
    assert len(set(ranks.values())) > 1

    def captured(chosen: dict[str, int]) -> float:
        return sum(float(best(steps[path], rank).square().sum()) for path, rank in chosen.items())

    assert captured(ranks) > captured(dict.fromkeys(ranks, 4))
    expected = no_grad_logits(model.eval(), tiny.ids(2, 5))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.model("llama", torch.float32), tmp_path).eval()
    assert {path: layer.own("default").rank for path, layer in own_layers(loaded).items()} == ranks
    assert_same(no_grad_logits(loaded, tiny.ids(2, 5)), expected, "logits after loading")


def test_a_file_decides_the_rank(tmp_path: Path) -> None:
    """Also where the config beside it names another, as it stood before the ranks were allotted."""
    model = started(tiny.model("llama", torch.float32), r=5, task_type="CAUSAL_LM")
    expected = no_grad_logits(model.eval(), tiny.ids(2, 5))
    state = {name: value for name, value in model.state_dict().items() if "loraxs_core" in name}
    twin = get_peft_model(tiny.model("llama", torch.float32), LoraXSConfig(r=2, init_weights="update_svd"))
    twin.load_state_dict(state, strict=False)
    assert_same(no_grad_logits(twin.eval(), tiny.ids(2, 5)), expected, "logits")
    assert all(value.requires_grad for value in trained(twin).values())


# The sketch


def test_a_sketch_of_a_gradient_of_low_rank_is_exact() -> None:
    """Six tokens with a loss behind them give gradients of rank six at most, and the sketch holds seven."""
    few = [{name: value[:1, :7] for name, value in batch.items()} for batch in batches()[:1]]
    found = []
    for sketch in (None, 7):
        config = LoraXSConfig(r=RANK, init_weights="update_svd", sketch=sketch)
        model = get_peft_model(tiny.model("llama"), config)
        told = initialize(model, few, RATE, mean_loss, optimizer="sgd")
        found.append((deltas(model), told))
    (exact, _), (sketched, told) = found
    for path, delta in sketched.items():
        assert_close(delta, exact[path], EXACT, 2**20, 16, what=path)
    # Of queries, outputs, gates and downs; keys, values and ups are smaller than their sketch would be.
    assert (told["passes"], told["sketched"], told["layers"]) == (1, 6, 14)
    assert told["overlap"] > 1 - 1e-9
    assert told["gradient_overlap"] > 1 - 1e-9


def test_what_a_sketch_loses_is_told() -> None:
    """The agreement it tells of is that of the start it gives with the exact start, in the layer it names."""
    exact, model = started(), started(sketch=4)
    told = model.told
    one, two = (own_layers(each)[told["overlap_module"]].own("default") for each in (exact, model))
    overlap = (subspace_overlap(one.B, two.B) + subspace_overlap(one.A.t(), two.A.t())) / 2
    assert abs(told["overlap"] - overlap) < 1e-9
    assert 0.1 < overlap < 0.999
    assert told["passes"] == 1
    wider = started(sketch=7).told
    assert wider["overlap_module"] == told["overlap_module"]
    assert wider["gradient_overlap"] > told["gradient_overlap"]


def test_a_gradient_no_larger_than_its_sketch_is_kept_itself() -> None:
    exact, model = deltas(started()), started(sketch=24)
    assert model.told["sketched"] == 0
    assert "overlap" not in model.told
    assert_same_state(deltas(model), exact, "start")
