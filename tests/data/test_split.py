"""Rows held out by a hash of what they ask: stable, without duplicates on both sides, about the share asked for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leantune.core.errors import DataError
from leantune.data import Row
from leantune.data.split import is_held_out, split_rows


def row(prompt: str, completion: str = "b", number: int = 1) -> Row:
    return Row(where=f"f:{number}", prompt=prompt, completion=completion)


ROWS = [row(f"question {number}", number=number) for number in range(400)]


def test_the_share_is_about_what_was_asked_for() -> None:
    train, evaluation = split_rows(ROWS, 0.2)
    assert len(train) + len(evaluation) == 400
    # Binomial: 80 expected, standard deviation 8; five of them.
    assert abs(len(evaluation) - 80) < 40
    assert [item.where for item in train + evaluation] != [item.where for item in ROWS]
    assert sorted(train + evaluation, key=ROWS.index) == ROWS


def test_a_larger_share_takes_the_same_rows_and_more() -> None:
    few, many = split_rows(ROWS, 0.1)[1], split_rows(ROWS, 0.3)[1]
    assert set(map(id, few)) < set(map(id, many))


@settings(max_examples=50, deadline=None)
@given(
    prompts=st.lists(st.text(max_size=6), min_size=1, max_size=20),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
)
def test_order_neighbours_and_answers_move_no_row(prompts: list[str], share: float, seed: int) -> None:
    before = {prompt: is_held_out(row(prompt), share) for prompt in prompts}
    later = [row(prompt, completion, seed) for prompt in prompts for completion in ("c", "d")]
    random.Random(seed).shuffle(later)
    assert all(is_held_out(item, share) == before[item.prompt or ""] for item in later)


def test_questions_of_every_kind_decide() -> None:
    def sides(rows: list[Row]) -> set[bool]:
        return {is_held_out(item, 0.5) for item in rows}

    def talk(question: str, answer: str) -> Row:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Row(where="f:1", messages=turns)

    assert sides([Row(where="f:1", text=f"text {n}") for n in range(30)]) == {True, False}
    assert sides([Row(where="f:1", text="a", text_pair=f"pair {n}", label=1) for n in range(30)]) == {True, False}
    assert sides([talk(f"q{n}", "a") for n in range(30)]) == {True, False}
    assert len(sides([talk("q", f"a{n}") for n in range(30)])) == 1


def test_a_side_without_rows_is_refused() -> None:
    with pytest.raises(DataError, match=r"f\.jsonl: eval_share 0\.01 takes 0 of 3 rows; .*; change eval_share"):
        split_rows(ROWS[:3], 0.01, "f.jsonl")
    with pytest.raises(DataError, match=r"takes 1 of 1 rows"):
        split_rows([next(item for item in ROWS if is_held_out(item, 0.5))], 0.5)


def test_an_image_is_held_out_wherever_its_folder_is_named_from() -> None:
    def asked(image: str) -> str:
        return Row(where="a row", image=image, label="red").asked()

    assert asked("pictures/red/01.png") == asked("/data/pictures/red/01.png")
    assert len({asked(name) for name in ("red/01.png", "red/02.png", "blue/01.png")}) == 3
    # Base 64 has slashes too.
    assert asked("data:image/png;base64,iVBO/aa/bb") != asked("data:image/png;base64,iVBX/aa/bb")
