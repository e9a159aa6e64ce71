"""The run configuration: YAML and back, overrides, and every mistake named at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from leantune.core.errors import ConfigError
from leantune.data import layout
from leantune.train import RunConfig
from leantune.train.config import apply_overrides

BASE: dict[str, Any] = {"model": "m", "data": "rows.jsonl", "out": "runs/x", "method": "lora"}


def write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_yaml_and_back(tmp_path: Path) -> None:
    config = RunConfig(
        **BASE,
        method_options={"r": 4, "target_modules": ["q_proj", "o_proj"], "lora_dropout": 0.1, "rank_pattern": {"a": 3}},
        eval_data="other.parquet",
        eval_steps=5,
        lr=1e-05,
        revision="1e5",
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert RunConfig.from_yaml(path) == config
    assert RunConfig.from_yaml(path).lr == 1e-05


def test_yaml_explains_every_field() -> None:
    lines = RunConfig(**BASE).to_yaml().splitlines()
    for name, field in RunConfig.model_fields.items():
        place = next(number for number, line in enumerate(lines) if line.startswith(f"{name}:"))
        assert field.description, name
        assert lines[place - 1].startswith("#"), name
        assert str(field.description).split()[-1] in lines[place - 1], name


def test_every_format_is_named() -> None:
    text = str(RunConfig.model_fields["format"].description)
    assert [name for name in layout.names() if name not in text] == []


def test_numbers_may_be_text_as_yaml_reads_1e_3(tmp_path: Path) -> None:
    # PyYAML takes 1e-3 for text: YAML 1.1 wants 1.0e-3.
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: m\ndata: d\nout: o\nmethod: lora\nlr: 1e-3\nmethod_options:\n  lora_dropout: 1e-1\n  r: '16'\n",
        encoding="utf-8",
    )
    config = RunConfig.from_yaml(path)
    assert config.lr == 1e-3
    assert config.method_options == {"lora_dropout": 0.1, "r": 16}


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", {**BASE, "lr": 1.0, "eval_data": "e", "method_options": {"r": 2}})
    overrides = ["lr=2e-4", "r=8", "method_options.lora_alpha=32", "eval_data=null", "gradient_checkpointing=true"]
    config = RunConfig.from_yaml(path, overrides)
    assert config.lr == 2e-4
    assert config.method_options == {"r": 8, "lora_alpha": 32}
    assert config.eval_data is None
    assert config.gradient_checkpointing is True


def test_a_setting_with_the_name_of_an_option_is_the_runs(tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", {**BASE, "method": "s2ft"})
    config = RunConfig.from_yaml(path, ["seed=3", "method_options.seed=4", "ratio=0.05", "method=s2ft"])
    assert config.seed == 3
    assert config.method_options == {"seed": 4, "ratio": 0.05}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("o_proj,down_proj", ["o_proj", "down_proj"]),
        ("o_proj , layers.0.down_proj", ["o_proj", "layers.0.down_proj"]),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("o_proj", ["o_proj"]),
        ("all-linear", "all-linear"),
        (r".*layers\.[0-3]\..*(q|v)_proj", r".*layers\.[0-3]\..*(q|v)_proj"),
    ],
)
def test_target_modules_as_people_type_them(text: str, wanted: Any) -> None:
    values = apply_overrides(BASE, [f"target_modules={text}"])
    assert RunConfig(**values).method_options == {"target_modules": wanted}


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(
            model="m",
            method="lora",
            epohs=3,
            lr=-1,
            schedule="cosin",
            batch_size="many",
            method_options={"rr": 3, "r": "eight", "peft_type": "LORA"},
        )
    text = str(caught.value)
    for line in (
        "9 problems:",
        "data: missing",
        "out: missing",
        "epohs: unknown setting; did you mean 'epochs'?",
        "lr: -1; input should be greater than 0",
        "schedule: 'cosin'",
        "batch_size: 'many'",
        "method_options.rr: no option of lora; did you mean 'r'?",
        "method_options.r: 'eight'",
        "method_options.peft_type: no option of lora",
    ):
        assert line in text
    assert all(len(line.split("; ")) >= 3 for line in text.splitlines()[1:]), text


def test_an_unknown_method_is_named_with_its_neighbour() -> None:
    with pytest.raises(ConfigError, match="did you mean 's2ft'"):
        RunConfig(**{**BASE, "method": "s2tf"})


def test_options_that_contradict_each_other_are_found_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="one way to set the budget"):
        RunConfig(**{**BASE, "method": "s2ft", "method_options": {"ratio": 0.1, "channels": 4}})
    with pytest.raises(ConfigError, match="options that fit together"):
        RunConfig(**{**BASE, "method_options": {"layers_pattern": ["h"]}})


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="eval_steps: 5 without eval_data"):
        RunConfig(**BASE, eval_steps=5)


def test_bad_overrides_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(BASE, ["lr", "rank=3", "lr=3"])
    assert "setting 'lr': no '='" in str(caught.value)
    assert "setting 'rank': unknown" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("- a\n- b\n", "not a table"), ("a: [1\n", "readable YAML"), ("3: x\n", "not a table"), ("", "not a table")],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=problem):
        RunConfig.from_yaml(path)
    with pytest.raises(ConfigError, match="not there"):
        RunConfig.from_yaml(tmp_path / "absent.yaml")


def test_the_learning_rate_is_the_methods_own_unless_given() -> None:
    config = RunConfig(**BASE)
    assert config.lr is None
    assert config.learning_rate == config.chosen_method.default_learning_rate
    assert RunConfig(**BASE, lr=0.5).learning_rate == 0.5


def test_a_word_of_another_tool_is_understood(tmp_path: Path) -> None:
    assert RunConfig(**BASE, eval_set="held.jsonl").eval_data == Path("held.jsonl")
    assert apply_overrides(BASE, ["eval_set=held.jsonl"])["eval_data"] == "held.jsonl"
    (tmp_path / "recipe.yaml").write_text("model: m\ndata: d\nout: o\neval_set: held.jsonl\n", encoding="utf-8")
    recipe = RunConfig.from_yaml(tmp_path / "recipe.yaml")
    assert recipe.eval_data == Path("held.jsonl")
    assert "eval_data: held.jsonl" in recipe.to_yaml()
