"""The baselines from the command line to what a user does with their result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from leantune import adapters, methods
from leantune.cli import main
from leantune.core.errors import AdapterError, MethodError
from leantune.data import text_ids
from leantune.evaluate import generate
from leantune.methods.galore import GaLoreConfig
from leantune.train import LeanTrainer, Run, RunConfig, fit
from leantune.train.record import read_metrics
from train.conftest import make_llama

pytestmark = pytest.mark.usefixtures("quick")

TARGETS = {"target_modules": ["q_proj", "down_proj"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"r": 2, **TARGETS},
    "dora": {"r": 2, **TARGETS},
    "pissa": {"r": 2, **TARGETS},
    "lora-ga": {"r": 2, **TARGETS},
    "vera": {"r": 4, **TARGETS},
    "prefix": {"num_virtual_tokens": 3},
    "lisa": {"active_blocks": 1, "period": 2},
    "galore": {"rank": 4, "update_proj_gap": 3},
}


@pytest.fixture
def settings(llama_folder: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(llama_folder),
        "data": rows_file,
        "out": tmp_path / "run",
        "batch_size": 4,
        "max_steps": 5,
        "save_steps": 0,
        "device": "cpu",
    }


def answers(model: Any) -> Tensor:
    ids = torch.tensor([[3, 6, 9, 17, 12], [4, 7, 10, 17, 12]])
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits


@pytest.mark.parametrize("name", OPTIONS)
def test_from_training_to_what_is_done_with_it(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    method = methods.get(name)
    run = fit(RunConfig(**settings, method=name, method_options=OPTIONS[name]), progress=False)
    trained = answers(run.model)
    base, loaded = Run.open(settings["out"]).load()
    torch.testing.assert_close(answers(loaded), trained, rtol=0, atol=0)
    plain = answers(make_llama())
    assert (trained - plain).abs().max() > 1e-3
    losses = [line["loss"] for line in read_metrics(run.folder / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 5
    assert all(line["grad_norm"] > 0 for line in read_metrics(run.folder / "metrics.jsonl") if "grad_norm" in line)
    record = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    assert record["method"]["name"] == name
    if not method.is_adapter:
        return
    if method.mergeable:
        adapters.merge(loaded, tmp_path / "merged", tokenizer=base.tokenizer, verify=False)
        from transformers import AutoModelForCausalLM

        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(answers(merged), trained, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(AdapterError, match=method.cannot_merge):
            adapters.merge(loaded, tmp_path / "merged", verify=False)
    if method.lora_form:
        # From the folder alone, without the weights of the base.
        adapters.convert_to_lora(run.folder, tmp_path / "lora")
        lora = adapters.load(make_llama(), tmp_path / "lora", verify_base=False).eval()
        torch.testing.assert_close(answers(lora), trained, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(AdapterError, match=method.cannot_merge or "variant"):
            adapters.convert_to_lora(run.folder, tmp_path / "lora")


@pytest.mark.parametrize("name", ["pissa", "lora-ga"])
def test_the_file_of_a_start_away_from_zero_is_plain_lora(name: str, settings: dict[str, Any]) -> None:
    run = fit(RunConfig(**settings, method=name, method_options=OPTIONS[name]), progress=False)
    config = json.loads((run.result / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["init_lora_weights"], config["r"], config["lora_ga_config"]) == (True, 4, None)
    tensors = load_file(run.result / "adapter_model.safetensors")
    assert {name.rpartition(".lora_")[2] for name in tensors} == {"A.weight", "B.weight"}
    assert ("calibration" in run.summary) == (name == "lora-ga")


def test_prefix_says_what_it_does_not_go_with(settings: dict[str, Any]) -> None:
    own = {**settings, "method": "prefix", "method_options": OPTIONS["prefix"]}
    for setting, why in (("gradient_checkpointing", "takes no cache"), ("packing", "not before each row")):
        with pytest.raises(MethodError, match=why):
            fit(RunConfig(**{**own, setting: True}), progress=False)


def cli(*words: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", ["lora-ga", "lisa", "galore"])
def test_a_dry_run_trains_nothing(name: str, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = settings["out"].with_suffix(".yaml")
    recipe.write_text(RunConfig(**settings, method=name, method_options=OPTIONS[name]).to_yaml(), encoding="utf-8")
    assert cli("train", recipe, "--dry-run") == 0
    assert not settings["out"].exists()
    assert name in capsys.readouterr().out


def test_the_table_counts_what_each_one_trains(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("methods", "--json") == 0
    counts = {each["name"]: each["trainable_parameters_4096x4096"] for each in json.loads(capsys.readouterr().out)}
    wanted = {"lora": 8 * 8192, "rslora": 8 * 8192, "pissa": 8 * 8192, "lora-ga": 8 * 8192, "dora": 8 * 8192 + 4096}
    wanted |= {"vera": 256 + 4096, "prefix": 10 * 4096, "lisa": 4096**2, "galore": 4096**2}
    assert {name: counts[name] for name in wanted} == wanted


# GaLore in a run: it steps after all passes of a step, with clipped gradients


def galore_step(settings: dict[str, Any], folder: Path, **options: Any) -> tuple[dict[str, Tensor], list[float]]:
    config = RunConfig(
        **{**settings, "out": folder, "method": "galore", "method_options": {"rank": 4, "update_proj_gap": 1}},
        dtype="float64",
        limit=8,
        schedule="constant",
        warmup_ratio=0.0,
        lr=1e-2,
        **options,
    )
    run = fit(config, progress=False)
    norms = [line["grad_norm"] for line in read_metrics(folder / "metrics.jsonl") if "grad_norm" in line]
    return {name: value.detach().clone() for name, value in run.model.state_dict().items()}, norms


def test_galore_steps_once_a_step_and_is_clipped(settings: dict[str, Any], tmp_path: Path) -> None:
    one = {**settings, "max_steps": 1, "batch_size": 8}
    whole, norms = galore_step(one, tmp_path / "whole")
    parts, part_norms = galore_step({**one, "batch_size": 2}, tmp_path / "parts", gradient_accumulation=4)
    assert part_norms == pytest.approx(norms, rel=1e-9)
    assert norms[0] > 0
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-9, msg=name)
    # Adam's step hardly knows the size of a gradient; its epsilon does.
    clipped, norms = galore_step(one, tmp_path / "clipped", clip=1e-9)
    assert norms == pytest.approx(part_norms, rel=1e-9), "the norm before it is cut"
    plain = make_llama().double().state_dict()
    moved, cut = (max((own[name] - plain[name]).abs().max() for name in plain) for own in (whole, clipped))
    assert cut < 0.5 * moved


def test_galore_remembers_less(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, int] = {}
    genuine = LeanTrainer.create_optimizer

    def kept(trainer: LeanTrainer, *arguments: Any) -> Any:
        held["optimizer"] = genuine(trainer, *arguments)
        return held["optimizer"]

    monkeypatch.setattr(LeanTrainer, "create_optimizer", kept)
    sizes = {}
    for name in ("full", "galore"):
        options = {} if name == "full" else {"rank": 2}
        fit(
            RunConfig(**{**settings, "out": settings["out"] / name}, method=name, method_options=options),
            progress=False,
        )
        state: Any = held["optimizer"]
        tensors = [each for own in state.state.values() for each in own.values() if each.dim()]
        sizes[name] = sum(each.numel() for each in tensors)
    model = make_llama()
    saved = 0
    for path, each in model.named_parameters():
        if ".layers." in path and each.dim() == 2:
            rows, columns = sorted(each.shape, reverse=True)
            saved += 2 * rows * columns - (2 * rows * 2 + 2 * columns)
    assert sizes["full"] - sizes["galore"] == saved > 0
    assert GaLoreConfig().rank == 128


def test_evaluating_a_prefix_sees_the_prefix(settings: dict[str, Any], rows_file: Path) -> None:
    own = {**settings, "method": "prefix", "method_options": OPTIONS["prefix"], "max_steps": 12, "lr": 0.05}
    run = fit(RunConfig(**own, eval_data=rows_file), progress=False)
    assert run.summary["evaluation"]["loss"] < run.summary["first_loss"]


@pytest.mark.parametrize("name", ["prefix", "vera", "pissa"])
def test_answers_are_those_of_the_forward_pass(name: str, settings: dict[str, Any]) -> None:
    own = {**settings, "method": name, "method_options": OPTIONS[name], "max_steps": 12, "lr": 0.05}
    run = fit(RunConfig(**own), progress=False)
    prompts = ["Facts : red one cat Answer :", "the big dog is", "good"]
    texts = generate(run.model, run.tokenizer, prompts, max_new_tokens=20)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = text_ids(prompt, run.tokenizer)
        new: list[int] = []
        while len(new) < 20 and run.tokenizer.eos_token_id not in new:
            with torch.no_grad():
                logits = run.model(input_ids=torch.tensor([ids + new])).logits
            new.append(int(logits[0, -1].argmax()))
        kept = [token for token in new if token != run.tokenizer.eos_token_id]
        assert text.split() == run.tokenizer.decode(kept, skip_special_tokens=True).split()
