"""`leantune train`: its flags are the fields of the run's config and of the chosen method's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, Field

from leantune.cli import train as command_file
from leantune.cli.option import options_of, run_options, type_name
from leantune.methods import get
from leantune.train.config import RunConfig

Command = Callable[..., tuple[int, str, str]]


class Small(BaseModel):
    """A config with a field of each kind."""

    name: str = Field(description="Its name")
    rate: float | None = Field(None, description="Its rate")
    kind: Literal["a", "b"] = Field("a", description="Its kind")
    loud: bool = Field(False, description="Whether it is loud")


def test_run_options_are_the_fields_with_their_text() -> None:
    options = {option.name: option for option in run_options(Small, without=["rate"])}
    assert list(options) == ["name", "kind", "loud"]
    assert options["name"].help == "Its name"
    assert options["kind"].type_name == "a|b"
    assert options["loud"].is_switch
    assert options["name"].flag == "--name"


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (int | None, "int"),
        (str, "text"),
        (Path, "path"),
        (list[str] | str | None, "name,name"),
        (list[int] | int | None, "int,int|int"),
        (dict[str, Any] | None, "yaml"),
        (bool | Literal["x"], "bool|x"),
    ],
)
def test_types_read_as_words(annotation: Any, name: str) -> None:
    assert type_name(annotation) == name


def test_method_options_leave_out_pefts_bookkeeping() -> None:
    names = {option.name for option in options_of(get("lora").config)}
    assert {"r", "lora_alpha", "target_modules"} <= names
    assert not {"peft_type", "task_type", "inference_mode", "base_model_name_or_path"} & names


def test_every_field_of_a_run_is_a_flag_with_its_text(leantune: Command) -> None:
    code, out, _ = leantune("train", "--help")
    assert code == 0
    text = " ".join(out.split())
    for name, field in RunConfig.model_fields.items():
        if name != "method_options":
            assert name.replace("_", "-") in text
            assert " ".join(str(field.description).split()) in text


def test_help_of_a_method_lists_its_options(leantune: Command) -> None:
    _, plain, _ = leantune("train", "--help")
    _, out, _ = leantune("train", "--method", "s2ft", "--help")
    assert "Method s2ft" not in plain
    assert "Method s2ft" in out
    own = [field.name for field in dataclasses.fields(get("s2ft").config) if field.name in ("ratio", "channels")]
    assert all(f"--{name} " in out for name in own)
    assert len(own) == 2


@pytest.mark.parametrize(
    ("words", "method"),
    [
        (["--method", "lora"], "lora"),
        (["--method=lora"], "lora"),
        (["--set", "method=lora"], "lora"),
        (["--set=method=lora"], "lora"),
        (["--lr", "1"], None),
        (["--method"], None),
    ],
)
def test_the_method_is_found_before_the_flags_are_known(words: list[str], method: str | None) -> None:
    assert command_file._method_named(words) == method


def test_the_method_of_a_recipe_is_found(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: lora\n")
    assert command_file._method_named([str(recipe)]) == "lora"
    assert command_file._method_named([str(recipe), "--method", "full"]) == "full"
    recipe.write_text("method: [unfinished\n")
    assert command_file._method_named([str(recipe)]) is None


@pytest.mark.parametrize("flag", ["--resume", "--resume-anyway"])
def test_the_method_of_a_run_to_go_on_with_is_found(flag: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("method: lora\n")
    assert command_file._method_named([flag, str(tmp_path)]) == "lora"
    assert command_file._method_named([str(tmp_path)]) is None


def test_flags_win_over_settings_and_these_over_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\ndata: d\nout: o\nlr: 1.0\nbatch_size: 2\nseed: 1\nmethod_options: {channels: 3}\n")
    given = {"lr": "3.0", "overwrite": True, "heads": "2", "seed": None}
    config = command_file.configuration(recipe, ["lr=2.0", "batch_size=4"], given)
    assert (config.lr, config.batch_size, config.seed, config.overwrite) == (3.0, 4, 1, True)
    assert config.method_options == {"channels": 3, "heads": 2}


def test_flags_alone_make_a_run() -> None:
    config = command_file.configuration(None, [], {"model": "m", "data": "d", "out": "o", "ratio": "0.05"})
    assert config.model == "m"
    assert config.method_options == {"ratio": 0.05}


def test_all_mistakes_are_told_at_once(leantune: Command) -> None:
    code, out, err = leantune("train", "--model", "m", "--lr", "fast", "--ratio", "much")
    assert (code, out) == (1, "")
    for where in ("data: missing", "out: missing", "lr: 'fast'", "ratio: 'much'"):
        assert where in err
    assert "Traceback" not in err


def test_an_option_of_no_method_is_a_usage_error_that_suggests(leantune: Command) -> None:
    code, _, err = leantune("train", "--chanels", "3")
    assert code == 2
    assert "--channels" in err


def test_an_unknown_method_suggests(leantune: Command) -> None:
    code, _, err = leantune("train", "--method", "s2tf")
    assert code == 1
    assert "did you mean 's2ft'?" in err


def test_a_missing_data_file_is_one_line(tiny: Path, tmp_path: Path, leantune: Command) -> None:
    code, _, err = leantune("train", "--model", tiny, "--data", tmp_path / "none.jsonl", "--out", tmp_path / "run")
    assert code == 1
    assert "none.jsonl" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_run_leaves_its_folder_and_says_what_next(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"adapter", "config.yaml", "metrics.jsonl", "run.json"} <= names
    written = yaml.safe_load((trained / "config.yaml").read_text(encoding="utf-8"))
    assert written["method_options"] == {"heads": 1, "channels": 8}


@pytest.mark.parametrize(
    ("settings", "said", "unsaid"),
    [
        ({"eval_share": 0.1}, ["generate run --prompt", "eval run\n", "export run --format lora"], ["--data", "merge"]),
        ({}, ["eval run --data FILE"], []),
        ({"task": "classification"}, ["eval run --data FILE", "merge run --out DIR"], ["generate", "export"]),
        ({"task": "masked-lm", "eval_data": "rows.jsonl"}, ["eval run\n", "export run"], ["generate"]),
    ],
)
def test_what_comes_next_is_what_such_a_run_can_do(
    settings: dict[str, Any], said: list[str], unsaid: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig(model="smollm2-135m", data="rows.jsonl", out="run", **settings)
    command_file._say_what_next(Path("run"), config, is_complete=True)
    shown = capsys.readouterr().out
    assert all(text in shown for text in said)
    assert not any(text in shown for text in unsaid)
