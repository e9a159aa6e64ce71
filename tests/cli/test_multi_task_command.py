"""A run with several tasks, from the command line to the export of one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from leantune import cli

Command = Callable[..., tuple[int, str, str]]
SHORT = ["--method", "multi-lora", "--target-modules", "q_proj,v_proj", "--r", "2", "--device", "cpu"]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rows of two tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, word in (("goods", "item"), ("things", "thing")):
        rows = [{"prompt": f"name {number}:", "completion": f" {word} {number}"} for number in range(24)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "goods.jsonl", folder / "things.jsonl"


@pytest.fixture(scope="session")
def words(tiny: Path, files: tuple[Path, Path]) -> list[str]:
    """A command line of two tasks, all but the run folder."""
    goods, things = files
    tasks = ["--task", f"goods={goods}", "--task", f"things={things}", "--set", "tasks.things.lr=0.05"]
    return ["train", "--model", str(tiny), *SHORT, *tasks, "--max-steps", "3", "--lr", "0.01", "--eval-share", "0.3"]


@pytest.fixture(scope="session")
def run(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    with pytest.raises(SystemExit) as left:
        cli.main([*words, "--out", str(folder)])
    assert not left.value.code
    return folder


def test_training_tells_each_task(words: list[str], tmp_path: Path, leantune: Command) -> None:
    code, out, err = leantune(*words, "--out", tmp_path / "run")
    assert code == 0, err
    assert "goods   causal-lm; " in err
    assert "things  causal-lm; " in err
    assert "as separate LoRAs" in err
    assert "(goods " in err
    assert "--adapter goods" in out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["tasks"]["things"]["lr"] == 0.05


def test_the_dry_run_shows_tasks_and_their_rates(words: list[str], tmp_path: Path, leantune: Command) -> None:
    code, out, err = leantune(*words, "--out", tmp_path / "run", "--dry-run")
    assert code == 0, err
    assert "goods   causal-lm; " in out
    assert "things: 0.05, cosine" in out
    assert "a folder for each of 2 tasks" in out
    assert not (tmp_path / "run").exists()


def test_eval_scores_every_task_on_its_own_rows(run: Path, leantune: Command) -> None:
    code, out, err = leantune("eval", run, "--metrics", "loss")
    assert code == 0, err
    assert "task goods: causal-lm" in out
    assert "task things: causal-lm" in out
    record = json.loads((run / "run.json").read_text())
    assert len(record["tasks"]["things"]["evaluation"]["files"]) == 1
    code, out, err = leantune("eval", run, "--metrics", "loss", "--json", "--limit", 2)
    assert json.loads(out)["tasks"].keys() == {"goods", "things"}


def test_one_task_is_taken_by_name(run: Path, files: tuple[Path, Path], leantune: Command) -> None:
    code, out, err = leantune("eval", run, "--adapter", "things", "--data", files[0], "--metrics", "loss", "--json")
    assert code == 0, err
    assert json.loads(out)["tuned"]["rows"] == 24
    code, out, err = leantune("generate", run, "--adapter", "goods", "--prompt", "name 1:", "--max-new-tokens", 4)
    assert code == 0, err
    code, out, err = leantune("inspect", "adapter", run, "--adapter", "goods", "--json")
    assert json.loads(out)["method"] == "multi-lora"


@pytest.mark.parametrize(
    ("command", "more"),
    [
        (["generate", "--prompt", "x"], "--adapter TASK"),
        (["export", "--out", "never"], "goods, things"),
        (["eval", "--data", "x.jsonl"], "--adapter TASK"),
        (["generate", "--prompt", "x", "--adapter", "gods"], "did you mean 'goods'"),
        (["merge", "--out", "never", "--adapter", "gods"], "did you mean 'goods'"),
    ],
)
def test_the_choice_of_a_task_is_asked_for(run: Path, leantune: Command, command: list[str], more: str) -> None:
    code, _, err = leantune(command[0], run, *command[1:])
    assert code == 1
    assert more in err


def test_a_task_is_exported_and_noted(run: Path, tmp_path: Path, leantune: Command) -> None:
    code, _, err = leantune("export", run, "--adapter", "goods", "--out", tmp_path / "lora", "--prompt", "name 1:")
    assert code == 0, err
    assert (tmp_path / "lora" / "adapter_config.json").is_file()
    assert json.loads((run / "run.json").read_text())["exports"][-1]["format"] == "lora"


def test_tasks_with_heads_are_scored_and_do_not_write(tiny: Path, tmp_path: Path, leantune: Command) -> None:
    words = []
    for name, labels in (("mood", ("good", "bad", "so so")), ("sort", ("item", "thing"))):
        rows = [{"text": f"name {at}", "label": labels[at % len(labels)]} for at in range(24)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        words += ["--task", f"{name}={tmp_path / name}.jsonl"]
    words += ["--task", "classification", "--max-steps", "2", "--eval-share", "0.3", "--out", str(tmp_path / "run")]
    code, _, err = leantune("train", "--model", tiny, *SHORT, *words)
    assert code == 0, err
    assert "lowers it" not in err
    for name, classes in (("mood", 3), ("sort", 2)):
        code, out, err = leantune("eval", tmp_path / "run", "--adapter", name, "--json")
        assert code == 0, err
        found = json.loads(out)["tuned"]["metrics"]
        assert found.keys() == {"cross_entropy", "accuracy", "f1", "mcc"}
        record = json.loads((tmp_path / "run" / "run.json").read_text())["tasks"][name]
        assert len(record["data"]["label_names"]) == classes
        assert found["mcc"]["value"] == pytest.approx(record["evaluation"]["mcc"])
        for command in (["generate", "--prompt", "x"], ["chat"]):
            code, _, err = leantune(command[0], tmp_path / "run", *command[1:], "--adapter", name)
            assert code == 1
            assert err.count("\n") == 1
            assert f"--adapter {name} scores it" in err


def test_help_says_what_task_means(leantune: Command) -> None:
    _, out, _ = leantune("train", "--help")
    text = " ".join(out.split())
    assert "a value with '=' is a task of a run with several instead, by its name and file" in text
    assert "|name=file" in text


def test_a_name_given_twice(words: list[str], files: tuple[Path, Path], tmp_path: Path, leantune: Command) -> None:
    code, _, err = leantune(*words, "--task", f"goods={files[1]}", "--out", tmp_path / "run")
    assert code == 1
    assert "task 'goods': named twice" in err
