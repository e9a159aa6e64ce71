"""Every adapter method inside TRL's SFT, DPO and GRPO trainers, by `peft_config` and already wrapped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from host_model import base, frozen, values
from packed_host import pack_linears
from peft import PeftModel
from safetensors.torch import load_file
from trl_case import SAVED, STEPS, TRAINERS, dpo, from_folder, grpo

import leantune
import tiny
from leantune import methods
from leantune.testing.closeness import assert_differs, assert_same, assert_same_state
from leantune.testing.subject import (
    STEP_SIZE,
    calibration_batches,
    calibration_loss,
    no_grad_logits,
    own_layers,
    start,
    trained,
)

# 2026-11-23: TRL 1.16.0 sets transformers' old name of activation checkpointing.
# 2026-11-25: PEFT says that a second adapter was loaded, which TRL's reference adapter is.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    # 2026-11-25: no method's callbacks here, without which XGBLoRA says that it trains as a plain LoRA.
    pytest.mark.filterwarnings("ignore:XGBLoRA trains without rounds:UserWarning"),
]

ADAPTERS = [name for name in methods.names() if methods.get(name).is_adapter]
# Another method or stock PEFT under other options, with no layer of their own that a host could meet: SFT shows it.
SETTINGS = {"cola", "dora", "relora", "rslora", "vera"}
OWN = [name for name in ADAPTERS if name not in SETTINGS]


def config_of(name: str, **more: Any) -> Any:
    method = methods.get(name)
    return method.make_config(**{**method.toy_options, "task_type": "CAUSAL_LM", **more})


def wrapped(name: str, folder: Path, **more: Any) -> Any:
    """A trained adapter on the base, as after an earlier run; the same numbers at each call."""
    torch.manual_seed(7)
    return on(from_folder(folder), name, **more)


def on(base: Any, name: str, **more: Any) -> Any:
    """A trained adapter on that base."""
    config = config_of(name, **more)
    model = methods.get(name).apply(base, config)
    if methods.get(name).needs_batches(config):
        leantune.initialize(model, calibration_batches(model), step_size=STEP_SIZE, loss=calibration_loss)
    start(model)
    return model


def build(trainer: str, name: str, given: str, folder: Path, out: Path) -> Any:
    torch.manual_seed(7)
    if given == "peft_config":
        if methods.get(name).needs_batches(config_of(name)):
            pytest.skip("its start is computed before a trainer has the model")
        return TRAINERS[trainer](from_folder(folder), out, peft_config=config_of(name))
    return TRAINERS[trainer](wrapped(name, folder), out)


def logged(trainer: Any, what: str) -> list[float]:
    return [entry[what] for entry in trainer.state.log_history if what in entry]


@pytest.mark.parametrize("given", ["peft_config", "wrapped"])
@pytest.mark.parametrize(
    ("trainer", "name"), [(trainer, name) for trainer in TRAINERS for name in (ADAPTERS if trainer == "sft" else OWN)]
)
def test_a_method_trains_and_resumes(trainer: str, name: str, given: str, base_folder: Path, tmp_path: Path) -> None:
    if given == "wrapped" and trainer != "sft" and "reference_copy" in methods.get(name).gaps:
        pytest.skip(methods.get(name).gaps["reference_copy"])
    whole = build(trainer, name, given, base_folder, tmp_path / "whole")
    model = whole.model
    before = values(model)
    assert before
    assert all(value.dtype == torch.float32 for value in before.values())
    assert not [key for key in before if "base_layer" in key or "ref" in key.split(".")]
    original = base().state_dict()
    whole.train()
    losses = logged(whole, "loss")
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    after = values(model)
    assert set(after) == set(before)
    assert [key for key, value in after.items() if not torch.equal(value, before[key])]
    assert_same_state(frozen(model), original, "the base after training")
    if trainer == "grpo":
        assert all(0 <= reward <= 1 for reward in logged(whole, "reward"))

    resumed = build(trainer, name, given, base_folder, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{SAVED}"))
    assert resumed.state.global_step == STEPS
    assert_same_state(values(resumed.model), after, "trained parameters, resumed and uninterrupted")
    if "ref" in model.peft_config:
        assert_same_state(of_adapter(resumed.model, "ref"), of_adapter(model, "ref"), "the reference after resuming")


# The reference of DPO and GRPO


def of_adapter(model: Any, name: str) -> dict[str, torch.Tensor]:
    """Parameters and buffers of one adapter, buffers that no file holds included, with the name taken out."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {key.replace(f".{name}", ""): value.detach().clone() for key, value in tensors if name in key.split(".")}


