"""Runs with several tasks: what they leave, what goes on from it, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from leantune.core.errors import ConfigError, DataError, LeantuneError, RunError
from leantune.data import read_rows
from leantune.evaluate import evaluate
from leantune.train import Run, RunConfig, dry_run, fit, resume
from leantune.train.plot import draw_loss
from leantune.train.record import read_metrics
from leantune.train.setup import prepare
from train.multi_task_fixture import causal_tasks, head_tasks, settings
from train.resume_fixture import Killed, act_at, interrupt, kill, metrics_of, state_of

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(params=["decoder", "encoder"])
def given(request: pytest.FixtureRequest, llama_folder: Path, bert_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of three tasks: language modelling, or heads."""
    if request.param == "decoder":
        return settings(llama_folder, "llama", causal_tasks(tmp_path), tmp_path / "run")
    return settings(bert_folder, "bert", head_tasks(tmp_path), tmp_path / "run")


@pytest.fixture
def decoder(llama_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of three language tasks."""
    return settings(llama_folder, "llama", causal_tasks(tmp_path), tmp_path / "run")


@pytest.fixture
def encoder(bert_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of two classifications and a regression."""
    return settings(bert_folder, "bert", head_tasks(tmp_path), tmp_path / "run")


def run(values: dict[str, Any], **options: Any) -> Run:
    return fit(RunConfig(**values), progress=False, **options)


def test_it_leaves_an_adapter_and_the_figures_of_each_task(given: dict[str, Any]) -> None:
    done = run({**given, "max_steps": 12})
    folder, names = done.folder, list(given["tasks"])
    assert sorted(path.name for path in (folder / "adapter").iterdir() if path.is_dir()) == sorted(names)
    listed = json.loads((folder / "adapter" / "tasks.json").read_text())["tasks"]
    record = json.loads((folder / "run.json").read_text())
    lines = read_metrics(folder / "metrics.jsonl")
    for name in names:
        facts = record["tasks"][name]
        assert listed[name]["kind"] == facts["kind"]
        assert facts["data"]["rows"] == len((Path(given["tasks"][name]["data"])).read_text().splitlines())
        assert facts["steps"] == sum(f"loss/{name}" in line for line in lines) > 0
        assert facts["evaluation"]["loss"] == lines[-1][f"eval_loss/{name}"]
        assert (folder / "adapter" / name / "README.md").is_file()
    assert record["data"]["rows"] == sum(record["tasks"][name]["data"]["rows"] for name in names)
    assert record["task_parameters"]["total"] < record["task_parameters"]["separate"]
    # The padding that is told before the first step is that of the rows as they came.
    assert record["batching"]["padding_share"]["tasks"] == pytest.approx(record["padding_share"], abs=0.05)
    factors = sum(task["trainable_parameters"] for task in record["tasks"].values())
    assert record["trainable_parameters"] == factors


def test_the_metrics_are_those_of_the_kind(encoder: dict[str, Any]) -> None:
    record = run(encoder).summary["tasks"]
    assert record["pair"]["evaluation"].keys() == {"loss", "accuracy", "f1", "mcc"}
    assert record["stars"]["evaluation"].keys() == {"loss", "mean_absolute_error", "pearson", "spearman"}


def test_a_task_of_the_run_is_a_run_of_its_own(given: dict[str, Any]) -> None:
    done = run(given)
    for name, task in given["tasks"].items():
        one = Run.open(done.folder, name)
        one.load()
        rows = read_rows(task["eval_data"])
        labels = one.summary["data"]["label_names"]
        scores = evaluate(one.model, one.tokenizer, rows, task=one.config.task, label_names=labels, resamples=0)
        found = done.summary["tasks"][name]["evaluation"]["loss"]
        metric = {"causal-lm": "loss", "classification": "cross_entropy", "regression": "mse"}[one.config.task]
        assert scores.value(metric) == pytest.approx(found, rel=1e-5)
        assert one.result == done.folder / "adapter" / name


def test_resume_is_bit_equal(given: dict[str, Any], tmp_path: Path) -> None:
    values = {**given, "gradient_accumulation": 2, "max_steps": 7, "save_steps": 2, "task_sampling": "uniform"}
    run({**values, "out": tmp_path / "whole"})
    with pytest.MonkeyPatch.context() as patch:
        act_at(5, patch, kill, micro=2)
        with pytest.raises(Killed):
            run(values)
    # What was killed is looked at as it is: each task in the last checkpoint.
    for name in given["tasks"]:
        one = Run.open(given["out"], name)
        one.load()
        assert one.result == given["out"] / "checkpoints" / "checkpoint-4" / name
    resume(given["out"], progress=False)
    assert_same_tasks(given["out"], tmp_path / "whole", list(given["tasks"]))


def assert_same_tasks(one: Path, other: Path, names: list[str]) -> None:
    """Adapters, state of the newest checkpoint and figures are the same, bit for bit."""
    for name in names:
        found, wanted = (load_file(each / "adapter" / name / "adapter_model.safetensors") for each in (one, other))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert state_of(one) == state_of(other)
    assert metrics_of(one) == metrics_of(other)
    records = [json.loads((each / "run.json").read_text())["tasks"] for each in (one, other)]
    assert records[0] == records[1]


def test_ctrl_c_keeps_every_task(decoder: dict[str, Any], tmp_path: Path) -> None:
    run({**decoder, "out": tmp_path / "whole"})
    with pytest.MonkeyPatch.context() as patch:
        act_at(2, patch, interrupt)
        stopped = run(decoder)
    assert stopped.summary["status"] == "interrupted"
    assert (stopped.folder / "adapter" / "beta" / "adapter_config.json").is_file()
    resume(decoder["out"], progress=False)
    assert_same_tasks(decoder["out"], tmp_path / "whole", list(decoder["tasks"]))


def test_a_task_added_later_trains_over_the_stored_projection(decoder: dict[str, Any], tmp_path: Path) -> None:
    first = run({**decoder, "seed": 3})
    tasks = {"delta": {**decoder["tasks"]["gamma"], "eval_data": None}}
    options = {**decoder["method_options"], "shared_from": str(first.folder)}
    later = run({**decoder, "tasks": tasks, "method_options": options, "out": tmp_path / "later", "seed": 4})
    old, new = (
        load_file(folder / "adapter" / name / "adapter_model.safetensors")
        for folder, name in ((first.folder, "alpha"), (later.folder, "delta"))
    )
    shared = [key for key in old if "shared" in key]
    assert shared
    assert all(torch.equal(old[key], new[key]) for key in shared)
    assert later.summary["trainable_parameters"] == sum(new[key].numel() for key in new if key not in shared)


def test_a_shared_projection_that_trains_goes_on_bit_for_bit(encoder: dict[str, Any], tmp_path: Path) -> None:
    options = {**encoder["method_options"], "train_shared": True}
    values = {**encoder, "method_options": options, "save_steps": 2, "schedule": "linear"}
    whole = run({**values, "out": tmp_path / "whole"})
    with pytest.MonkeyPatch.context() as patch:
        act_at(4, patch, kill)
        with pytest.raises(Killed):
            run(values)
    resume(values["out"], progress=False)
    assert_same_tasks(values["out"], tmp_path / "whole", list(values["tasks"]))
    owned = sum(task["trainable_parameters"] for task in whole.summary["tasks"].values())
    assert whole.summary["trainable_parameters"] == owned + whole.summary["task_parameters"]["shared"]
    start = run({**values, "out": tmp_path / "start", "lr": 1e-12, "max_steps": 1})
    files = [each.folder / "adapter" / "pair" / "adapter_model.safetensors" for each in (whole, start)]
    moved, fresh = (load_file(path) for path in files)
    assert all(not torch.allclose(moved[key], fresh[key]) for key in fresh if "shared" in key)


def test_what_is_shared_is_clipped_as_the_run_says_and_a_task_as_it_says(encoder: dict[str, Any]) -> None:
    options = {**encoder["method_options"], "train_shared": True}
    clips = dict(zip(encoder["tasks"], (1e-3, 1e3, 2e-3), strict=True))
    tasks = {name: {**task, "clip": clips[name]} for name, task in encoder["tasks"].items()}
    values = {**encoder, "method_options": options, "tasks": tasks, "clip": 1e-4, "batch_size": 16}
    trainer: Any = prepare(RunConfig(**values).resolved()).trainer
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, "cpu")
    trainer.optimizer = trainer.lr_scheduler = None
    with torch.no_grad():
        # The gradient of A is zero where every B is.
        [each.add_(0.1) for part in trainer.owned.values() for each in part.values()]
    trainer.compute_loss(trainer.model, batches[0], num_items_in_batch=items).backward()
    trainer._clip_grad_norm(trainer.model)

    def norm(part: dict[str, Any]) -> float:
        return float(torch.nn.utils.get_total_norm([each.grad for each in part.values()]))

    assert norm(trainer.shared) == pytest.approx(1e-4, rel=1e-2)
    assert norm(trainer.owned["pair"]) == pytest.approx(1e-3, rel=1e-2)
    assert norm(trainer.owned["triple"]) > 1e-2


