"""Runs that pack, group or stream their rows: the same training, other batches."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leantune.core.errors import ConfigError, DataError, MethodError
from leantune.data.packing import best_fit
from leantune.methods import TrainingPlan
from leantune.testing.closeness import assert_close
from leantune.train import RunConfig, fit
from leantune.train.batching import batch_line
from leantune.train.regime import check_plan
from leantune.train.setup import prepare

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture
def config(llama_folder: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a short run."""
    return {
        "model": str(llama_folder),
        "data": rows_file,
        "out": tmp_path / "run",
        "method": "lora",
        "method_options": LORA,
        "max_steps": 4,
        "batch_size": 2,
        "max_length": 48,
        "lr": 1e-2,
        "device": "cpu",
    }


def lengths_of(config: dict[str, Any]) -> list[int]:
    return prepare(RunConfig(**{**config, "overwrite": True})).examples.train.lengths


def test_a_packed_run_and_what_it_says(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(RunConfig(**{**config, "max_steps": 12}, packing=True, eval_data=config["data"]))
    record = run.summary
    facts = record["batching"]
    assert facts["way"] == "packed"
    assert record["data"]["rows"] == 40
    tokens = record["data"]["total_tokens"]
    assert facts["packs"] == len(best_fit(lengths_of(config), 48))
    assert facts["pack_filled"] == pytest.approx(tokens / (48 * facts["packs"]))
    assert record["padding_share"] < 0.1
    # Rows are counted, not packs: twelve steps of two packs.
    assert record["rows_seen"] > 12 * 2 * 2
    assert record["tokens_seen"] <= 12 * 2 * 48
    assert record["last_loss"] < record["first_loss"]
    # The evaluation is of rows alone, whatever training packs.
    assert record["evaluation"]["tokens"] == record["data"]["loss_tokens"]
    line = f"packing 40 rows in {facts['packs']} sequences of 48 tokens"
    assert line in capsys.readouterr().err


def test_one_epoch_of_packs_sees_every_row_once(config: dict[str, Any]) -> None:
    record = fit(RunConfig(**{**config, "max_steps": None, "packing": True}), progress=False).summary
    assert record["rows_seen"] == 40
    assert record["tokens_seen"] == record["data"]["total_tokens"]
    assert record["loss_tokens_seen"] == record["data"]["loss_tokens"]


def gradient_of_a_step(config: dict[str, Any], **options: Any) -> Tensor:
    """The gradient of the first step over all rows, in float64."""
    settings = RunConfig(**{**config, "dtype": "float64", "batch_size": 40, "max_steps": 1, **options})
    prepared = prepare(settings)
    trainer, model = prepared.trainer, prepared.model
    # With both factors of a LoRA at their start, one of the gradients is zero.
    for name, each in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each.data, generator=torch.Generator().manual_seed(0))
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    trainer.compute_loss(model.train(), batches[0], num_items_in_batch=items).backward()
    assert trainer.meter.rows == 40
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


@pytest.mark.parametrize("logits", ["selected", "all"])
def test_a_step_of_packs_is_the_step_of_their_rows(config: dict[str, Any], logits: str, tmp_path: Path) -> None:
    alone = gradient_of_a_step(config, logits="selected")
    packed = gradient_of_a_step({**config, "out": tmp_path / "packed"}, packing=True, logits=logits)
    # transformers takes the stock loss in float32.
    dtype = torch.float64 if logits == "selected" else torch.float32
    assert_close(packed, alone, dtype, k=8, depth=400, what="gradient")


def test_a_reduction_by_row_gets_the_rows_of_a_pack(config: dict[str, Any]) -> None:
    seen: list[tuple[list[float], list[int]]] = []

    def reduce(sums: Tensor, counts: Tensor, columns: dict[str, Any]) -> Tensor:
        seen.append((sums.tolist(), columns["row"].tolist()))
        return (sums / counts).mean()

    prepared = prepare(RunConfig(**{**config, "packing": True, "batch_size": 40}))
    trainer = prepared.trainer
    trainer.plan = TrainingPlan(loss_reduction=reduce, batch_columns=("row",))
    trainer.data_collator.columns = ("row",)
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    trainer.compute_loss(prepared.model.train(), batches[0], num_items_in_batch=items)
    [(sums, rows)] = seen
    assert sorted(rows) == list(range(40))
    examples = prepared.examples.train
    for place in (0, 17, 39):
        row = examples[rows[place]]
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            scores = prepared.model(input_ids=ids).logits[0].log_softmax(-1)
        wanted = -sum(float(scores[i, t]) for i, t in enumerate(row["labels"][1:]) if t != -100)
        assert sums[place] == pytest.approx(wanted, rel=1e-4)


