"""Reading data files: what comes out of good ones, and what is said of bad ones."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from leantune.core.errors import DataError
from leantune.data import data_hash, read_rows
from leantune.data.problem import SHOWN

GOOD = {"prompt": "Facts: a", "completion": "A."}


def write_jsonl(folder: Path, *records: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_parquet(folder: Path, records: list[dict[str, Any]], name: str = "rows.parquet") -> Path:
    path = folder / name
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def message_of(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path, **options)
    return str(caught.value)


def test_prompt_and_completion(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, {**GOOD, "references": ["B.", "A."], "task": 3}, {"prompt": "", "completion": " x"})
    first, second = read_rows(path)
    assert (first.prompt, first.completion, first.references) == ("Facts: a", "A.", ["B.", "A."])
    assert first.answers() == ["A.", "B."]
    assert first.extra == {"task": 3}
    assert first.where == f"{path}:1"
    assert (second.prompt, second.completion, second.references, second.where) == ("", " x", [], f"{path}:2")


def test_messages(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "thanks"},
    ]
    (row,) = read_rows(write_jsonl(tmp_path, {"messages": messages, "tools": [], "references": ["3"]}))
    assert row.messages is not None
    assert row.messages[0] == {"role": "user", "content": "one two"}
    assert row.messages[1]["content"] == ""
    assert row.last_assistant() == 3
    assert row.answers() == ["three", "3"]
    assert row.extra == {"tools": []}


def test_labels(tmp_path: Path) -> None:
    rows = read_rows(
        write_jsonl(
            tmp_path,
            {"text": "a", "label": "yes"},
            {"text": "a", "text_pair": "b", "label": 2},
            {"text": "a", "text_pair": None, "label": 0.5},
            {"text": "a", "label": True},
        )
    )
    assert [row.label for row in rows] == ["yes", 2, 0.5, "true"]
    assert [row.text_pair for row in rows] == [None, "b", None, None]


def test_line_ends_marks_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    inside = json.dumps({"prompt": "line\u2028separator\x85", "completion": "A."}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + inside.encode() + b"\r\n\r\n   \n" + json.dumps(GOOD).encode())
    first, second = read_rows(path)
    assert first.prompt == "line\u2028separator\x85"
    assert second.where == f"{path}:4"


# name: bytes of the file, and what the error must say; {path} is the file.
BAD_FILES: dict[str, tuple[bytes, list[str]]] = {
    "missing column": (b'{"prompt": "a"}\n', ["{path}:1: no 'completion' (it has prompt)", "text in 'completion'"]),
    "number": (b'{"prompt": "a", "completion": 3}\n', ["{path}:1: 'completion' is int 3; text;"]),
    "null": (b'{"prompt": null, "completion": "b"}\n', ["{path}:1: 'prompt' is null; text;"]),
    "blank": (b'{"prompt": "a", "completion": " \\n"}\n', ["{path}:1: 'completion' is empty;"]),
    "references": (b'{"prompt": "a", "completion": "b", "references": "c"}\n', ["'references' is str 'c'; a list of"]),
    "one reference": (b'{"prompt": "a", "completion": "b", "references": ["c", 1]}\n', ["'references[1]' is int 1;"]),
    "half a pair": (b'{"prompt": "a", "completion": "\\ud83d"}\n', ["'completion' holds half a surrogate pair"]),
    "columns": (
        b'{"input": "a", "said": "b"}\n',
        ["{path}:1: columns 'input', 'said'", "'prompt' and 'completion'", "--columns prompt=COLUMN"],
    ),
    "not JSON": (b'{"prompt": }\n{"prompt": "a", "completion": "b"}\n', ["{path}:1: not JSON (Expecting value at col"]),
    "a list": (b'[{"prompt": "a", "completion": "b"}]\n', ["{path}:1: a list; one JSON object on each line"]),
    "a string": (b'"prompt"\n', ["{path}:1: a string;"]),
    "torn": (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp', ["{path}:2: the last line breaks off"]),
    "torn letter": (b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xc3', ["{path}:2: byte 0xc3 at column 13"]),
    "latin-1": (b'{"prompt": "caf\xe9", "completion": "b"}\n', ["{path}:1: byte 0xe9 at column 16 is not UTF-8"]),
    "UTF-16": ('{"prompt": "a", "completion": "b"}\n'.encode("utf-16"), ["is not UTF-8"]),
    "deep": (b"[" * 100_000 + b"\n", ["{path}:1: not JSON"]),
    "empty": (b"", ["{path}: an empty file (0 bytes)"]),
    "blank lines": (b"\n\n", ["{path}: no rows; at least one row"]),
    "no messages": (b'{"messages": []}\n', ["{path}:1: 'messages' is empty"]),
    "messages a text": (b'{"messages": "hi"}\n', ["{path}:1: 'messages' is str"]),
    "a message a text": (b'{"messages": ["hi"]}\n', ["{path}:1: messages[0] is str"]),
    "role": (
        b'{"messages": [{"role": "asistant", "content": "a"}]}\n',
        ["messages[0] has role 'asistant'", "did you mean 'assistant'?"],
    ),
    "no role": (b'{"messages": [{"content": "a"}]}\n', ["messages[0] has no 'role'"]),
    "no content": (b'{"messages": [{"role": "assistant"}]}\n', ["'messages[0].content' is null"]),
    "picture": (
        b'{"messages": [{"role": "assistant", "content": [{"type": "image_url"}]}]}\n',
        ["messages[0].content has a part of type 'image_url'"],
    ),
    "no answer": (b'{"messages": [{"role": "user", "content": "a"}]}\n', ["{path}:1: no assistant turn"]),
    "no label": (b'{"text": "a", "label": null}\n', ["{path}:1: 'label' is null; a class name or a number"]),
    "label not a number": (b'{"text": "a", "label": NaN}\n', ["{path}:1: 'label' is nan"]),
    "pair a number": (b'{"text": "a", "text_pair": 1, "label": 1}\n', ["{path}:1: 'text_pair' is int 1"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_say_what_is_wrong(name: str, tmp_path: Path) -> None:
    content, expected = BAD_FILES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    text = message_of(path)
    for part in expected:
        assert part.format(path=path) in text
    # Four parts: the place, what stood there, what was wanted, what to do.
    assert text.startswith(str(path))
    assert text.count("; ") >= 2


def test_all_bad_rows_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": 1, "completion": 2}\n' + json.dumps(GOOD) + "\n{]\n{}\n", encoding="utf-8")
    text = message_of(path)
    assert text.startswith(f"{path}: 5 problems:\n")
    for part in (":1: 'prompt' is int 1", ":1: 'completion' is int 2", ":3: not JSON", ":4: no 'prompt'"):
        assert f"{path}{part}" in text
    assert f"{path}:2" not in text
    assert "no column at all" in text


def test_long_lists_of_problems_are_capped_and_counted(tmp_path: Path) -> None:
    text = message_of(write_jsonl(tmp_path, *[{"prompt": "a", "completion": i} for i in range(SHOWN + 7)]))
    assert f"{SHOWN + 7} problems:" in text
    assert text.count("'completion' is int") == SHOWN
    assert text.endswith("... and 7 more")


def test_unknown_columns_are_one_problem(tmp_path: Path) -> None:
    text = message_of(write_jsonl(tmp_path, *[{"input": "a"}] * 50))
    assert "problems" not in text


def test_missing_file_suggests_a_neighbour(tmp_path: Path) -> None:
    write_jsonl(tmp_path, GOOD, name="train.jsonl")
    assert f"{tmp_path / 'tran.jsonl'}: no such file" in message_of(tmp_path / "tran.jsonl")
    assert "did you mean 'train.jsonl'?" in message_of(tmp_path / "tran.jsonl")
    assert "check the path" in message_of(tmp_path / "nowhere" / "x.jsonl")


def test_wrong_names(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, GOOD, name="rows.jsonnl")
    text = message_of(path)
    assert "suffix '.jsonnl'; a data file ending in .csv or .json or .jsonl or .ndjson or .parquet or .tab" in text
    assert "did you mean '.jsonl'?" in text
    assert "a folder without data files; files ending in .csv or" in message_of(tmp_path)
    assert "file type 'parket'; a known file type; did you mean 'parquet'?" in message_of(path, reader="parket")
    assert "format 'mesages'; a known format; did you mean 'messages'?" in message_of(
        path, reader="jsonl", format="mesages"
    )
    assert read_rows(path, reader="jsonl")[0].prompt == "Facts: a"


def test_format_can_be_overridden(tmp_path: Path) -> None:
    both = {**GOOD, "messages": [{"role": "assistant", "content": "hi"}]}
    path = write_jsonl(tmp_path, both)
    assert read_rows(path)[0].messages is not None
    assert read_rows(path, format="prompt-completion")[0].completion == "A."
    assert "no 'text'" in message_of(path, format="classification")


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, GOOD, GOOD, {"prompt": "bad"})
    assert len(read_rows(path, limit=2)) == 2
    assert f"{path}:3" in message_of(path, limit=3)


def test_parquet_rows_and_bad_rows(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s", "name": "n"}, {"role": "assistant", "content": "a"}]
    path = write_parquet(tmp_path, [{"messages": messages}])
    (row,) = read_rows(path)
    # The table spells the second message's missing name as null; a template must not see it.
    assert row.messages == messages
    assert row.where == f"{path} row 1"
    bad = write_parquet(tmp_path, [GOOD, {"prompt": "a", "completion": None}], name="bad.parquet")
    assert message_of(bad).startswith(f"{bad} row 2: 'completion' is null; text;")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, [GOOD] * 10)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path}: not readable as parquet" in message_of(path)
    renamed = write_jsonl(tmp_path, GOOD, name="really_jsonl.parquet")
    assert "not readable as parquet" in message_of(renamed)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SPOKEN = TEXT.filter(lambda text: bool(text.strip()))
RECORDS = st.lists(
    st.fixed_dictionaries({"prompt": TEXT, "completion": SPOKEN, "references": st.lists(SPOKEN, max_size=3)}),
    min_size=1,
    max_size=5,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=RECORDS, ascii_only=st.booleans())
def test_any_text_survives_both_file_types(records: list[dict[str, Any]], ascii_only: bool, tmp_path: Path) -> None:
    lines = "".join(json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records)
    plain = tmp_path / "rows.jsonl"
    plain.write_bytes(lines.encode("utf-8"))
    for path in (plain, write_parquet(tmp_path, records)):
        rows = read_rows(path)
        found = [{"prompt": r.prompt, "completion": r.completion, "references": r.references} for r in rows]
        assert found == records


def test_data_hash_is_of_the_bytes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, GOOD)
    assert data_hash(path) == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    before = data_hash(path)
    path.write_bytes(path.read_bytes() + b"\n")
    assert data_hash(path) != before


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, GOOD)
    code = f"import sys; from leantune.data import read_rows; read_rows({str(path)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
