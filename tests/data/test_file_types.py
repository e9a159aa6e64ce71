"""json, csv, tsv, gzip, folders and Hub data sets: what comes out of good ones, and what is said of bad ones."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from leantune.core.errors import DataError
from leantune.data import data_hash, encode_images, iter_rows, read_rows
from leantune.data.hub import HubId, parse_id
from leantune.data.image import open_image
from leantune.data.source import Source, read_source

GOOD = {"prompt": "Facts: a", "completion": "A."}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def message_of(path: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path, **options)
    return str(caught.value)


def pairs(path: Path, **options: Any) -> list[tuple[str | None, str | None]]:
    return [(row.prompt, row.completion) for row in read_rows(path, **options)]


# JSON documents.


@pytest.mark.parametrize(
    "text",
    [
        '[\n {"prompt": "a", "completion": "b"},\n\n {"prompt": "c",\n  "completion": "d"}]',
        '{"version": 1,\n "data": [{"prompt": "a", "completion": "b"},\n\n {"prompt": "c", "completion": "d"}]}',
    ],
    ids=["a list", "an object with a list"],
)
def test_json_documents(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, "rows.json", b"\xef\xbb\xbf" + text.encode())
    first, second = read_rows(path)
    assert (first.prompt, second.completion) == ("a", "d")
    assert [row.where for row in (first, second)] == [f"{path}:2 (item 1)", f"{path}:4 (item 2)"]


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.json", "".join(json.dumps(GOOD) + "\n" for _ in range(3)))
    assert [row.where for row in read_rows(path)] == [f"{path}:1", f"{path}:2", f"{path}:3"]


BAD_DOCUMENTS = {
    "no list": ('{"a": 1}', "{path}: an object with no list; a list of objects, or an object with one list"),
    "two lists": ('{"train": [], "test": []}', "{path}: an object with several lists ('train', 'test');"),
    "a string": ('"text"', "{path}: a string; a list of objects"),
    "an item": ('[{"prompt": "a", "completion": "b"},\n 3]', "{path}:2 (item 2): a number; an object with the row's"),
    "a comma": ('[{"prompt": "a", "completion": "b"}\n {"prompt": "c"}]', "{path}:2: not JSON (Expecting ',' or ']'"),
    "a column": ('[{"prompt": "a"}]', "{path}:1 (item 1): no 'completion' (it has prompt)"),
    "torn": ('[{"prompt": "a", "completion": "b"},\n{"prompt"', "{path}:2: not JSON"),
    "latin-1": ('[{"prompt": "caf\xe9"}]'.encode("latin-1"), "{path}:1: byte 0xe9 at column 17 is not UTF-8"),
    "empty list": ("[]", "{path}: no rows"),
    "deep": ("[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_bad_json_documents(name: str, tmp_path: Path) -> None:
    content, expected = BAD_DOCUMENTS[name]
    path = write(tmp_path, "rows.json", content)
    assert expected.format(path=path) in message_of(path)


# Tables.


def test_csv_with_mark_line_breaks_and_quotes(tmp_path: Path) -> None:
    text = '\ufeffprompt,completion\r\n"a\r\nb","say ""c"", twice"\r\n\r\nd,e\r\n'
    path = write(tmp_path, "rows.csv", text)
    first, second = read_rows(path)
    assert (first.prompt, first.completion) == ("a\r\nb", 'say "c", twice')
    # A record is named by the line it begins at.
    assert [first.where, second.where] == [f"{path}:2", f"{path}:5"]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_found_in_the_first_line(separator: str, tmp_path: Path) -> None:
    path = write(tmp_path, "rows.csv", f'"prompt"{separator}completion\n"x, y; z"{separator}b\n')
    assert pairs(path) == [("x, y; z", "b")]


def test_tsv(tmp_path: Path) -> None:
    assert pairs(write(tmp_path, "rows.tsv", "prompt\tcompletion\na, b; c\td\n")) == [("a, b; c", "d")]


BAD_TABLES = {
    "too few": ("prompt,completion\na,b\nc\n", ["{path}:3: 1 fields; 2, as the first line names (prompt, completion)"]),
    "too many": ("prompt,completion\na,b,c\n", ["{path}:2: 3 fields; 2, as"]),
    "open quote": (
        'prompt,completion\na,b\n"c,d\ne,f\n',
        ["{path}:3: not readable as a table (unexpected end of data)"],
    ),
    "stray quote": ('prompt,completion\n"a"b,c\nd\n', ["{path}:2: not readable as a table", "{path}:3: 1 fields"]),
    "names twice": ("prompt,prompt\na,b\n", ["{path}:1: several columns named 'prompt'"]),
    "no header": ("What is it?,A bird\n", ["{path}: no rows"]),
    "unknown columns": ("asked,said\na,b\n", ["{path}:2: columns 'asked', 'said'"]),
    "latin-1": (b"prompt,completion\ncaf\xe9,b\n", ["{path}:2: byte 0xe9 at column 4 is not UTF-8"]),
    "an empty answer": ("prompt,completion\na,\nb,\n", ["2 problems", "{path}:2: 'completion' is empty", "{path}:3:"]),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables(name: str, tmp_path: Path) -> None:
    content, expected = BAD_TABLES[name]
    path = write(tmp_path, "rows.csv", content)
    text = message_of(path)
    for part in expected:
        assert part.format(path=path) in text


def test_a_field_longer_than_the_csv_module_allows(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = "word " * 50_000
    assert pairs(write(tmp_path, "rows.csv", f"prompt,completion\n{long},b\n"))[0][0] == long
    assert csv.field_size_limit() == before


FIELD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(FIELD, FIELD.filter(lambda text: bool(text.strip()))), min_size=1, max_size=5),
    separator=st.sampled_from([",", ";", "\t"]),
    packed=st.booleans(),
)
def test_any_text_survives_a_table(rows: list[tuple[str, str]], separator: str, packed: bool, tmp_path: Path) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator).writerows([("prompt", "completion"), *rows])
    content = text.getvalue().encode()
    path = write(tmp_path, "rows.csv.gz" if packed else "rows.csv", gzip.compress(content) if packed else content)
    assert pairs(path) == rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(FIELD, FIELD.filter(lambda text: bool(text.strip()))), min_size=1, max_size=5),
    indent=st.sampled_from([None, 0, 2]),
    key=st.sampled_from([None, "data"]),
)
def test_any_text_survives_a_json_document(
    rows: list[tuple[str, str]], indent: int | None, key: str | None, tmp_path: Path
) -> None:
    items = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    path = write(tmp_path, "rows.json", json.dumps({"n": 1, key: items} if key else items, indent=indent))
    assert pairs(path) == rows
    lines = path.read_text(encoding="utf-8").split("\n")
    for row in read_rows(path):
        number = int(row.where.removeprefix(f"{path}:").split(" ")[0])
        assert "{" in lines[number - 1]


# Packed files.


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.JSONL.GZ"])
def test_gzip(name: str, tmp_path: Path) -> None:
    content = json.dumps(GOOD).encode() + b"\n"
    if ".json." in name:
        content = json.dumps([GOOD]).encode()
    assert pairs(write(tmp_path, name, gzip.compress(content))) == [("Facts: a", "A.")]


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps({**GOOD, "n": n}) + "\n" for n in range(999)).encode())
    for content in (whole[: len(whole) // 2], b"no gzip at all", whole[:-30] + bytes(22) + whole[-8:]):
        path = write(tmp_path, "rows.jsonl.gz", content)
        assert f"{path}: not readable as gzip after line" in message_of(path)


# Folders.


def jsonl(*prompts: str) -> str:
    return "".join(json.dumps({"prompt": prompt, "completion": "c"}) + "\n" for prompt in prompts)


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    write(tmp_path, "part-2.jsonl", jsonl("c"))
    write(tmp_path, "part-1.jsonl", jsonl("a", "b"))
    for name in ("README.md", ".hidden.jsonl", "dataset_info.json", "_old.csv"):
        write(tmp_path, name, "nothing")
    source = Source(tmp_path)
    assert [row.prompt for row in read_source(source)] == ["a", "b", "c"]
    assert source.notes()[0] == f"of the folder {tmp_path}: 2 files (part-1.jsonl, part-2.jsonl)"
    assert source.facts()["files"] == [path.as_posix() for path in sorted(tmp_path.glob("part*"))]


def test_splits_of_a_folder(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test"):
        write(tmp_path / "data", f"{name}.jsonl", jsonl(name))
    source = Source(tmp_path)
    assert [row.prompt for row in read_source(source)] == ["train-00000-of-00002", "train-00001-of-00002"]
    assert "left in it, validation: validation-00000-of-00001.jsonl" in source.notes()
    assert "left in it, test: test.jsonl" in source.notes()
    assert [row.prompt for row in read_rows(tmp_path, split="validation")] == ["validation-00000-of-00001"]
    (tmp_path / "data" / "validation-00000-of-00001.jsonl").unlink()
    assert [row.prompt for row in read_rows(tmp_path, split="validation")] == ["test"]
    assert data_hash(tmp_path) != data_hash(tmp_path, split="validation")


def test_folders_that_do_not_say_what_to_read(tmp_path: Path) -> None:
    assert f"{tmp_path}: an empty folder; files ending in .csv" in message_of(tmp_path)
    write(tmp_path, "test.jsonl", jsonl("a"))
    assert "a folder with test.jsonl, and no train file; train.* among its files" in message_of(tmp_path)
    write(tmp_path, "train.jsonl", jsonl("a"))
    write(tmp_path, "train.csv", "prompt,completion\na,b\n")
    assert "files of several types (csv, jsonl); one type" in message_of(tmp_path)
    (tmp_path / "train.csv").unlink()
    write(tmp_path, "train-2.jsonl", "")
    assert f"{tmp_path / 'train-2.jsonl'}: an empty file (0 bytes)" in message_of(tmp_path)


def test_a_row_of_another_file_is_named_in_it(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", jsonl("a"))
    write(tmp_path, "b.jsonl", '{"messages": []}\n{"prompt": 1, "completion": "b"}\n')
    text = message_of(tmp_path)
    assert f"{tmp_path / 'b.jsonl'}:1: a row of format messages, after rows of prompt-completion; one format" in text
    assert f"{tmp_path / 'b.jsonl'}:2: 'prompt' is int 1" in text


def test_the_hash_of_a_folder_is_of_names_and_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", jsonl("a"))
    before = data_hash(tmp_path)
    assert before != data_hash(path)
    path = path.rename(tmp_path / "b.jsonl")
    renamed = data_hash(tmp_path)
    write(tmp_path, "b.jsonl", jsonl("b"))
    assert len({before, renamed, data_hash(tmp_path)}) == 3
    write(tmp_path, "README.md", "more")
    assert data_hash(tmp_path) != renamed


# The Hub.


def test_ids() -> None:
    assert parse_id("owner/name") == HubId("owner/name")
    assert parse_id("owner/name:test[:10%]") == HubId("owner/name", None, "test[:10%]")
    assert parse_id("owner/name/sub:validation") == HubId("owner/name", "sub", "validation")
    assert parse_id("name") is None
    assert parse_id("/owner/name") is None
    assert parse_id("a/b/c/d") is None


def test_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads a local folder in the Hub's stead; the call is what goes to the Hub."""
    write(tmp_path / "set", "train.jsonl", jsonl("a", "b"))
    write(tmp_path / "set", "test.jsonl", jsonl("c"))
    real, asked = datasets.load_dataset, []

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        asked.append((path, name, options))
        return real(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    rows = read_rows("owner/name")
    assert [(row.prompt, row.where) for row in rows] == [
        ("a", "owner/name:train row 1"),
        ("b", "owner/name:train row 2"),
    ]
    assert [row.prompt for row in read_rows(Path("owner/name/sub:test"))] == ["c"]
    assert asked == [("owner/name", None, {"split": "train"}), ("owner/name", "sub", {"split": "test"})]
    assert data_hash("owner/name") == data_hash("owner/name:train") != data_hash("owner/name:test")
    assert "owner/name:none: Unknown split" in message_of("owner/name:none")


def test_images_of_the_hub_come_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, name: str | None = None, **options: Any) -> Any:
        return datasets.Dataset.from_dict(
            {"image": [picture((200, 0, 0)), picture((0, 0, 200))], "label": [0, 1]},
            features=datasets.Features(
                {"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "blue"])}
            ),
        )

    def picture(colour: tuple[int, int, int]) -> dict[str, Any]:
        file = io.BytesIO()
        Image.new("RGB", (4, 4), colour).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    encoded = encode_images(read_rows("owner/pictures"))
    assert open_image(encoded[1]["image"]).getpixel((0, 0)) == (0, 0, 200)
    # Twice the same, not where an object happens to lie in memory.
    assert data_hash("owner/pictures") == data_hash("owner/pictures")


def test_an_image_in_another_class_is_other_data(tmp_path: Path) -> None:
    for name in ("blue", "red"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4), name).save(tmp_path / name / f"{name}.png")
    before = data_hash(tmp_path)
    (tmp_path / "red" / "red.png").rename(tmp_path / "blue" / "red.png")
    assert data_hash(tmp_path) != before


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = message_of("owner/name:test")
    assert text.startswith("owner/name:test: Couldn't reach 'owner/name' on the Hub")
    assert "check the network, or download it and name the folder" in text


def test_a_path_with_a_typing_error_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "rows/train", "x")
    monkeypatch.chdir(tmp_path)
    assert "no such file; a data file; did you mean 'train'?" in message_of("rows/trian")
    assert "no such file; a data file; check the path" in message_of("nowhere/train.jsonl")


# Rows one by one.


def test_rows_come_as_they_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", jsonl("a", "b") + '{"prompt": 1}\n' + jsonl("c"))
    rows = iter_rows(path)
    assert [next(rows).prompt, next(rows).prompt] == ["a", "b"]
    with pytest.raises(DataError, match=rf"{path}:3: 'prompt' is int 1") as caught:
        next(rows)
    assert "no 'completion'" in str(caught.value)
    assert [row.prompt for row in iter_rows(path, limit=2)] == ["a", "b"]