def test_padding_of_each_way_is_said_beforehand(config: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": "red " * (n % 7 + 1), "completion": "cat " * (n % 31 + 1)} for n in range(217)]
    data = tmp_path / "uneven.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {**config, "data": data, "batch_size": 8, "max_steps": None}
    plain = fit(RunConfig(**settings), progress=False).summary
    shares = plain["batching"]["padding_share"]
    assert shares["packed"] < shares["grouped"] < shares["plain"]
    # Another order than the run's own: the share is that of any order, about.
    assert plain["padding_share"] == pytest.approx(shares["plain"], abs=0.05)
    grouped = fit(RunConfig(**{**settings, "overwrite": True}, group_by_length=True), progress=False).summary
    assert grouped["batching"]["padding_share"] == shares
    assert grouped["padding_share"] == pytest.approx(shares["grouped"], abs=1e-12)
    assert batch_line(grouped["batching"], 40).startswith(f"batches padding {shares['grouped']:.0%} (plain ")


# Streaming


def test_a_streamed_run_learns_and_counts(config: dict[str, Any]) -> None:
    run = fit(RunConfig(**{**config, "max_steps": 24}, streaming=True, shuffle_buffer=10), progress=False)
    record = run.summary
    assert record["data"]["rows"] is None
    assert record["last_loss"] < record["first_loss"] - 0.5
    assert record["rows_seen"] == 48
    assert record["stream"]["passes"] == 1
    assert record["epochs"] is None
    assert record["stream"]["rows_read"] >= 48
    assert json.loads((config["out"] / "run.json").read_text(encoding="utf-8"))["batching"]["way"] == "streamed"


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packs"])
def test_a_resumed_stream_goes_on_at_its_row(config: dict[str, Any], packing: bool, tmp_path: Path) -> None:
    settings = {**config, "streaming": True, "shuffle_buffer": 7, "packing": packing, "gradient_accumulation": 2}
    settings |= {"max_steps": 6, "save_steps": 3, "schedule": "constant", "warmup_ratio": 0.0}
    whole = fit(RunConfig(**settings), progress=False)
    checkpoint = whole.folder / "checkpoints" / "checkpoint-3"
    prepared = prepare(RunConfig(**{**settings, "out": tmp_path / "second"}))
    prepared.trainer.train(resume_from_checkpoint=str(checkpoint))
    assert prepared.trainer.state.global_step == 6
    adapted = {name: each for name, each in prepared.model.named_parameters() if each.requires_grad}
    expected = dict(whole.model.named_parameters())
    assert adapted
    for name, each in adapted.items():
        assert torch.equal(each, expected[name]), name
    losses = [line["loss"] for line in prepared.trainer.state.log_history if "loss" in line]
    assert len(set(losses)) == 6, "rows that repeat would not tell a wrong place"


def test_two_processes_share_the_rows_of_a_stream(config: dict[str, Any]) -> None:
    from accelerate.data_loader import prepare_data_loader

    trainer = prepare(RunConfig(**config, streaming=True, shuffle_buffer=5)).trainer
    assert trainer.accelerator.dataloader_config.dispatch_batches is False

    def rows(index: int, processes: int, batches: int) -> list[list[int]]:
        loader = torch.utils.data.DataLoader(trainer.train_dataset, batch_size=2, collate_fn=list)
        shard = prepare_data_loader(
            loader, num_processes=processes, process_index=index, put_on_device=False, dispatch_batches=False
        )
        return [[row["row"] for row in batch] for batch in islice(shard, batches)]

    alone, first, second = rows(0, 1, 8), rows(0, 2, 4), rows(1, 2, 4)
    assert [batch for pair in zip(first, second, strict=True) for batch in pair] == alone


def test_a_bad_row_stops_a_stream_by_name_and_keeps_what_was_trained(config: dict[str, Any], tmp_path: Path) -> None:
    good = config["data"].read_text(encoding="utf-8").splitlines()
    torn = tmp_path / "torn.jsonl"
    torn.write_text("\n".join([*good, '{"prompt": "red", "completion": ""}', *good]) + "\n", encoding="utf-8")
    settings = {**config, "data": torn, "streaming": True, "shuffle_buffer": 1, "max_steps": 200, "save_steps": 0}
    with pytest.raises(DataError, match=r"torn.jsonl:41: 'completion' is empty.*the (\d+) steps .* kept in") as caught:
        fit(RunConfig(**settings), progress=False)
    [checkpoint] = (config["out"] / "checkpoints").glob("checkpoint-*")
    assert str(checkpoint) in str(caught.value)
    assert (checkpoint / "trainer_state.json").is_file()
    # Sixteen rows are encoded at once: the first two of these groups were good, eight steps each.
    assert 10 < int(checkpoint.name.removeprefix("checkpoint-")) <= 20


def test_a_bad_first_row_is_named_before_a_model_is_loaded(config: dict[str, Any], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": 3, "completion": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        fit(RunConfig(**{**config, "data": bad, "model": "/nowhere"}, streaming=True), progress=False)


# What does not go together


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True, "task": "classification"}, "packing: task classification"),
        ({"packing": True, "group_by_length": True}, "group_by_length: together with packing"),
        ({"streaming": True, "group_by_length": True}, "group_by_length: together with streaming"),
        ({"streaming": True, "max_steps": None}, "streaming: no max_steps"),
        ({"streaming": True, "task": "classification"}, "streaming: task classification"),
        ({"precision": "bf16", "dtype": "float64"}, "precision: bf16 over float64 weights"),
        ({"optimizer": "adamw"}, "optimizer: 'adamw'.*adamw_torch"),
        ({"optimizer": "adafator"}, "did you mean 'adafactor'"),
    ],
)
def test_settings_that_contradict_each_other(config: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(**{**config, **options})


def test_what_a_method_decides_itself(config: dict[str, Any]) -> None:
    plan = TrainingPlan(sampler=lambda dataset, seed: None, optimizer=lambda *given: None)
    settings = RunConfig(**config, packing=True, optimizer="sgd")
    with pytest.raises(MethodError, match=r"packing with lora: the method chooses.*\n.*optimizer with lora: sgd"):
        check_plan(settings, plan)
    check_plan(settings, TrainingPlan())
