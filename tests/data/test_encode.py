"""Token ids and the loss mask: exactly the answer, exactly as generation will see the prompt."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leantune.core.errors import DataError
from leantune.data import NO_LOSS, Encoded, Row, encode, encoding, masked_text, prompt_ids, prompt_text, text_ids
from text_fixture import CHATML, FORGETFUL, MARKED_CHATML, byte_tokenizer, piece_tokenizer

TOKENIZER = byte_tokenizer()
CHAT = byte_tokenizer(opening=True, template=CHATML)


def row(prompt: str = "Facts: a\nSentence:", completion: str = " A.", where: str = "f.jsonl:1", **extra: Any) -> Row:
    return Row(where=where, prompt=prompt, completion=completion, extra=extra)


def talk(*turns: tuple[str, str], where: str = "f.jsonl:1", **extra: Any) -> Row:
    return Row(where=where, messages=[{"role": role, "content": text} for role, text in turns], extra=extra)


def learned(example: dict[str, Any]) -> list[int]:
    return [label for label in example["labels"] if label != NO_LOSS]


def test_prompt_then_completion_then_end() -> None:
    (example,) = encode([row()], TOKENIZER, max_length=None)
    prompt = TOKENIZER("Facts: a\nSentence:")["input_ids"]
    completion = TOKENIZER(" A.")["input_ids"]
    assert example["input_ids"] == [*prompt, *completion, TOKENIZER.eos_token_id]
    assert example["labels"] == [NO_LOSS] * len(prompt) + [*completion, TOKENIZER.eos_token_id]


def test_opening_token_once_and_no_closing_token_inside() -> None:
    tokenizer = byte_tokenizer(opening=True, closing=True)
    (example,) = encode([row()], tokenizer, max_length=None)
    ids = example["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[1:] == encode([row()], TOKENIZER, max_length=None)[0]["input_ids"]
    assert ids[: len(prompt_ids(row(), tokenizer))] == prompt_ids(row(), tokenizer)


def test_a_word_does_not_merge_across_the_border() -> None:
    joined = row("ab", "c")
    assert len(TOKENIZER("abc")["input_ids"]) == 1, "the tokenizer should merge this, or the test shows nothing"
    (example,) = encode([joined], TOKENIZER, max_length=None)
    assert example["input_ids"] == [
        *TOKENIZER("ab")["input_ids"],
        *TOKENIZER("c")["input_ids"],
        TOKENIZER.eos_token_id,
    ]


@pytest.mark.parametrize("completion", ["The Blue", " The Blue"])
def test_no_space_is_made_up_between_prompt_and_completion(completion: str) -> None:
    tokenizer = piece_tokenizer()
    (example,) = encode([row("Sentence:", completion)], tokenizer, max_length=None)
    assert example["input_ids"][:-1] == tokenizer("Sentence:" + completion, add_special_tokens=False)["input_ids"]
    # Alone, the completion would get a space before it.
    assert tokenizer.decode(tokenizer("Sentence:The")["input_ids"]) == "Sentence:The"
    assert tokenizer("The")["input_ids"] == tokenizer(" The")["input_ids"]


@settings(max_examples=100, deadline=None)
@given(prompt=st.text(max_size=12), completion=st.text(max_size=12).filter(lambda text: bool(text.strip())))
def test_for_any_text_the_loss_is_the_completion_and_the_rest_is_what_generation_sees(
    prompt: str, completion: str
) -> None:
    one = row(prompt, completion)
    (example,) = encode([one], TOKENIZER, max_length=None)
    ids, labels = example["input_ids"], example["labels"]
    seen = prompt_ids(one, TOKENIZER)
    assert ids[: len(seen)] == seen
    assert labels[: len(seen)] == [NO_LOSS] * len(seen)
    assert labels[len(seen) :] == ids[len(seen) :]
    assert ids[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.decode(ids[len(seen) : -1], clean_up_tokenization_spaces=False) == completion


def test_an_empty_prompt_still_predicts_the_first_token() -> None:
    (example,) = encode([row("", "ab")], TOKENIZER, max_length=None)
    assert example["input_ids"][0] == TOKENIZER.bos_token_id
    assert learned(example) == [*TOKENIZER("ab")["input_ids"], TOKENIZER.eos_token_id]
    assert text_ids("", TOKENIZER) == [TOKENIZER.bos_token_id]


def test_an_end_of_text_token_written_in_the_data_is_not_doubled() -> None:
    (example,) = encode([row(completion=" A.<|end|>")], TOKENIZER, max_length=None)
    assert example["input_ids"] == encode([row()], TOKENIZER, max_length=None)[0]["input_ids"]


def test_counts_rows_and_extra_columns() -> None:
    encoded = encode([row(task="a"), row(completion=" A B C."), row()], TOKENIZER, max_length=None)
    assert isinstance(encoded, Encoded)
    assert len(encoded) == 3
    assert [example["row"] for example in encoded] == [0, 1, 2]
    assert encoded[0]["task"] == "a"
    assert encoded.lengths == [len(example["input_ids"]) for example in encoded]
    assert encoded.total_tokens == sum(encoded.lengths)
    assert encoded.loss_tokens == sum(len(learned(example)) for example in encoded)
    assert encoded.truncation_note() is None


def test_columns_of_the_file_cannot_take_the_place_of_ours() -> None:
    plain = encode([row()], TOKENIZER, max_length=None)[0]
    assert encode([row(input_ids=[1], labels=2, row=99)], TOKENIZER, max_length=None)[0] == plain


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(f"Facts: {i}", f" {i}.") for i in range(7)]
    whole = encode(rows, TOKENIZER, max_length=None)
    monkeypatch.setattr(encoding, "_CHUNK_ROWS", 3)
    assert encode(rows, TOKENIZER, max_length=None) == whole


def test_truncation_is_counted() -> None:
    long = row(completion=" one two three four, and Loch Fyne")
    length = len(encode([long], TOKENIZER, max_length=None)[0]["input_ids"])
    short = len(encode([row()], TOKENIZER, max_length=None)[0]["input_ids"])
    encoded = encode([row(), long], TOKENIZER, max_length=length - 2)
    assert (encoded.truncated, encoded.tokens_cut, encoded.loss_rows_cut) == (1, 2, 1)
    assert encoded.lengths == [short, length - 2]
    assert encoded.truncation_note() == (
        f"1 of 2 rows were cut to {length - 2} tokens: 2 tokens lost, 1 rows lost tokens that carry loss"
    )
    exact = encode([long], TOKENIZER, max_length=length)
    assert (exact.truncated, exact.tokens_cut) == (0, 0)


def test_tokens_cut_after_the_loss_are_told_apart() -> None:
    chat = talk(("user", "hi"), ("assistant", "one"), ("user", "and a long afterword that carries no loss"))
    encoded = encode([chat], CHAT, max_length=30)
    assert (encoded.truncated, encoded.loss_rows_cut) == (1, 0)


def test_a_row_left_without_loss_is_refused_by_name() -> None:
    seen = len(prompt_ids(row(), TOKENIZER))
    kept = encode([row()], TOKENIZER, max_length=seen + 1)
    assert kept.loss_tokens == 1
    rows = [row("short", "er"), row(where="f.jsonl:2"), row(where="f.jsonl:3")]
    with pytest.raises(DataError) as caught:
        encode(rows, TOKENIZER, max_length=seen)
    text = str(caught.value)
    assert "2 problems" in text
    whole = seen + kept.loss_tokens + kept.tokens_cut
    assert (
        f"f.jsonl:2: {seen} of its {whole} tokens come before the answer, and max_length is {seen}; at least one token "
        "that carries loss; raise max_length or shorten the prompt" in text
    )
    assert "f.jsonl:3" in text
    assert "f.jsonl:1" not in text


def test_rows_without_an_answer_are_refused() -> None:
    labelled = Row(where="f.jsonl:2", text="a", label=1)
    with pytest.raises(DataError, match=r"^f\.jsonl:2: a text with a label; a prompt and completion, or messages; "):
        encode([row(), labelled], TOKENIZER, max_length=None)
    with pytest.raises(DataError, match=r"^f\.jsonl:9: a row of another layout than the first"):
        encode([row(), talk(("user", "a"), ("assistant", "b"), where="f.jsonl:9")], CHAT, max_length=None)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"no end-of-text token; .*; set tokenizer\.eos_token"):
        encode([row()], tokenizer, max_length=None)


# Conversations.

CONVERSATION = talk(
    ("system", "Be kind."), ("user", "hello"), ("assistant", "good evening"), ("user", "more"), ("assistant", "one two")
)
EXPECTED = [
    ("<|start|>system\nBe kind.<|end|>\n<|start|>user\nhello<|end|>\n<|start|>assistant\n", False),
    ("good evening<|end|>", True),
    ("\n<|start|>user\nmore<|end|>\n<|start|>assistant\n", False),
    ("one two<|end|>", True),
    ("\n", False),
]


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML], ids=["by beginnings", "by marks"])
def test_assistant_turns_alone_carry_loss(template: str) -> None:
    tokenizer = byte_tokenizer(opening=True, template=template)
    (example,) = encode([CONVERSATION], tokenizer, max_length=None)
    assert masked_text(example, tokenizer) == EXPECTED


def test_a_given_template_overrides() -> None:
    (example,) = encode([CONVERSATION], byte_tokenizer(template=FORGETFUL), max_length=None, template=CHATML)
    assert masked_text(example, TOKENIZER) == EXPECTED


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML], ids=["by beginnings", "by marks"])
def test_generation_is_asked_with_what_training_saw(template: str) -> None:
    tokenizer = byte_tokenizer(opening=True, template=template)
    assert prompt_text(CONVERSATION, tokenizer) == "".join(text for text, _ in EXPECTED[:3])
    (example,) = encode([CONVERSATION], tokenizer, max_length=None)
    seen = prompt_ids(CONVERSATION, tokenizer)
    assert example["input_ids"][: len(seen)] == seen
    assert example["labels"][len(seen)] != NO_LOSS
    # The template writes every special token itself; another opening token would be one that training never saw.
    assert tokenizer.bos_token_id not in seen


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML])
def test_a_turn_of_weight_zero_carries_no_loss(template: str) -> None:
    messages = [dict(message) for message in CONVERSATION.messages or []]
    messages[2]["weight"] = 0
    (example,) = encode([Row(where="f:1", messages=messages)], byte_tokenizer(template=template), max_length=None)
    assert [text for text, loss in masked_text(example, TOKENIZER) if loss] == ["one two<|end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = byte_tokenizer(template=FORGETFUL)
    thinking = talk(("user", "a"), ("assistant", "<think>b</think>c"), ("user", "d"), ("assistant", "e"), where="f:7")
    with pytest.raises(DataError, match=r"^f:7: the chat template rewrites what comes before or in messages\[1\]"):
        encode([thinking], tokenizer, max_length=None)
    plain = talk(("user", "a"), ("assistant", "<think>b</think>c"))
    (example,) = encode([plain], tokenizer, max_length=None)
    assert [text for text, loss in masked_text(example, tokenizer) if loss] == ["<think>b</think>c<|end|>"]


def test_a_template_that_refuses_is_quoted() -> None:
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first!') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"f\.jsonl:1: the chat template cannot render .*\(user first!\)"):
        encode([CONVERSATION], TOKENIZER, max_length=None, template=strict)


def test_marks_that_mark_nothing_are_refused() -> None:
    empty = CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    with pytest.raises(DataError, match=r"f\.jsonl:1: no token carries loss; at least one"):
        encode([CONVERSATION], TOKENIZER, max_length=None, template=empty)


def test_no_template() -> None:
    with pytest.raises(DataError, match=r"no chat template; .*; give a template"):
        encode([CONVERSATION], TOKENIZER, max_length=None)


def test_tools_reach_the_template() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    template = "{% for t in tools %}{{ t['function']['name'] }};{% endfor %}" + CHATML
    asked = talk(("user", "a"), ("assistant", "b"), tools=[tool])
    (example,) = encode([asked], TOKENIZER, max_length=None, template=template)
    assert masked_text(example, TOKENIZER)[0][0].startswith("weather;<|start|>user")
    assert prompt_text(asked, TOKENIZER, template=template).startswith("weather;")
