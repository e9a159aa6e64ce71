"""XGBLoRA's adapter: blocks and their draws, boosters side by side, files, truncation, and the folded weight."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import leantune
import tiny
from boosting_fixture import BLOCKS, answer, boosted, layers, llama, state, tokens, wrap
from leantune import XGBLoraConfig, methods
from leantune.core.errors import AdapterError, ConfigError, MethodError
from leantune.methods._block import BlockSampler, block_of
from leantune.methods._boosting import Boosting
from leantune.testing.closeness import assert_close, assert_differs, assert_same, assert_same_state
from leantune.testing.subject import objective, trained
from packed_fixture import load, make_llama
from text_fixture import byte_tokenizer

# The loops here are plain ones, which XGBLoRA says are no rounds.
pytestmark = pytest.mark.filterwarnings("ignore:XGBLoRA trains without rounds:UserWarning")


def test_all_problems_of_a_config_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        XGBLoraConfig(
            r=0, alpha=-1.0, steps_per_round=0, shrinkage=0.0, warmup_steps=-1, block_sampling="unifrom", eval_rounds=0
        )
    text = str(caught.value)
    assert text.startswith("7 problems")
    for name in ("r", "alpha", "steps_per_round", "shrinkage", "warmup_steps", "eval_rounds"):
        assert f"XGBLoraConfig.{name}: " in text
    assert "did you mean 'uniform'?" in text


# Blocks


@pytest.mark.parametrize(
    ("path", "patterns", "block"),
    [
        ("model.layers.3.self_attn.q_proj", (), "model.layers.3"),
        ("transformer.h.11.attn.c_attn", (), "transformer.h.11"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", (), "encoder.block.0"),
        ("model.layers.2.mlp.experts.5.w1", (), "model.layers.2"),
        ("towers.1.layers.4.fc", ("layers",), "towers.1.layers.4"),
        ("0.weight", (), "0"),
        ("lm_head", (), "lm_head"),
        ("model.layers.norm", (), "model.layers.norm"),
        ("towers.1.fc", ("layers",), "towers.1.fc"),
    ],
)
def test_a_block_is_named_by_the_first_number(path: str, patterns: tuple[str, ...], block: str) -> None:
    assert block_of(path, patterns) == block


def test_the_blocks_of_two_stacks_are_apart_and_a_head_is_a_block_of_its_own() -> None:
    config = XGBLoraConfig(target_modules=["q", "wo"])
    blocks = list(Boosting(methods.get("xgblora").apply(tiny.model("t5"), config), "default").blocks)
    assert blocks == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    blocks = list(Boosting(wrap(target_modules=["q_proj", "lm_head"]), "default").blocks)
    assert blocks == [*(f"model.layers.{number}" for number in range(BLOCKS)), "lm_head"]


def test_a_round_trains_a_third_of_the_blocks_unless_told_otherwise() -> None:
    for given, size in ((None, 2), (3, 3), (0, BLOCKS), (9, BLOCKS)):
        assert Boosting(wrap(blocks_per_round=given), "default").sampler.size == size


@pytest.mark.parametrize("sampling", ["uniform", "balanced", "gradient"])
def test_a_choice_is_a_function_of_seed_and_round(sampling: str) -> None:
    norms = [1.0, 2.0, 0.5, 3.0, 1.5, 1.0, 2.5]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = [BlockSampler(sampling, 7, 3, 4).choose(number, norms) for number in range(12)]
    assert_same(torch.get_rng_state(), before, "the random state of the program")
    torch.manual_seed(2)
    again = BlockSampler(sampling, 7, 3, 4)
    backwards = {number: again.choose(number, norms) for number in reversed(range(12))}
    assert [backwards[number] for number in range(12)] == first
    assert all(len(set(chosen)) == 3 and chosen == sorted(chosen) for chosen in first)
    assert len({tuple(chosen) for chosen in first}) > 3
    assert first != [BlockSampler(sampling, 7, 3, 5).choose(number, norms) for number in range(12)]


def test_usage_under_uniform_and_balanced_sampling() -> None:
    for sampling, spread in (("balanced", 1), ("uniform", 60)):
        sampler, usage = BlockSampler(sampling, 7, 3, 0), Counter[int]()
        for number in range(700):
            usage.update(sampler.choose(number))
            if sampling == "balanced":
                assert max(usage.values()) - (min(usage.values()) if len(usage) == 7 else 0) <= 1
        # 300 each on average; the standard deviation of a uniform count is sqrt(700 * 3/7 * 4/7) = 13.
        assert len(usage) == 7
        assert max(usage.values()) - min(usage.values()) <= spread


def test_draws_by_gradient_follow_the_norms() -> None:
    sampler, usage = BlockSampler("gradient", 4, 1, 0), Counter[int]()
    for number in range(2000):
        usage.update(sampler.choose(number, [1.0, 0.0, 3.0, 4.0]))
    # The standard deviation of each share is at most sqrt(.25 / 2000) = .011.
    shares = [usage[block] / 2000 for block in range(4)]
    assert shares[1] == 0
    assert all(abs(share - wanted) < 0.05 for share, wanted in zip(shares, (0.125, 0, 0.375, 0.5), strict=True))


def test_a_step_of_the_booster_tells_the_norm_of_the_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    adapted: Any = methods.get("xgblora").apply(model, XGBLoraConfig(target_modules=["0"], r=6, alpha=9.0))
    own = adapted.base_model.boosters("default")["0"].booster("default")
    with torch.no_grad():
        own.A.copy_(nn.init.orthogonal_(torch.empty(6, 6, dtype=torch.float64)) * 0.7)
    x, target = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    (adapted(x) - target).square().sum().backward()
    exact = (2 * (model(x).detach() - target).T @ x).square().sum()
    estimate = torch.tensor(Boosting(adapted, "default")._square("0"), dtype=torch.float64)
    # A square orthogonal A leaves the norm what it is.
    assert_close(estimate, exact, torch.float64, 64, 4)


def test_without_targets_all_linear_layers_of_the_blocks_train_and_no_head() -> None:
    names = {path.rpartition(".")[2] for path in layers(wrap())}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


# Boosters side by side


def test_fresh_boosters_are_lora_starts_drawn_by_seed_path_and_round() -> None:
    torch.manual_seed(1)
    first = wrap()
    torch.manual_seed(2)
    second, other = wrap(), wrap(seed=1)
    own = {path: layer.booster("default") for path, layer in layers(first).items()}
    for path, layer in layers(second).items():
        assert_same(layer.booster("default").A, own[path].A, path)
        assert_differs(layers(other)[path].booster("default").A, own[path].A, path)
        assert own[path].A.abs().max() <= 1 / math.sqrt(layer.in_features)
    path, one = next(iter(own.items()))
    before = one.A.detach().clone()
    assert len({tuple(each.A[0, :4].tolist()) for each in own.values()}) == len(own)
    one.start(0, path, 1)
    assert_differs(one.A, before, "A of the next round")


def test_the_file_of_any_number_of_boosters_loads(tmp_path: Path) -> None:
    model = wrap()
    final = boosted(model, 6)[-1]
    ranks = {path: layer.booster("default").rank for path, layer in layers(model).items()}
    assert sorted(set(ranks.values())) == [1, 2], "layers differ in their number of boosters"
    model.save_pretrained(tmp_path / "adapter")
    saved = get_peft_model_state_dict(model)
    for lean in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter", low_cpu_mem_usage=lean)
        assert_same_state(get_peft_model_state_dict(loaded), saved)
        assert_same(answer(loaded), final, "logits")
        assert {path: layer.booster("default").rank for path, layer in layers(loaded).items()} == ranks
        assert loaded.num_boosted_rounds() == 6
    ours = leantune.load(llama(), tmp_path / "adapter")
    boosted(ours, 2)
    ours.load_adapter(str(tmp_path / "adapter"), "second")
    ours.set_adapter("second")
    assert_same(answer(ours.eval()), final, "logits of a second adapter beside a longer one")


def test_a_file_of_another_base_is_refused(tmp_path: Path) -> None:
    model = wrap()
    boosted(model, 2)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("kept_A") and len(tensors[key]))
    narrow = {**tensors, key: tensors[key][:, 1:].contiguous()}
    longer = {**tensors, key: torch.cat([tensors[key], tensors[key]])}
    for broken in (narrow, longer):
        save_file(broken, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(AdapterError, match="kept_A: shape"):
            leantune.load(llama(), tmp_path)


def test_a_reference_made_from_the_same_config_has_the_finished_boosters_too() -> None:
    model = wrap()
    final = boosted(model, 3)[-1]
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    assert_same(answer(model), final, "logits of the reference")
    boosted(model, 1, adapter="default")
    assert_same(answer(model), final, "logits of the reference after the other went on")


def test_the_lora_form_is_the_boosters_side_by_side(tmp_path: Path) -> None:
    model = wrap(llama(torch.float64))
    final = boosted(model, 6)[-1]
    for pad in (True, False):
        done = leantune.convert_to_lora(model, tmp_path / f"lora-{pad}", pad_rank=pad)
        assert (done.rank, done.max_abs_error) == (2, 0.0)
        lora = PeftModel.from_pretrained(llama(torch.float64), tmp_path / f"lora-{pad}").eval()
        assert_close(answer(lora), final, torch.float64, 64, 8, wrong=(answer(llama(torch.float64)),))
    factors = layers(model)["model.layers.3.mlp.up_proj"].lora_factors("default")
    assert [factor.shape for factor in factors] == [(20, 2), (2, 16)]


# Truncation


def test_the_first_rounds_are_the_model_as_it_was_after_them(tmp_path: Path) -> None:
    model = wrap()
    staged = boosted(model, 6)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    for rounds in (2, 5, 1, 6, 3):
        loaded.set_iteration_range((0, rounds))
        assert_same(answer(loaded), staged[rounds - 1], f"logits of the first {rounds} rounds")
    loaded.save_pretrained(tmp_path / "three")
    kept = PeftModel.from_pretrained(llama(), tmp_path / "three").eval()
    assert_same(answer(kept), staged[2], "the range is in the config")
    kept.set_iteration_range(None)
    assert_same(answer(kept), staged[5], "all rounds are in the file")

    loaded.set_iteration_range((0, 4), drop=True)
    loaded.save_pretrained(tmp_path / "four")
    short = PeftModel.from_pretrained(llama(), tmp_path / "four").eval()
    assert_same(answer(short), staged[3], "logits after the others were dropped")
    assert short.num_boosted_rounds() == 4
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("adapter", "four")]
    assert sizes[1] < sizes[0]


def test_a_range_counts_in_merging_and_export_too(tmp_path: Path) -> None:
    model = wrap(llama(torch.float64))
    staged = boosted(model, 5)
    model.set_iteration_range((0, 3))
    leantune.convert_to_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(llama(torch.float64), tmp_path / "lora").eval()
    assert_close(answer(lora), staged[2], torch.float64, 64, 8, wrong=(staged[4], staged[1]))
    model.merge_adapter()
    assert_close(answer(model), staged[2], torch.float64, 64, 8, wrong=(staged[4], staged[1]))
    with pytest.raises(MethodError, match="merged"):
        model.set_iteration_range(None)
    model.unmerge_adapter()
    model.set_iteration_range((1, 3))
    later = [layer.booster("default").used()[1] for layer in layers(model).values()]
    assert sum(len(A) for A in later) == 14, "two rounds of a block of seven layers"


def test_rounds_that_are_not_there_are_refused() -> None:
    model = wrap()
    with pytest.raises(MethodError, match="has no round yet"):
        model.set_iteration_range((0, 1))
    boosted(model, 3)
    before = state(model)
    for wrong in ((0, 4), (2, 2), (-1, 2)):
        with pytest.raises(MethodError, match=r"rounds 0 to 2"):
            model.set_iteration_range(wrong)
    assert_same_state(state(model), before, "the model after a refusal")


# Folding


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_folded_weight_is_the_merged_one_and_the_base_stays(family: str) -> None:
    base = llama(torch.bfloat16)
    if family == "gpt2":
        config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=BLOCKS, n_head=4, n_positions=32, vocab_size=32)
        base = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = wrap(base)
    layer = list(layers(model).values())[-1]
    own = layer.booster("default")
    with torch.no_grad():
        own.B.normal_(generator=torch.Generator().manual_seed(0))
    own.keep(0, 1.0)
    own.resting = False
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    beside = layer(x)
    layer.fold("default")
    folded = layer(x)
    weight = layer.dense_weight().detach().clone()
    assert_same(weight, layer.dense_weight(), "the base weight")
    layer.merge()
    assert_same(own.working, layer.dense_weight(), "the working weight")
    layer.unmerge()
    exact = x.double() @ (weight.double() + layer.lora_factors("default")[0].double() @ own.kept_A.double()).T
    if layer.base_layer.bias is not None:
        exact = exact + layer.base_layer.bias.double()
    for got in (beside, folded):
        assert_close(got, exact, torch.bfloat16, 1, 8, wrong=(layer.base_layer(x),))
    with model.disable_adapter():
        assert_same(layer(x), layer.base_layer(x), "the layer with the adapter off")
    assert_same_state(dict(model.unload().state_dict()), before, "the base")


def test_small_updates_survive_a_16_bit_base() -> None:
    """Each booster is below half a unit in the last place of every weight; sixteen of them are eight units."""
    model: Any = nn.Sequential(nn.Linear(8, 4, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    adapted = methods.get("xgblora").apply(model, XGBLoraConfig(target_modules=["0"], alpha=1.0))
    layer = adapted.base_model.boosters("default")["0"]
    own, stepwise = layer.booster("default"), torch.ones(4, 8, dtype=torch.bfloat16)
    for number in range(16):
        own.train_in(number)
        with torch.no_grad():
            own.A.fill_(1.0)
            own.B.fill_(2.0**-9)
        own.keep(number, 1.0)
        layer.fold("default")
        stepwise = (stepwise.float() + 2.0**-9).to(torch.bfloat16)
    assert_same(stepwise, torch.ones_like(stepwise), "a weight that each booster was merged into by itself")
    assert_same(own.working, torch.full_like(stepwise, 1 + 2.0**-5), "the working weight")


def test_a_folded_layer_multiplies_once_whatever_the_rounds() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts: dict[bool, list[int]] = {}
    for fold in (False, True):
        model = wrap()
        for _ in range(3):
            boosted(model, BLOCKS)
            for layer in layers(model).values():
                layer.booster("default").rest()
                if fold:
                    layer.fold("default")
            with FlopCounterMode(display=False) as counter:
                answer(model)
            counts.setdefault(fold, []).append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        answer(llama())
    assert counts[True] == [counter.get_total_flops()] * 3
    assert counts[False] == sorted(set(counts[False]))


def test_other_adapters_and_mixed_batches_see_the_boosters_of_a_folded_layer() -> None:
    model = wrap(llama(torch.float64))
    alone = boosted(model, 3)[-1]
    model.add_adapter("other", XGBLoraConfig(task_type="CAUSAL_LM", seed=9))
    for layer in layers(model).values():
        layer.fold("default")
    mixed = model.eval()(input_ids=tokens(3), adapter_names=["default", "other", "default"]).logits
    for row in (0, 2):
        assert_close(mixed[row], alone[row], torch.float64, 64, 8, wrong=(answer(llama(torch.float64))[row],))
    model.base_model.set_adapter(["default", "other"])
    assert_close(answer(model), alone, torch.float64, 64, 8, wrong=(answer(llama(torch.float64)),))


def test_a_quantised_base_is_not_folded_and_trains(tmp_path: Path) -> None:
    make_llama(num_hidden_layers=BLOCKS).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    base = load(tmp_path, ("4bit", "bitsandbytes")).model
    plain = answer(base)
    model = wrap(base, fold=True)
    final = boosted(model, 2)[-1]
    assert_differs(final, plain, "logits with boosters")
    for layer in layers(model).values():
        layer.fold("default")
        assert layer.booster("default").working is None
    assert_same(answer(model), final, "logits after nothing was folded")
    objective(model.train()(input_ids=tokens(3)).logits).backward()
    assert all(parameter.grad is not None for parameter in trained(model).values())
    assert_same(answer(model.unload()), plain, "logits of the base")


# What trains


def test_a_resting_booster_stays_frozen_whoever_sets_what_trains() -> None:
    model = wrap()
    chosen = [path for path in layers(model) if ".layers.2." in path]
    for path, layer in layers(model).items():
        own = layer.booster("default")
        own.train_in(0) if path in chosen else own.rest()
    wanted = set(trained(model))
    assert len(wanted) == 2 * len(chosen)
    with model.disable_adapter():
        assert not trained(model)
    assert set(trained(model)) == wanted
    model.set_adapter("default")
    assert set(trained(model)) == wanted
    model.base_model.set_requires_grad("default", True)
    assert set(trained(model)) == wanted