def with_adapter(model: Any, name: str, ids: torch.Tensor) -> torch.Tensor:
    before = model.active_adapter
    model.set_adapter(name)
    try:
        return no_grad_logits(model.eval(), ids)
    finally:
        model.set_adapter(before)


def _in_memory(name: str, folder: Path, tmp_path: Path) -> Any:
    return wrapped(name, folder)


def _saved(name: str, folder: Path, tmp_path: Path) -> Path:
    model = wrapped(name, folder)
    model.save_pretrained(str(tmp_path / "saved"))
    return tmp_path / "saved"


def _from_pretrained(name: str, folder: Path, tmp_path: Path) -> Any:
    return PeftModel.from_pretrained(from_folder(folder), _saved(name, folder, tmp_path), is_trainable=True)


def _low_memory(name: str, folder: Path, tmp_path: Path) -> Any:
    path = _saved(name, folder, tmp_path)
    return PeftModel.from_pretrained(from_folder(folder), path, is_trainable=True, low_cpu_mem_usage=True)


def _loaded(name: str, folder: Path, tmp_path: Path) -> Any:
    return leantune.load(from_folder(folder), _saved(name, folder, tmp_path), trainable=True)


STARTS = {
    "in memory": _in_memory,
    "from_pretrained": _from_pretrained,
    "low_cpu_mem_usage": _low_memory,
    "leantune.load": _loaded,
}


@pytest.mark.parametrize("way", STARTS)
@pytest.mark.parametrize("name", [name for name in OWN if "reference_copy" not in methods.get(name).gaps])
def test_the_reference_is_a_true_copy_and_stays(name: str, way: str, base_folder: Path, tmp_path: Path) -> None:
    model = STARTS[way](name, base_folder, tmp_path)
    ids = tiny.ids()
    beginning, first = no_grad_logits(model.eval(), ids), of_adapter(model, "default")
    assert_differs(beginning, no_grad_logits(base(), ids), "logits of a trained start")
    trainer = dpo(model, tmp_path / "dpo")
    assert_same_state(of_adapter(model, "ref"), first, "the reference")
    assert_same(with_adapter(model, "ref", ids), beginning, "logits under the reference")
    trainer.train()
    # The policy is its own reference until the first step, to the bit; then it moves away.
    for what in ("rewards/chosen", "rewards/rejected"):
        rewards = logged(trainer, what)
        assert rewards[0] == 0
        assert all(reward != 0 for reward in rewards[1:])
    assert_same_state(of_adapter(model, "ref"), first, "the reference after training")
    assert_same(with_adapter(model, "ref", ids), beginning, "logits under the reference after training")
    assert_differs(no_grad_logits(model, ids), beginning, "logits after training")
    assert not [key for key in trained(model) if "ref" in key.split(".")]


@pytest.mark.parametrize("trainer", [dpo, grpo])
def test_the_reference_of_a_file_with_its_own_choice(trainer: Any, base_folder: Path, tmp_path: Path) -> None:
    """The entries in the file may be others than its config would draw today."""
    folder = _saved("s2ft", base_folder, tmp_path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "seed": settings["seed"] + 1}))
    model = PeftModel.from_pretrained(from_folder(base_folder), folder, is_trainable=True)
    stored = load_file(folder / "adapter_model.safetensors")
    first = of_adapter(model, "default")
    indices = {key: value for key, value in first.items() if key.endswith("index")}
    assert_same_state(indices, {key: stored[key] for key in indices}, "the entries of the file")
    trainer(model, tmp_path / "run")
    assert_same_state(of_adapter(model, "ref"), first, "the reference")


def test_the_reference_over_a_permuted_base(base_folder: Path, tmp_path: Path) -> None:
    model = wrapped("s2ft", base_folder, permute=True)
    beginning = no_grad_logits(model.eval(), tiny.ids())
    trainer = dpo(model, tmp_path / "dpo")
    assert_same(with_adapter(model, "ref", tiny.ids()), beginning, "logits under the reference")
    trainer.train()
    assert_same(with_adapter(model, "ref", tiny.ids()), beginning, "logits under the reference after training")


def test_a_whole_head_that_trains_is_in_the_reference_too(base_folder: Path, tmp_path: Path) -> None:
    model = wrapped("s2ft", base_folder, modules_to_save=["lm_head"])
    beginning = no_grad_logits(model.eval(), tiny.ids())
    trainer = dpo(model, tmp_path / "dpo")
    trainer.train()
    assert_same(with_adapter(model, "ref", tiny.ids()), beginning, "logits under the reference after training")
    assert_differs(no_grad_logits(model, tiny.ids()), beginning, "logits after training")