@pytest.mark.parametrize("start", ["gaussian", "orthonormal", "activation_pca"])
def test_every_start_of_the_projection(encoder: dict[str, Any], start: str) -> None:
    options = {**encoder["method_options"], "shared_init": start}
    done = run({**encoder, "method_options": options, "gradient_checkpointing": True})
    assert all(task["steps"] > 0 for task in done.summary["tasks"].values())
    assert ("calibration" in done.summary) == (start == "activation_pca")


def test_dropout_of_the_base_is_off_and_that_of_the_method_is_keyed(bert_folder: Path, tmp_path: Path) -> None:
    values = settings(bert_folder, "bert", head_tasks(tmp_path), tmp_path / "one")
    values["method_options"] = {**values["method_options"], "dropout": 0.3}
    run(values)
    run({**values, "out": tmp_path / "two"})
    assert_same_tasks(tmp_path / "one", tmp_path / "two", list(values["tasks"]))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a method without tasks": ({"method": "lora", "method_options": {}}, "lora trains one task"),
    "kinds that do not mix": ({"task": "masked-lm"}, "of the kind masked-lm"),
    "rows of all": ({"eval_data": "x.jsonl"}, "tasks.NAME.eval_data"),
    "other data": ({"data": "x.jsonl"}, "drop data"),
    "packing": ({"packing": True}, "drop packing"),
    "streaming": ({"streaming": True}, "drop streaming"),
    "by length": ({"group_by_length": True}, "drop group_by_length"),
    "temperature": ({"task_temperature": 3.0}, "task_sampling: temperature"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_with_tasks_is_refused(decoder: dict[str, Any], case: str) -> None:
    changes, said = WRONG[case]
    with pytest.raises(ConfigError) as error:
        RunConfig(**{**decoder, **changes})
    assert said in str(error.value)


def test_language_tasks_beside_heads_are_refused_with_their_names(decoder: dict[str, Any], tmp_path: Path) -> None:
    tasks = {**decoder["tasks"], **head_tasks(tmp_path)}
    with pytest.raises(ConfigError) as error:
        RunConfig(**{**decoder, "tasks": tasks})
    assert "language modelling (alpha, beta, gamma) beside heads (pair, triple, stars)" in str(error.value)


@pytest.mark.parametrize("name", ["a.b", "", "_x", "default", "a/b", "é", "x" * 65])
def test_names_that_no_adapter_can_have(decoder: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as error:
        RunConfig(**{**decoder, "tasks": {name: decoder["tasks"]["alpha"]}})
    assert f"task '{name}'" in str(error.value)


@pytest.mark.parametrize("name", ["layers", "keys", "multi", "q_proj", "weight", "myscore", "classifier"])
def test_names_that_the_model_has_already(decoder: dict[str, Any], name: str) -> None:
    tasks = {"fine": decoder["tasks"]["alpha"], name: decoder["tasks"]["beta"]}
    with pytest.raises(ConfigError) as error:
        run({**decoder, "tasks": tasks})
    assert f"task '{name}'" in str(error.value)
    assert "'fine'" not in str(error.value)


def test_names_told_apart_by_case_alone(decoder: dict[str, Any]) -> None:
    tasks = {"Alpha": decoder["tasks"]["alpha"], "alpha": decoder["tasks"]["beta"]}
    with pytest.raises(ConfigError, match="upper and lower case"):
        RunConfig(**{**decoder, "tasks": tasks})


def test_a_name_that_stands_twice_in_a_recipe(decoder: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "twice.yaml"
    recipe.write_text("model: m\nout: o\nmethod: multi-lora\ntasks:\n  a: x.jsonl\n  a: y.jsonl\n")
    with pytest.raises(ConfigError, match="'a' stands twice"):
        RunConfig.from_yaml(recipe)
    # A table that takes over another one's settings may replace some.
    recipe.write_text(
        "model: m\nout: o\nmethod: multi-lora\ntasks:\n  a: &a {data: x.jsonl, lr: 0.1}\n  b: {<<: *a, lr: 0.2}\n"
    )
    assert RunConfig.from_yaml(recipe).tasks["b"].model_dump()["lr"] == 0.2


def test_a_recipe_is_read_back_as_it_was(decoder: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig(**{**decoder, "tasks": {**decoder["tasks"], "plain": decoder["tasks"]["alpha"]["data"]}})
    path = tmp_path / "recipe.yaml"
    path.write_text(config.to_yaml())
    assert RunConfig.from_yaml(path) == config
    again = RunConfig.from_yaml(path, ["task=alpha=other.jsonl", "tasks.beta.lr=0.5", "tasks.beta.schedule=linear"])
    assert again.data == Path("other.jsonl")
    assert again.tasks["alpha"].eval_data == config.tasks["alpha"].eval_data
    assert (again.tasks["beta"].lr, again.tasks["beta"].schedule) == (0.5, "linear")


def test_bad_rows_are_named_with_their_task(decoder: dict[str, Any], tmp_path: Path) -> None:
    tasks = {name: {"data": str(tmp_path / f"no-{name}.jsonl")} for name in ("one", "two")}
    with pytest.raises(DataError) as error:
        run({**decoder, "tasks": tasks})
    assert "task 'one'" in str(error.value)
    assert "task 'two'" in str(error.value)


def test_one_of_the_tasks_must_be_named(decoder: dict[str, Any]) -> None:
    done = run({**decoder, "max_steps": 1})
    with pytest.raises(RunError, match="--adapter TASK"):
        Run.open(done.folder).load()
    with pytest.raises(LeantuneError, match="alpha, beta, gamma"):
        import leantune

        leantune.load(decoder["model"], done.folder)
    with pytest.raises(RunError, match="did you mean 'alpha'"):
        Run.open(done.folder, "alpa")


def test_the_dry_run_tells_the_tasks(given: dict[str, Any]) -> None:
    found = dry_run(RunConfig(**given))
    assert list(found["tasks"]) == list(given["tasks"])
    assert found["task_parameters"]["tasks"] == 3
    assert not any("dropout" in note for note in found["data"]["source"]["notes"])
    assert found["learning_rate"]["tasks"].keys() == found["tasks"].keys()
    assert not given["out"].exists()


def test_the_base_of_several_tasks_has_no_dropout(encoder: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(encoder["model"], base)
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4, "classifier_dropout": 0.4}
    (base / "config.json").write_text(json.dumps(config))
    # Beside other rows a task's loss of the first step is what it is without them.
    steps = []
    for names in (["pair", "triple", "stars"], ["pair"]):
        tasks = {name: encoder["tasks"][name] for name in names}
        prepared = prepare(RunConfig(**{**encoder, "model": str(base), "tasks": tasks}).resolved())
        assert any("own dropout is off" in note for note in prepared.examples.source["notes"])
        trainer = prepared.trainer
        rows = [example for example in trainer.train_dataset if example["task_index"] == 0][:3]
        others = [example for example in trainer.train_dataset if example["task_index"] > 0][:3]
        trainer.model.train()
        trainer.compute_loss(trainer.model, trainer.data_collator([*rows, *others]))
        steps.append(float(trainer._losses[0]))
    assert steps[0] == pytest.approx(steps[1], rel=1e-5)


def test_the_picture_has_a_curve_for_each_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, list[int]] = {}
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, label, **style: drawn.update({label: list(x)}))
    monkeypatch.setattr(Axes, "legend", lambda axes, **style: None)
    lines = [{"step": 1, "loss": 3.0, "loss/a": 1.0, "loss/b": 2.0}, {"step": 2, "loss": 0.5, "loss/b": 0.5}]
    draw_loss(lines, tmp_path / "loss.png", "two tasks")
    assert drawn == {"a, smoothed": [1], "b, smoothed": [1, 2]}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
