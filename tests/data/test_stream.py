"""Streams: every row once a pass, in an order of the seed, with few rows held at a time."""

from __future__ import annotations

import json
import random
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from leantune.core.errors import DataError
from leantune.data import Encoded, Row, RowStream, iter_rows
from leantune.data.streaming import ENCODED_AT_ONCE, PACKS_AT_ONCE, shuffled


def encode(rows: list[Row]) -> Encoded:
    """One token a letter of the prompt."""
    examples = [{"input_ids": [ord(c) for c in row.prompt or ""], "row": n} for n, row in enumerate(rows)]
    return Encoded([{**each, "labels": each["input_ids"]} for each in examples])


def make_rows(count: int) -> Iterator[Row]:
    for number in range(count):
        yield Row(f"rows:{number + 1}", prompt="x" * (number % 9 + 1), completion="y")


@pytest.mark.parametrize("buffer", [1, 5, 1000])
def test_each_row_once_a_pass(buffer: int) -> None:
    stream = RowStream(partial(make_rows, 50), encode, shuffle_buffer=buffer, seed=3)
    read = list(islice(stream, 100))
    first, second = ([example["row"] for example in half] for half in (read[:50], read[50:]))
    assert sorted(first) == sorted(second) == list(range(50))
    assert (first == list(range(50))) is (buffer == 1)
    assert (first == second) is (buffer == 1)
    for example in read:
        assert len(example["input_ids"]) == example["row"] % 9 + 1, "the number is that of the row in its file"


def test_the_order_is_of_the_seed_and_comes_again() -> None:
    def order(seed: int) -> list[int]:
        stream = RowStream(partial(make_rows, 50), encode, shuffle_buffer=10, seed=seed)
        first = [example["row"] for example in islice(stream, 70)]
        assert [example["row"] for example in islice(stream, 70)] == first
        return first

    assert order(1) != order(2)


def test_a_row_goes_at_most_as_far_forward_as_the_buffer_holds() -> None:
    drawn = [number for number, _ in shuffled(((n, Row("")) for n in range(200)), 20, random.Random(0))]
    assert sorted(drawn) == list(range(200))
    assert all(number <= place + 20 for place, number in enumerate(drawn))
    assert max(number - place for place, number in enumerate(drawn)) > 10, "the buffer was used"


def test_few_rows_are_alive_at_a_time() -> None:
    alive: set[int] = set()
    most: list[int] = []

    def watched() -> Iterator[Row]:
        for number in range(5000):
            row = Row(f"rows:{number + 1}", prompt="x", completion="y")
            alive.add(number)
            weakref.finalize(row, alive.discard, number)
            most.append(len(alive))
            yield row

    stream = RowStream(watched, encode, shuffle_buffer=64, seed=0)
    for _ in islice(stream, 4000):
        pass
    assert len(most) > 4000
    assert max(most) <= 64 + 2 * ENCODED_AT_ONCE, "the buffer, and those on their way to the tokenizer"
    assert max(most) >= 64


def test_few_examples_wait_for_a_pack() -> None:
    taken = [0]

    def counted(rows: list[Row]) -> Encoded:
        taken[0] += len(rows)
        return encode(rows)

    stream = RowStream(partial(make_rows, 5000), counted, shuffle_buffer=8, seed=0, pack_length=20)
    given = 0
    for pack in islice(stream, 600):
        given += len(pack["documents"])
        # Every row has a token at least, and five on average.
        assert taken[0] - given <= (PACKS_AT_ONCE + 1) * 20 / 3 + ENCODED_AT_ONCE


def test_packs_of_a_stream_hold_each_row_once_and_are_full() -> None:
    stream = RowStream(partial(make_rows, 400), encode, shuffle_buffer=50, seed=1, pack_length=32)
    packs = list(islice(stream, 45))
    lengths = [sum(len(row["input_ids"]) for row in pack["documents"]) for pack in packs]
    assert max(lengths) <= 32
    assert sum(lengths) / (32 * len(lengths)) > 0.97
    rows = [row["row"] for pack in packs for row in pack["documents"]]
    assert len(rows) < 400
    assert len(set(rows)) == len(rows)
    again = list(islice(stream, 45))
    assert again == packs


def test_counts() -> None:
    stream = RowStream(partial(make_rows, 40), encode, shuffle_buffer=4)
    iterator = iter(stream)
    list(islice(iterator, 50))
    assert stream.passes == 1
    assert 50 <= stream.rows_read <= 50 + ENCODED_AT_ONCE


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_bad_row_comes_after_the_good_ones_before_it(tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "b"}
    path = write(tmp_path / "rows.jsonl", [good, good, {"prompt": "a"}, good])
    rows = iter_rows(path)
    assert [row.where for row in islice(rows, 2)] == [f"{path}:1", f"{path}:2"]
    with pytest.raises(DataError, match=r"rows\.jsonl:3: .*completion"):
        next(rows)


def test_a_torn_last_line_and_an_empty_file_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"prompt": "a", "comp')
    stream = RowStream(partial(iter_rows, path), encode, shuffle_buffer=10)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the last line breaks off"):
        list(islice(stream, 5))
    nothing = RowStream(partial(make_rows, 0), encode, shuffle_buffer=10, source="f.jsonl")
    with pytest.raises(DataError, match=r"f\.jsonl: no rows"):
        next(iter(nothing))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_other_file_types(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": "x" * (n % 4 + 1), "completion": "b"} for n in range(30)]
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        path.write_text("prompt,completion\n" + "".join(f"{row['prompt']},b\n" for row in rows), encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    stream = RowStream(partial(iter_rows, path), encode, shuffle_buffer=6)
    assert sorted(example["row"] for example in islice(stream, 30)) == list(range(30))