def test_grpo_measures_its_distance_from_the_start(base_folder: Path, tmp_path: Path) -> None:
    trainer = grpo(wrapped("s2ft", base_folder), tmp_path / "grpo")
    trainer.train()
    distance = logged(trainer, "kl")
    assert distance[0] == pytest.approx(0, abs=1e-9)
    assert distance[-1] > 1e-4


def test_sft_of_a_saved_adapter_opens_with_stock_peft(base_folder: Path, tmp_path: Path) -> None:
    trainer = TRAINERS["sft"](from_folder(base_folder), tmp_path / "sft", peft_config=config_of("s2ft"))
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "out"))
    loaded = PeftModel.from_pretrained(from_folder(base_folder), tmp_path / "out").eval()
    assert_same(no_grad_logits(loaded, tiny.ids()), no_grad_logits(trainer.model.eval(), tiny.ids()), "logits")


# Merging for weight syncs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OWN)
def test_a_thousand_merges_leave_the_base_as_it_was(name: str, dtype: torch.dtype) -> None:
    if not methods.get(name).mergeable:
        pytest.skip(f"{name} cannot merge: {methods.get(name).cannot_merge}")
    model = on(tiny.model("llama", dtype), name)
    if not own_layers(model):
        pytest.skip(f"{name} is stock PEFT's, which undoes a merge by subtracting: in {dtype} that is not exact")
    before, tuned = frozen(model), no_grad_logits(model, tiny.ids())
    model.merge_adapter()
    merged = frozen(model)
    changed = [key for key, value in merged.items() if not torch.equal(value, before[key])]
    assert changed
    model.unmerge_adapter()
    for _ in range(999):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_same_state(frozen(model), before, "the base after 1,000 merges")
    assert_same(no_grad_logits(model, tiny.ids()), tuned, "logits after 1,000 merges")
    model.merge_adapter()
    assert_same_state(frozen(model), merged, "the merged weights of the last round")


class _Nowhere:
    """Stands for the engine that gets the weights: here nobody is sharded."""

    is_fsdp = False

    def gather_params(self, parameters: Any) -> Any:
        from contextlib import nullcontext

        return nullcontext()


def test_what_trl_sends_to_the_engine_is_the_merged_model() -> None:
    from trl.generation.vllm_generation import VLLMGeneration

    model = methods.get("s2ft").apply(base(), config_of("s2ft"))
    start(model)
    before = frozen(model)
    sync = VLLMGeneration.__new__(VLLMGeneration)
    sync.model, sync._dist = model, _Nowhere()  # type: ignore[assignment]
    sent = {key: value.clone() for key, value in sync._iter_named_params()}
    assert_same_state(frozen(model), before, "the base after a weight sync")
    whole = model.merge_and_unload().state_dict()
    assert_same_state(sent, {key: whole[key] for key in sent}, "what the engine gets")
    assert set(sent) == {key for key, _ in base().named_parameters()}


# Casts


@pytest.mark.parametrize("trainer", TRAINERS)
def test_trained_parts_over_a_quantised_base_train_in_float32(
    trainer: str, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL turns them to bfloat16 over a quantised base, where a small step would be rounded away."""
    plain = pack_linears(from_folder(base_folder), monkeypatch)
    built = TRAINERS[trainer](plain, tmp_path / "run", peft_config=config_of("s2ft"))
    assert {value.dtype for value in trained(built.model).values()} == {torch.bfloat16}
    # Accelerate would look for a device map of bitsandbytes.
    del plain.is_loaded_in_8bit
    built.train()
    assert {value.dtype for value in trained(built.model).values()} == {torch.float32}
    states = [
        state for group in built.optimizer.param_groups for state in map(built.optimizer.state.get, group["params"])
    ]
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}
    for value in trained(built.model).values():
        assert_differs(value.detach(), value.detach().bfloat16().float(), "a trained slice, rounded to bfloat16")


@pytest.mark.parametrize("bf16", [False, True])
def test_dpo_in_bfloat16_starts_at_its_reference(bf16: bool, base_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    model = methods.get("s2ft").apply(model, config_of("s2ft"))
    start(model)
    trainer = dpo(model, tmp_path / "dpo", bf16=bf16)
    trainer.train()
    assert logged(trainer, "rewards/chosen")[0] == 0
    assert {value.dtype for value in trained(model).values()} == {torch.float32}
