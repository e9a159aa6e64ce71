"""The data settings of a run: columns, rows held out, the chat template; and what the record says of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from leantune.adapters import export
from leantune.core.errors import ConfigError, DataError
from leantune.data import read_rows
from leantune.data.split import is_held_out
from leantune.train import Run, RunConfig, fit
from leantune.train.rows import held_out, read_data, streamed

COMMON: dict[str, Any] = {"method": "lora", "method_options": {"r": 2}, "lr": 0.01, "batch_size": 4, "save_steps": 0}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def config_of(model: Path, data: Path, out: Path, **settings: Any) -> RunConfig:
    return RunConfig(**{"model": str(model), "data": data, "out": out / "run", **COMMON, **settings})


def test_columns_of_a_table_and_rows_held_out(llama_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    rows = read_rows(rows_file)
    table = tmp_path / "rows.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([("facts", "sentence"), *((row.prompt, row.completion) for row in rows)])
    columns = "prompt=facts,completion=sentence"
    config = config_of(llama_folder, table, tmp_path, columns=columns, eval_share=0.3, max_steps=2)
    assert config.columns == {"prompt": "facts", "completion": "sentence"}
    assert RunConfig.from_yaml(_written(tmp_path / "again.yaml", config.to_yaml())) == config
    run = fit(config, progress=False)
    summary = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    expected = [row for row in rows if is_held_out(row, 0.3)]
    assert 0 < len(expected) < len(rows)
    assert summary["eval_data"]["rows"] == len(expected)
    assert summary["eval_data"]["eval_share"] == 0.3
    assert summary["data"]["rows"] == len(rows) - len(expected)
    assert summary["data"]["source"]["columns"] == {"prompt": "facts", "completion": "sentence"}
    assert "prompt=facts" in summary["data"]["source"]["notes"][0]
    assert summary["evaluation"]["loss"] > 0
    assert [row.prompt for row in held_out(config)] == [row.prompt for row in expected]


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_stream_leaves_the_same_rows_out(
    llama_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = config_of(llama_folder, rows_file, tmp_path, eval_share=0.3)
    stream = config_of(llama_folder, rows_file, tmp_path, eval_share=0.3, streaming=True, max_steps=2)
    read, begun = read_data(plain), read_data(stream)
    assert list(streamed(stream)) == read.train
    assert begun.evaluation == read.evaluation
    assert begun.train == read.train[:1]
    with monkeypatch.context() as patch:
        patch.setattr("leantune.train.rows.read_source", lambda *_, **__: pytest.fail("all rows were held"))
        assert held_out(stream) == read.evaluation
    with pytest.raises(DataError, match=r"eval_share 1e-06 holds out no row"):
        read_data(config_of(llama_folder, rows_file, tmp_path, eval_share=1e-6, streaming=True, max_steps=2))


def test_a_stream_without_rows_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    data = _written(tmp_path / "blank.jsonl", "\n\n")
    with pytest.raises(DataError, match="no rows; at least one row"):
        read_data(config_of(tmp_path, data, tmp_path, streaming=True, max_steps=2))


def test_a_folder_gives_each_its_split(llama_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    lines = rows_file.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:30]), encoding="utf-8")
    (folder / "validation.jsonl").write_text("".join(lines[30:]), encoding="utf-8")
    rows = read_data(config_of(llama_folder, folder, tmp_path, eval_data=folder))
    assert (len(rows.train), len(rows.evaluation or [])) == (30, 10)
    assert any("left in it, validation: validation.jsonl" in note for note in rows.source["notes"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eval_share": 0.1, "eval_data": "b.jsonl"}, "eval_share: 0.1 beside eval_data b.jsonl; one set of rows"),
        ({"eval_share": 1.0}, "eval_share: 1.0; input should be less than 1"),
        ({"columns": "prompt"}, "columns: 'prompt'; columns 'prompt': 'prompt'; role=column,role=column"),
        ({"eval_steps": 5}, "set eval_data or eval_share"),
    ],
)
def test_settings_that_contradict(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig(model="m", data="a.jsonl", out="runs/x", **settings)
    assert expected in str(caught.value)


def test_evaluation_steps_may_use_the_rows_held_out() -> None:
    assert RunConfig(model="m", data="a.jsonl", out="runs/x", eval_share=0.1, eval_steps=5).eval_steps == 5


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    turns = [{"role": "user", "content": "the cat is"}, {"role": "assistant", "content": "red and big"}]
    folder = tmp_path_factory.mktemp("chat")
    (folder / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8, encoding="utf-8")
    return folder


def test_the_template_goes_into_the_run_and_comes_back(llama_folder: Path, conversations: Path, tmp_path: Path) -> None:
    template = _written(tmp_path / "chat.jinja", TEMPLATE)
    data = conversations / "rows.jsonl"
    run = fit(
        config_of(llama_folder, data, tmp_path, chat_template=template, max_steps=1, eval_data=data), progress=False
    )
    assert (run.folder / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    assert (run.result / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    # The run answers with the template it was trained with, whatever became of the file.
    template.unlink()
    opened = Run.open(run.folder)
    opened.load()
    assert opened.tokenizer.chat_template == TEMPLATE
    # Merging and exporting open the adapter so.
    assert export._open(run.result, None)[0].tokenizer.chat_template == TEMPLATE
    (run.result / "chat_template.jinja").unlink()
    opened.load()
    assert opened.tokenizer.chat_template == TEMPLATE


def test_without_a_template_conversations_are_refused_and_another_run_leaves_none(
    llama_folder: Path, conversations: Path, rows_file: Path, tmp_path: Path
) -> None:
    data = conversations / "rows.jsonl"
    with pytest.raises(DataError, match="no chat template"):
        fit(config_of(llama_folder, data, tmp_path, max_steps=1), progress=False)
    template = conversations / "chat.jinja"
    fit(config_of(llama_folder, data, tmp_path, chat_template=template, max_steps=1), progress=False)
    run = fit(config_of(llama_folder, rows_file, tmp_path, max_steps=1, overwrite=True), progress=False)
    assert not (run.folder / "chat_template.jinja").exists()


def test_a_bad_template_stops_the_run_before_the_model_is_loaded(conversations: Path, tmp_path: Path) -> None:
    broken = _written(tmp_path / "broken.jinja", "{% for m in messages %}")
    config = config_of(tmp_path / "no model", conversations / "rows.jsonl", tmp_path, chat_template=broken)
    with pytest.raises(DataError, match=r"broken\.jinja:1: no Jinja"):
        fit(config, progress=False)


def test_plain_text_is_trained_on_every_token(llama_folder: Path, tmp_path: Path) -> None:
    data = _written(tmp_path / "rows.jsonl", '{"text": "the red cat is big"}\n' * 8)
    run = fit(config_of(llama_folder, data, tmp_path, max_steps=1), progress=False)
    facts = run.summary["data"]
    # Six tokens each with loss, behind one that opens the text.
    assert (facts["loss_tokens"], facts["total_tokens"]) == (8 * 6, 8 * 7)
    from leantune.evaluate import evaluate

    rows = read_rows(data)
    scores = evaluate(run.model, run.tokenizer, rows, resamples=0)
    assert set(scores.metrics) == {"loss", "perplexity"}
    assert scores.n == 1
    assert torch.isfinite(torch.tensor(scores.metrics["loss"].value))
