"""What `inspect data` shows."""

from __future__ import annotations

import json

from leantune.data import Row, encode, encode_classification, masked_text, summary
from text_fixture import byte_tokenizer, piece_tokenizer

TOKENIZER = byte_tokenizer(opening=True)


def row(prompt: str, completion: str, **fields: list[str]) -> Row:
    return Row(where="f:1", prompt=prompt, completion=completion, **fields)  # type: ignore[arg-type]


def test_summary_counts() -> None:
    rows = [row("a", "b"), row("a", "b"), row("a", "c", references=["d"]), row("two", "one two three four")]
    encoded = encode(rows, TOKENIZER, max_length=7)
    facts = summary(encoded, rows, TOKENIZER)
    assert facts["rows"] == 4
    assert facts["duplicates"] == {"prompts": 2, "rows": 1}
    assert facts["references"] == 1
    assert facts["truncation"]["max_length"] == 7
    assert facts["truncation"]["rows"] == encoded.truncated == 1
    assert facts["truncation"]["tokens"] == encoded.tokens_cut > 0
    assert facts["loss_share"] == encoded.loss_tokens / encoded.total_tokens
    assert facts["tokens"]["min"] == min(encoded.lengths)
    assert facts["tokens"]["max"] == max(encoded.lengths) == 7
    assert sum(facts["tokens"]["histogram"]["counts"]) == 4
    json.dumps(facts, allow_nan=False)


def test_summary_of_labels_and_unknown_tokens() -> None:
    tokenizer = piece_tokenizer()
    rows = [
        Row(where=f"f:{i}", text=text, label=label)
        for i, (text, label) in enumerate([("one", "x"), ("Ω", "y"), ("two", "x")])
    ]
    facts = summary(encode_classification(rows, tokenizer, max_length=None), rows, tokenizer)
    assert facts["labels"] == {"x": 2, "y": 1}
    assert facts["loss_share"] is None
    assert facts["unknown_tokens"] == 1


def test_masked_text_is_the_whole_text() -> None:
    (example,) = encode([row("Facts: a", " A.")], TOKENIZER, max_length=None)
    assert masked_text(example, TOKENIZER) == [("<|begin|>Facts: a", False), (" A.<|end|>", True)]


def test_masked_text_keeps_the_space_at_a_border() -> None:
    tokenizer = piece_tokenizer()
    (example,) = encode([row("Sentence:", " The Blue")], tokenizer, max_length=None)
    assert masked_text(example, tokenizer) == [("Sentence:", False), (" The Blue</s>", True)]
