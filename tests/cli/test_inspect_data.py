"""`leantune inspect data`: how columns are read, the mask in colour, who says what, what would be held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., tuple[int, str, str]]
MARKED = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}</s>{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def write(folder: Path, *records: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def talk(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns], "id": 1}


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    return write(
        tmp_path,
        talk(("system", "be kind"), ("human", "hello"), ("gpt", "good day")),
        talk(("human", "hello"), ("gpt", "hi"), ("human", "again"), ("gpt", "hi")),
    )


def facts_of(leantune: Command, *words: object) -> dict[str, Any]:
    code, out, err = leantune("inspect", "data", *words, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_conversation_is_shown_and_counted(chat: Path, tiny: Path, leantune: Command) -> None:
    code, out, _ = leantune("inspect", "data", chat, "--model", tiny, "--rows", 2)
    assert code == 0
    flat = " ".join(out.split())
    assert "read as format sharegpt (conversations): loss on the assistant's turns" in flat
    assert "columns without a use: id" in flat
    assert "template the tokenizer's chat template" in flat
    assert "<s>user\nhello</s>\n<s>assistant\ngood day</s>" in out
    assert "ends 2 answers in </s>" in flat
    facts = facts_of(leantune, chat, "--model", tiny)
    # One token a byte: the counts are those of the letters.
    assert facts["roles"]["system"] == {"tokens": 7, "loss_tokens": 0}
    assert facts["roles"]["user"] == {"tokens": 15, "loss_tokens": 0}
    assert facts["roles"]["assistant"] == {"tokens": 12, "loss_tokens": 12}
    assert facts["roles"]["template"]["loss_tokens"] == 3
    assert facts["ends"] == {"tokens": {"</s>": 2}, "without": 0, "end_of_text": "</s>"}
    assert (facts["format"], facts["columns"]) == ("sharegpt", {"conversations": "conversations"})
    assert facts["chat_template"] == "the tokenizer's"


def test_a_template_from_a_file_whose_marks_leave_the_end_out(
    chat: Path, tiny: Path, tmp_path: Path, leantune: Command
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(MARKED, encoding="utf-8")
    facts = facts_of(leantune, chat, "--model", tiny, "--chat-template", template)
    assert facts["chat_template"] == template.as_posix()
    assert facts["ends"] == {"tokens": {}, "without": 2, "end_of_text": "</s>"}
    _, out, _ = leantune("inspect", "data", chat, "--model", tiny, "--chat-template", template)
    assert "2 in no special token (cut, or the template's marks leave the end out)" in " ".join(out.split())
    template.write_text(MARKED.replace("{% generation %}{{ m['content'] }}", "{{ m['content'] }}{% generation %}"))
    code, _, err = leantune("inspect", "data", chat, "--model", tiny, "--chat-template", template)
    assert code == 1
    assert "no token carries loss" in err
    assert "put {% generation %} and {% endgeneration %} around what the assistant says" in err


def test_columns_and_format_are_taken_and_wrong_ones_answered(tmp_path: Path, tiny: Path, leantune: Command) -> None:
    path = write(tmp_path, *[{"asked": f"q{n}", "said": f"a{n}", "note": f"note {n}"} for n in range(8)])
    code, _, err = leantune("inspect", "data", path, "--model", tiny)
    assert code == 1
    assert "--columns prompt=COLUMN,completion=COLUMN" in err
    facts = facts_of(leantune, path, "--model", tiny, "--columns", "prompt=asked,completion=said")
    assert (facts["format"], facts["unused"], facts["glued"]) == ("prompt-completion", ["note"], 8)
    _, out, _ = leantune("inspect", "data", path, "--model", tiny, "--columns", "prompt=asked,completion=said")
    assert "8 prompts run into their completion" in " ".join(out.split())
    text = facts_of(leantune, path, "--model", tiny, "--format", "text", "--columns", "text=note")
    assert text["roles"]["text"]["tokens"] == text["total_tokens"]
    code, _, err = leantune("inspect", "data", path, "--model", tiny, "--columns", "prompt=aksed,completion=said")
    assert code == 1
    assert "did you mean 'asked'?" in err
    code, _, err = leantune("inspect", "data", path, "--model", tiny, "--format", "mesages")
    assert "did you mean 'messages'?" in err


def test_alpaca_and_what_is_held_out(tmp_path: Path, tiny: Path, leantune: Command) -> None:
    rows = [{"instruction": f"do {n}", "input": "", "output": "done"} for n in range(20)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": rows}), encoding="utf-8")
    facts = facts_of(leantune, path, "--model", tiny, "--eval-share", 0.5)
    assert facts["chat_template"] == "the tokenizer's"
    held = facts["eval_share"]
    assert held["train_rows"] + held["evaluation_rows"] == 20
    assert min(held["train_rows"], held["evaluation_rows"]) > 0
    _, out, _ = leantune("inspect", "data", path, "--model", tiny, "--eval-share", 0.5)
    assert f"eval share {held['evaluation_rows']} rows held out, {held['train_rows']} to train on" in " ".join(
        out.split()
    )


@pytest.mark.parametrize(("labels", "classes"), [(["a", "b", "a"], {"a": 2, "b": 1}), ([0.5, 1.0, 2.5], None)])
def test_labels_and_scores(labels: list[Any], classes: Any, tmp_path: Path, tiny: Path, leantune: Command) -> None:
    path = write(tmp_path, *[{"sentence1": "x", "sentence2": "y", "label": label} for label in labels])
    facts = facts_of(leantune, path, "--model", tiny)
    assert (facts["labels"], facts["roles"], facts["packing"]) == (classes, None, None)
    _, out, _ = leantune("inspect", "data", path, "--model", tiny, "--rows", 1)
    assert f"x | y\nlabel {labels[0]}" in out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_of_the_counts_is_wider_than_the_terminal(
    width: int, chat: Path, tiny: Path, leantune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    _, out, _ = leantune("inspect", "data", chat, "--model", tiny, "--rows", 0, "--max-length", 45)
    assert max(len(line) for line in out.splitlines()) <= width
    assert "rows longer than 45 tokens" in " ".join(out.split())


def test_lengths_are_whole_tokens_and_all_counted(tmp_path: Path, tiny: Path, leantune: Command) -> None:
    path = write(tmp_path, *[{"text": "x" * length} for length in (3, 3, 5, 40, 77)])
    histogram = facts_of(leantune, path, "--model", tiny)["tokens"]["histogram"]
    assert sum(histogram["counts"]) == 5
    assert all(isinstance(edge, int) for edge in histogram["edges"])
    one = facts_of(leantune, write(tmp_path, {"text": "x"}), "--model", tiny)["tokens"]["histogram"]
    assert one["counts"] == [1]
