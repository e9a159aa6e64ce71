"""--columns, --eval-share and --chat-template from training to evaluation, on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def run(tiny: Path, tmp_path: Path, leantune: Command) -> Path:
    """A run on a csv whose columns had to be named, some of its rows held out."""
    data = tmp_path / "rows.csv"
    lines = [f"name {n}:,Item {n} is here.,{n}" for n in range(16)]
    data.write_text("\n".join(["what,which,number", *lines]) + "\n", encoding="utf-8")
    (tmp_path / "own.jinja").write_text(TEMPLATE, encoding="utf-8")
    words = [
        "--columns",
        "instruction=what,output=which",
        "--eval-share",
        0.3,
        "--chat-template",
        tmp_path / "own.jinja",
    ]
    options = ["--max-steps", 2, "--batch-size", 4, "--save-steps", 0, "--heads", 1, "--channels", 8]
    code, _, err = leantune("train", "--model", tiny, "--data", data, "--out", tmp_path / "run", *words, *options)
    assert code == 0, err
    assert "format alpaca (instruction=what, output=which)" in err
    assert "columns without a use: number" in err
    assert "held out for evaluation (a share of 0.3 by a hash of what they ask)" in err
    return tmp_path / "run"


def test_eval_finds_the_rows_held_out_and_asks_in_the_runs_template(run: Path, leantune: Command) -> None:
    held = json.loads((run / "run.json").read_text(encoding="utf-8"))["eval_data"]
    code, out, err = leantune("eval", run, "--metrics", "loss", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["tuned"]["rows"] == held["rows"] > 0
    recorded = json.loads((run / "run.json").read_text(encoding="utf-8"))
    # The very loss that training measured at its end, on the same rows and tokens.
    assert found["tuned"]["metrics"]["loss"]["value"] == pytest.approx(recorded["evaluation"]["loss"], rel=1e-5)
    assert next(iter(recorded["evaluation"]["files"].values()))["hash"] == recorded["data"]["hash"]
    assert (run / "adapter" / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE


def test_eval_reads_other_data_as_it_is_told(run: Path, tmp_path: Path, leantune: Command) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"ask": "name 1:", "say": "Item 1."}] * 2), encoding="utf-8")
    words = ["eval", run, "--data", other, "--metrics", "loss", "--json"]
    code, _, err = leantune(*words)
    assert code == 1
    assert "has no column 'what'" in err
    code, out, err = leantune(*words, "--columns", "prompt=ask,completion=say")
    assert code == 0, err
    assert json.loads(out)["tuned"]["rows"] == 2
    code, _, err = leantune(*words, "--format", "alpca")
    assert code == 1
    assert "did you mean 'alpaca'?" in err
