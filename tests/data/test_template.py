"""The loss mask under the chat templates of the model families: the assistant's turns with the token that ends each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leantune.core.errors import DataError
from leantune.data import NO_LOSS, Row, encode, masked_text, prompt_ids, prompt_text
from leantune.data.report import ends, roles
from leantune.data.template import read_template
from text_fixture import CHATML, MARKED_CHATML, byte_tokenizer

FOLDER = Path(__file__).parent / "template"
TALK = [("user", "hello"), ("assistant", "good evening"), ("user", "more, please"), ("assistant", "one\n\ntwo")]


@dataclass(frozen=True)
class Family:
    """A family of templates: its special tokens, and what it makes of :data:`TALK`."""

    tokens: list[str]
    learned: list[str]
    end: str
    system: bool = True
    eos: str | None = None
    dropped: list[str] = field(default_factory=list)


FAMILIES = {
    "chatml": Family(
        ["<|im_start|>", "<|im_end|>"],
        ["good evening<|im_end|>", "one\n\ntwo<|im_end|>"],
        "<|im_end|>",
        eos="<|im_end|>",
    ),
    # The end-of-text token of the base model is another than the one that ends a turn.
    "llama3": Family(
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        ["good evening<|eot_id|>", "one\n\ntwo<|eot_id|>"],
        "<|eot_id|>",
    ),
    "gemma": Family(
        ["<start_of_turn>", "<end_of_turn>"],
        ["good evening<end_of_turn>", "one\n\ntwo<end_of_turn>"],
        "<end_of_turn>",
    ),
    # The last turn alone is written with its (empty) reasoning, which the model has to say itself.
    "qwen3": Family(
        ["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        ["good evening<|im_end|>", "<think>\n\n</think>\n\none\n\ntwo<|im_end|>"],
        "<|im_end|>",
        eos="<|im_end|>",
    ),
    "mistral": Family([], [" good evening<|end|>", " one\n\ntwo<|end|>"], "<|end|>", system=False),
}


def tokenizer_of(name: str) -> Any:
    family = FAMILIES[name]
    tokenizer = byte_tokenizer(opening=True)
    tokenizer.add_special_tokens({"additional_special_tokens": family.tokens} if family.tokens else {})
    if family.eos:
        tokenizer.eos_token = family.eos
    tokenizer.chat_template = read_template(FOLDER / f"{name}.jinja")
    return tokenizer


def talk(*turns: tuple[str, str], **keys: str) -> Row:
    return Row(where="f.jsonl:1", messages=[{"role": role, "content": text, **keys} for role, text in turns])


def learned(row: Row, tokenizer: Any) -> list[str]:
    (example,) = encode([row], tokenizer, max_length=None)
    return [text for text, loss in masked_text(example, tokenizer) if loss]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
def test_the_mask_is_the_assistants_turns_with_their_end(name: str, system: bool) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    turns = [("system", "Be kind."), *TALK] if system and family.system else TALK
    assert learned(talk(*turns), tokenizer) == family.learned


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_turn_is_asked_for_with_what_training_saw(name: str) -> None:
    tokenizer = tokenizer_of(name)
    (example,) = encode([talk(*TALK)], tokenizer, max_length=None)
    seen = prompt_ids(talk(*TALK), tokenizer)
    assert example["input_ids"][: len(seen)] == seen
    assert example["labels"][len(seen)] != NO_LOSS
    assert example["labels"][len(seen) - 1] == NO_LOSS


@pytest.mark.parametrize("name", FAMILIES)
def test_roles_and_ends_are_counted(name: str) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    rows = [talk(*TALK), talk(*TALK[:2])]
    encoded = encode(rows, tokenizer, max_length=None)
    found = roles(encoded, rows, tokenizer)
    assert sum(entry["tokens"] for entry in found.values()) == encoded.total_tokens
    assert sum(entry["loss_tokens"] for entry in found.values()) == encoded.loss_tokens
    said = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("good evening", "one\n\ntwo"))
    assert found["assistant"]["tokens"] == found["assistant"]["loss_tokens"]
    assert found["assistant"]["tokens"] >= said
    assert found["user"]["loss_tokens"] == 0 < found["user"]["tokens"]
    # Of the template, what closes an answer carries loss; what opens one and the user's turns do not.
    assert 3 <= found["template"]["loss_tokens"] < found["template"]["tokens"]
    assert ends(encoded, tokenizer)["tokens"] == {family.end: 2}
    assert ends(encoded, tokenizer)["without"] == 0


def test_an_answer_that_is_cut_is_still_the_assistants() -> None:
    tokenizer = tokenizer_of("chatml")
    whole = encode([talk(*TALK)], tokenizer, max_length=None)
    cut = encode([talk(*TALK)], tokenizer, max_length=whole.lengths[0] - 3)
    assert ends(cut, tokenizer)["without"] == 1
    every, kept = (roles(each, [talk(*TALK)], tokenizer) for each in (whole, cut))
    # What is gone: the line break, the end of the turn, and the last token of what was said.
    assert every["assistant"]["tokens"] - kept["assistant"]["tokens"] == 1
    assert every["template"]["tokens"] - kept["template"]["tokens"] == 2
    assert kept["assistant"]["tokens"] == kept["assistant"]["loss_tokens"]


def test_reasoning_of_the_last_turn_is_learned() -> None:
    tokenizer = tokenizer_of("qwen3")
    thought = "<think>\nb\n</think>\n\nc"
    assert learned(talk(("user", "a"), ("assistant", thought)), tokenizer) == [thought + "<|im_end|>"]
    beside = Row(
        where="f:1",
        messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "c", "reasoning_content": "b"}],
    )
    assert learned(beside, tokenizer) == [thought + "<|im_end|>"]


@pytest.mark.parametrize("form", ["inside", "beside"])
def test_reasoning_that_the_template_drops_is_refused_with_the_way_out(form: str) -> None:
    tokenizer = tokenizer_of("qwen3")
    first: dict[str, Any] = {"role": "assistant", "content": "<think>\nb\n</think>\n\nc"}
    if form == "beside":
        first = {"role": "assistant", "content": "c", "reasoning_content": "b"}
    messages = [{"role": "user", "content": "a"}, first, {"role": "user", "content": "d"}]
    row = Row(where="f:3", messages=[*messages, {"role": "assistant", "content": "e"}])
    with pytest.raises(
        DataError, match=r'f:3: the chat template rewrites .*messages\[1\]; .*set "weight": 0'
    ) as caught:
        encode([row], tokenizer, max_length=None)
    assert "split the conversation" in str(caught.value)
    first["weight"] = 0
    assert learned(row, tokenizer) == ["<think>\n\n</think>\n\ne<|im_end|>"]


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Co"]), min_size=1, max_size=12).map(str.strip)
SAID = WORDS.filter(lambda text: bool(text) and "<" not in text)


@settings(max_examples=40, deadline=None)
@given(said=st.lists(SAID, min_size=1, max_size=3), name=st.sampled_from(sorted(FAMILIES)))
def test_whatever_is_said_the_mask_is_the_answers(said: list[str], name: str) -> None:
    tokenizer = tokenizer_of(name)
    turns = [turn for text in said for turn in (("user", "say: " + text), ("assistant", text))]
    found = learned(talk(*turns), tokenizer)
    assert len(found) == len(said)
    for text, piece in zip(said, found, strict=True):
        assert piece.removeprefix("<think>\n\n</think>\n\n").strip() == text + FAMILIES[name].end


def test_a_first_turn_of_the_assistant() -> None:
    tokenizer = tokenizer_of("llama3")
    with pytest.raises(
        DataError, match=r"its first turn is the assistant's.*; begin with a user turn, or give .*weight"
    ):
        encode([talk(("assistant", "hi"), ("user", "a"), ("assistant", "b"))], tokenizer, max_length=None)
    # Marks need nobody to ask.
    assert learned(talk(("assistant", "hi")), byte_tokenizer(template=MARKED_CHATML)) == ["hi<|end|>"]


def test_a_role_that_the_template_refuses_is_quoted() -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:1: the chat template cannot render .*Only user and assistant roles"):
        encode([talk(("system", "s"), *TALK)], tokenizer_of("mistral"), max_length=None)


def test_marks_that_refuse_are_quoted_too() -> None:
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first!') }}{% endif %}" + MARKED_CHATML
    with pytest.raises(DataError, match=r"f\.jsonl:1: the chat template cannot render .*\(user first!\)"):
        encode([talk(("system", "s"), *TALK)], byte_tokenizer(template=strict), max_length=None)


def test_marks_that_mark_nothing_are_refused_with_the_fix() -> None:
    empty = CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    with pytest.raises(DataError) as caught:
        encode([talk(*TALK)], byte_tokenizer(template=empty), max_length=None)
    assert "no token carries loss" in str(caught.value)
    assert "put {% generation %} and {% endgeneration %} around what the assistant says" in str(caught.value)


def test_marks_that_leave_the_end_out_are_seen() -> None:
    inner = MARKED_CHATML.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
    tokenizer = byte_tokenizer(template=inner)
    found = ends(encode([talk(*TALK)], tokenizer, max_length=None), tokenizer)
    assert found == {"tokens": {}, "without": 1, "end_of_text": "<|end|>"}


def test_template_files(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    with pytest.raises(DataError, match=r"chat\.jinja: No such file or directory; a chat template"):
        read_template(path)
    path.write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match=r"chat\.jinja: an empty file"):
        read_template(path)
    path.write_text("{% for m in messages %}\n{{ m.content }}\n{% endfro %}", encoding="utf-8")
    with pytest.raises(DataError, match=r"chat\.jinja:3: no Jinja \(.*endfro.*\); a chat template; mend that line"):
        read_template(path)
    path.write_text(MARKED_CHATML, encoding="utf-8")
    assert read_template(path) == MARKED_CHATML
    asked = prompt_text(talk(*TALK), byte_tokenizer(), template=read_template(path))
    assert asked.endswith("<|start|>assistant\n")
