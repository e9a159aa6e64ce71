"""Layouts: which columns mean what, found, said and overridden; and the rows they make."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leantune.core.errors import DataError
from leantune.data import Row, check_answers, encode, encode_classification, masked_text, prompt_text, read_rows
from leantune.data import layout as layouts
from leantune.data.column import parse_columns
from leantune.data.layout.alpaca import prompt_text as alpaca_prompt
from leantune.data.problem import Problems
from leantune.data.report import glued, roles
from leantune.data.source import Source, read_source
from text_fixture import CHATML, byte_tokenizer


def write(folder: Path, *records: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def table(folder: Path, *records: dict[str, str]) -> Path:
    path = folder / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path


def message_of(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path, **options)
    return str(caught.value)


def one(folder: Path, record: dict[str, Any], **options: Any) -> Row:
    (row,) = read_rows(write(folder, record), **options)
    return row


def said(row: Row) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in row.messages or []]


# Columns of a file, the layout they are, and the column of each role.
DETECTED: dict[str, tuple[list[str], str, dict[str, str]]] = {
    "messages": (["messages", "tools"], "messages", {"messages": "messages", "tools": "tools"}),
    "before all": (["messages", "prompt", "completion"], "messages", {"messages": "messages"}),
    "sharegpt": (["conversations", "id"], "sharegpt", {"conversations": "conversations"}),
    "sharegpt, one": (["conversation"], "sharegpt", {"conversations": "conversation"}),
    "alpaca": (
        ["instruction", "input", "output"],
        "alpaca",
        {"instruction": "instruction", "output": "output", "input": "input"},
    ),
    "dolly": (
        ["instruction", "context", "response", "category"],
        "alpaca",
        {"instruction": "instruction", "output": "response", "input": "context"},
    ),
    "prompt": (["prompt", "completion"], "prompt-completion", {"prompt": "prompt", "completion": "completion"}),
    "question": (["question", "answer"], "prompt-completion", {"prompt": "question", "completion": "answer"}),
    "input": (["input", "output"], "prompt-completion", {"prompt": "input", "completion": "output"}),
    "response": (["instruction", "response"], "prompt-completion", {"prompt": "instruction", "completion": "response"}),
    "capitals": (["Question", "Answer "], "prompt-completion", {"prompt": "Question", "completion": "Answer "}),
    "half": (["prompt", "text"], "prompt-completion", {"prompt": "prompt"}),
    "label": (["text", "label"], "classification", {"text": "text", "label": "label"}),
    "sst2": (["sentence", "label", "idx"], "classification", {"text": "sentence", "label": "label"}),
    "mrpc": (
        ["sentence1", "sentence2", "label"],
        "classification",
        {"text": "sentence1", "text_pair": "sentence2", "label": "label"},
    ),
    "mnli": (
        ["premise", "hypothesis", "label"],
        "classification",
        {"text": "premise", "text_pair": "hypothesis", "label": "label"},
    ),
    "qnli": (
        ["question", "sentence", "label"],
        "classification",
        {"text": "question", "text_pair": "sentence", "label": "label"},
    ),
    "boolq": (
        ["question", "passage", "label"],
        "classification",
        {"text": "question", "text_pair": "passage", "label": "label"},
    ),
    "stsb": (
        ["sentence1", "sentence2", "score"],
        "classification",
        {"text": "sentence1", "text_pair": "sentence2", "label": "score"},
    ),
    "text": (["text", "url"], "text", {"text": "text"}),
}


@pytest.mark.parametrize("name", DETECTED)
def test_detection(name: str) -> None:
    columns, layout, expected = DETECTED[name]
    found, found_roles = layouts.detect(columns)[0]
    assert (found.name, found_roles) == (layout, expected)
    # The order of the columns in the file decides nothing.
    assert layouts.detect(reversed(columns))[0][1] == expected


def test_columns_of_no_layout() -> None:
    for columns in ([], ["a"], ["sentence1", "label"], ["instruction"], ["question"], ["label"]):
        assert layouts.detect(columns) == []


def test_every_layout_is_documented_in_the_order_of_detection() -> None:
    names = layouts.names()
    ours = ["messages", "sharegpt", "alpaca", "prompt-completion", "classification", "text"]
    assert [name for name in names if name in ours] == ours
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    places = [page.index(f"| `{name}` |") for name in names]
    assert places == sorted(places)


def test_what_was_understood_is_said(tmp_path: Path) -> None:
    record = {"instruction": "a", "context": "b", "response": "c", "category": "d", "messages": None}
    source = Source(write(tmp_path, {**record, "text": "t"}), columns="input=context")
    (row,) = read_source(source)
    assert said(row) == [("user", "a\n\nb"), ("assistant", "c")]
    notes = "\n".join(source.notes())
    assert "format alpaca (instruction, output=response, input=context): loss on the output;" in notes
    assert "columns without a use: category, messages, text" in notes
    both = Source(write(tmp_path, {"messages": [{"role": "assistant", "content": "x"}], "text": "t"}))
    assert read_source(both)[0].messages
    assert "the columns also fit text; --format text reads them so" in both.notes()
    assert both.facts()["also_fits"] == ["text"]
    json.dumps(both.facts())


def test_columns_can_be_said(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q", "answer": "a", "prompt": "unused", "note": "n"})
    assert read_rows(path)[0].prompt == "q"
    row = read_rows(path, columns={"prompt": "note", "completion": "answer"})[0]
    assert (row.prompt, row.completion, row.extra) == ("n", "a", {"question": "q"})
    assert read_rows(path, columns="prompt=answer,completion=question")[0].completion == "q"
    # Columns that are not given are found by their names beside those that are.
    assert read_rows(path, columns="prompt=note")[0].completion == "a"
    assert read_rows(path, format="text", columns="text=note")[0].text == "n"
    labelled = read_rows(path, columns="text=question,label=answer")[0]
    assert (labelled.text, labelled.label) == ("q", "a")


def test_wrong_columns_suggest_the_near_ones(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q", "answer": "a"})
    text = message_of(path, columns="promt=question,completion=anwser")
    assert "columns 'promt=question': 'promt' is no column of a format" in text
    assert "did you mean 'prompt'?" in text
    assert (
        f"columns 'completion=anwser': {path} has no column 'anwser'; one of its columns; did you mean 'answer'?"
        in text
    )
    assert "'text' is no column of format messages" in message_of(path, format="messages", columns="text=question")
    for wrong in ("prompt", "prompt=", "=question"):
        assert "role=column,role=column; write prompt=COLUMN" in message_of(path, columns=wrong)
    assert "'prompt' twice" in message_of(path, columns="prompt=question,prompt=answer")
    assert "'question' twice" in message_of(path, columns="prompt=question,completion=question")


NAME = st.text(st.characters(categories=["Ll"], max_codepoint=127), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(names=st.lists(NAME, min_size=4, max_size=4, unique=True))
def test_columns_survive_their_text(names: list[str]) -> None:
    given_columns = {names[0]: names[1], names[2]: names[3]}
    assert parse_columns(",".join(f"{role} = {column}" for role, column in given_columns.items())) == given_columns
    assert parse_columns(given_columns) == given_columns


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(columns=st.lists(NAME, min_size=3, max_size=3, unique=True), texts=st.tuples(TEXT, TEXT))
def test_any_columns_can_be_prompt_and_completion(columns: list[str], texts: tuple[str, str], tmp_path: Path) -> None:
    asked, answer = texts[0], texts[1] + "."
    record = {columns[0]: asked, columns[1]: answer, columns[2]: "other"}
    row = one(tmp_path, record, columns={"prompt": columns[0], "completion": columns[1]})
    assert (row.prompt, row.completion) == (asked, answer)


def test_an_error_names_the_columns_as_the_file_does(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q", "answer": "a"}, {"question": "q"}, {"question": "q", "answer": 3})
    text = message_of(path)
    assert f"{path}:2: no 'answer' (it has question)" in text
    assert f"{path}:3: 'answer' is int 3" in text


def test_a_column_has_the_role_that_was_said_and_no_other(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "q", "answer": "a", "prompt": "p"}, {"answer": "a", "prompt": "p"})
    assert f"{path}:2: no 'question' (it has " in message_of(path, columns="prompt=question,completion=answer")
    alone = write(tmp_path, {"question": "q", "answer": "a"})
    assert f"{alone}:1: no 'prompt' (it has " in message_of(alone, columns="completion=question")


def test_mixed_layouts_are_named(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "assistant", "content": "a"}]}
    path = write(tmp_path, {"prompt": "a", "completion": "b"}, talk, {"prompt": "a", "completion": "b"}, {"text": "t"})
    text = message_of(path)
    assert text.count(" problems:") == 1
    assert f"{path}:2: a row of format messages, after rows of prompt-completion; one format in all rows; split" in text
    assert f"{path}:4: a row of format text, after rows of prompt-completion" in text
    # Asked for by name, the other rows lack what it needs.
    assert f"{path}:2: no 'prompt' (it has messages)" in message_of(path, format="prompt-completion")


# ShareGPT.


def test_sharegpt_speakers(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "u"},
        {"from": "function_call", "value": "{}"},
        {"from": "observation", "value": "o"},
        {"from": "GPT", "value": "a", "weight": 0},
        {"role": "user", "content": "u2"},
        {"role": "assistant", "text": "a2"},
    ]
    row = one(tmp_path, {"conversations": turns, "tools": '[{"type": "function"}]', "id": 7})
    assert said(row) == [
        ("system", "s"),
        ("user", "u"),
        ("assistant", "{}"),
        ("tool", "o"),
        ("assistant", "a"),
        ("user", "u2"),
        ("assistant", "a2"),
    ]
    assert row.messages is not None
    assert row.messages[4]["weight"] == 0
    assert row.extra == {"tools": [{"type": "function"}], "id": 7}


def test_sharegpt_system_column(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    assert said(one(tmp_path, {"conversations": turns, "system": "s"}))[0] == ("system", "s")
    assert said(one(tmp_path, {"conversations": turns, "system": ""}))[0] == ("user", "u")
    own = [{"from": "system", "value": "own"}, *turns]
    assert said(one(tmp_path, {"conversations": own, "system": "s"}))[0] == ("system", "own")


BAD_TURNS: dict[str, tuple[Any, str]] = {
    "speaker": ([{"from": "humann", "value": "u"}], "conversations[0] is from 'humann'; .*; did you mean 'human'?"),
    "no speaker": ([{"value": "u"}], "conversations[0] has no 'from'"),
    "no text": ([{"from": "gpt"}], "conversations[0] has no 'value'"),
    "text a number": ([{"from": "gpt", "value": 3}], "'conversations[0].content' is int 3"),
    "a turn a text": (["u"], "conversations[0] is str"),
    "no answer": ([{"from": "human", "value": "u"}], "no assistant turn"),
    "empty": ([], "'conversations' is empty"),
    "a text": ("u", "'conversations' is str"),
}


@pytest.mark.parametrize("name", BAD_TURNS)
def test_bad_turns(name: str, tmp_path: Path) -> None:
    turns, expected = BAD_TURNS[name]
    path = write(tmp_path, {"conversations": turns})
    text = message_of(path)
    assert text.startswith(f"{path}:1: ")
    for part in expected.split(".*"):
        assert part in text


# Alpaca.


ALPACA = {"instruction": "Translate.", "input": "chat", "output": "cat"}


def test_alpaca_goes_through_the_chat_template_where_there_is_one(tmp_path: Path) -> None:
    row = one(tmp_path, {**ALPACA, "system": "Be kind.", "history": [["q", "a"]]})
    turns = [("system", "Be kind."), ("user", "q"), ("assistant", "a"), ("user", "Translate.\n\nchat")]
    assert said(row) == [*turns, ("assistant", "cat")]
    plain = one(tmp_path, {**ALPACA, "input": ""})
    assert said(plain) == [("user", "Translate."), ("assistant", "cat")]
    tokenizer = byte_tokenizer(template=CHATML)
    (example,) = encode([plain], tokenizer, max_length=None)
    assert [text for text, loss in masked_text(example, tokenizer) if loss] == ["cat<|end|>"]
    assert prompt_text(plain, tokenizer).endswith("Translate.<|end|>\n<|start|>assistant\n")
    assert set(roles(encode([plain], tokenizer, max_length=None), [plain], tokenizer)) == {
        "user",
        "assistant",
        "template",
    }


def test_alpaca_is_the_alpaca_prompt_where_there_is_no_template(tmp_path: Path) -> None:
    row = one(tmp_path, ALPACA)
    tokenizer = byte_tokenizer()
    encoded = encode([row], tokenizer, max_length=None)
    prompt = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nTranslate.\n\n### Input:\nchat\n\n### Response:\n"
    )
    assert masked_text(encoded[0], tokenizer) == [(prompt, False), ("cat<|end|>", True)]
    assert prompt_text(row, tokenizer) == prompt
    assert set(roles(encoded, [row], tokenizer)) == {"prompt", "completion"}
    without = alpaca_prompt("Do it.", system="Be kind.")
    assert without == "Be kind.\n\n### Instruction:\nDo it.\n\n### Response:\n"
    # A template that is given counts.
    assert "<|start|>user" in prompt_text(row, tokenizer, template=CHATML)


def test_alpaca_with_earlier_turns_needs_a_template(tmp_path: Path) -> None:
    row = one(tmp_path, {**ALPACA, "history": [["q", "a"]]})
    with pytest.raises(DataError, match="no chat template"):
        encode([one(tmp_path, ALPACA), row], byte_tokenizer(), max_length=None)


def test_bad_alpaca_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        ALPACA,
        {**ALPACA, "output": ""},
        {**ALPACA, "input": 3},
        {**ALPACA, "history": [["q"]]},
        {**ALPACA, "history": "q"},
        {**ALPACA, "history": [["q", 1]]},
    )
    text = message_of(path)
    assert "5 problems" in text
    for part in (
        ":2: 'output' is empty",
        ":3: 'input' is int 3",
        ":4: history[0] is no pair",
        ":5: 'history' is str 'q'",
        ":6: 'history[0][1]' is int 1",
    ):
        assert f"{path}{part}" in text


# Prompt and completion as conversations.


def test_prompt_and_completion_of_messages(tmp_path: Path) -> None:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    asked = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    row = one(tmp_path, {"prompt": asked, "completion": [turn("assistant", "d")]})
    tokenizer = byte_tokenizer(template=CHATML)
    (example,) = encode([row], tokenizer, max_length=None)
    assert [text for text, loss in masked_text(example, tokenizer) if loss] == ["d<|end|>"]


def test_glued_borders_are_counted() -> None:
    borders = [("a", "b"), ("a ", "b"), ("a", "\nb"), ("", "b")]
    assert glued([Row(where="f:1", prompt=prompt, completion=completion) for prompt, completion in borders]) == 1


# Labels.


def test_a_table_spells_numbers_and_lists_out(tmp_path: Path) -> None:
    path = table(tmp_path, {"sentence": "a", "label": "10"}, {"sentence": "b", "label": "2"})
    rows = read_rows(path)
    assert [row.label for row in rows] == [10, 2]
    assert encode_classification(rows, byte_tokenizer(), max_length=None).label_names == ["2", "10"]
    scores = read_rows(table(tmp_path, {"sentence1": "a", "sentence2": "b", "score": "0.5"}))
    assert (scores[0].label, scores[0].text_pair) == (0.5, "b")
    assert read_rows(table(tmp_path, {"text": "a", "label": "yes"}))[0].label == "yes"
    assert "'label' is nan" in message_of(table(tmp_path, {"text": "a", "label": "nan"}))
    talk = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    row = read_rows(table(tmp_path, {"messages": talk, "references": '["b"]'}))[0]
    assert (said(row), row.references) == ([("user", "q"), ("assistant", "a")], ["b"])
    assert "'messages' is no JSON list" in message_of(table(tmp_path, {"messages": "q"}))


def test_plain_text_carries_loss_on_every_token(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, {"text": "one two", "url": "x"}))
    tokenizer = byte_tokenizer(opening=True)
    encoded = encode(rows, tokenizer, max_length=None)
    assert masked_text(encoded[0], tokenizer) == [("<|begin|>", False), ("one two<|end|>", True)]
    assert roles(encoded, rows, tokenizer)["text"]["loss_tokens"] == encoded.loss_tokens
    assert rows[0].answers() == ["one two"]


def test_rows_of_another_task(tmp_path: Path) -> None:
    labelled = read_rows(write(tmp_path, {"text": "a", "label": 1}))
    with pytest.raises(DataError, match=r"a text with a label; .*; name the task, or --format text to learn the text"):
        check_answers(labelled)
    plain = read_rows(write(tmp_path, {"text": "a"}))
    with pytest.raises(DataError, match="a row of another layout than the first"):
        check_answers([*plain, Row(where="f:2", prompt="a", completion="b")])
    with pytest.raises(DataError, match="no label; rows with 'text' and 'label'"):
        encode_classification(plain, byte_tokenizer(), max_length=None, label_names=["a", "b"])


def test_a_reader_of_a_layout_of_ones_own_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_LAYOUTS", dict(layouts._LAYOUTS))
    layouts.register(
        layouts.Layout(
            name="riddle",
            rank=5,
            columns="'riddle'",
            find=lambda columns: layouts.pick(columns, {"riddle": "riddle"}),
            parse=lambda record, problems: Row(where=record.where, prompt=record.columns["riddle"], completion="?"),
            roles=("riddle",),
            needed=("riddle",),
        )
    )
    assert one(tmp_path, {"riddle": "What?", "text": "t"}).prompt == "What?"
    problems = Problems("f")
    assert layouts.get("riddle", "f").guess(["Riddle"]) == {"riddle": "Riddle"}
    assert problems.count == 0
