"""Hidden tokens: how many, which fate, and that the choice depends on seed, epoch and row alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from leantune.core.errors import DataError
from leantune.data import NO_LOSS, MaskedTokens, Row, encode_masked

WORDS = ["<pad>", "<cls>", "<sep>", "<unk>", "<mask>", *(f"w{number}" for number in range(60))]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("<cls>", 1), ("<sep>", 2)]
    backend.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=special
    )
    names = {"pad_token": "<pad>", "cls_token": "<cls>", "sep_token": "<sep>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        mask_token="<mask>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )


def rows(count: int, words: int = 40) -> list[Row]:
    text = [" ".join(f"w{(number * 7 + place) % 60}" for place in range(words)) for number in range(count)]
    return [Row(where=f"rows:{number + 1}", text=each) for number, each in enumerate(text)]


def test_the_shares_are_those_of_the_paper(tokenizer: Any) -> None:
    encoded = encode_masked(rows(300), tokenizer, max_length=None)
    hidden = MaskedTokens(encoded, tokenizer, seed=1)
    fates: Counter[str] = Counter()
    for plain, example in zip(encoded, hidden, strict=True):
        places = [place for place, label in enumerate(example["labels"]) if label != NO_LOSS]
        assert len(places) == 6  # 15% of 40, exactly
        for place, token in enumerate(plain["input_ids"]):
            if place not in places:
                assert example["input_ids"][place] == token
                continue
            assert example["labels"][place] == token
            assert plain["hideable"][place]
            shown = example["input_ids"][place]
            fates["mask" if shown == 4 else "kept" if shown == token else "random"] += 1
            assert shown == 4 or shown > 4, "a special token stands for a word"
    total = sum(fates.values())
    assert total == encoded.loss_tokens == 1800
    # Three standard errors of a share of 1800 draws.
    assert abs(fates["mask"] / total - 0.8) < 0.03
    assert abs(fates["random"] / total - 0.1) < 0.022
    assert abs(fates["kept"] / total - 0.1) < 0.022


def test_another_choice_in_each_epoch_and_the_same_when_asked_again(tokenizer: Any) -> None:
    encoded = encode_masked(rows(20), tokenizer, max_length=None)
    one, two = MaskedTokens(encoded, tokenizer, seed=1), MaskedTokens(encoded, tokenizer, seed=1)
    first = one[:]
    one.set_epoch(1)
    second = one[:]
    assert all(a["labels"] != b["labels"] for a, b in zip(first, second, strict=True))
    # Asked alone, in another order, after other epochs: the same.
    two.set_epoch(1)
    assert two[13] == second[13]
    two.set_epoch(0)
    assert [two[place] for place in reversed(range(20))] == first[::-1]
    assert MaskedTokens(encoded, tokenizer, seed=2)[:] != first
    by_length = sorted(encoded, key=lambda example: -example["row"])
    assert MaskedTokens(by_length, tokenizer, seed=1)[:] == first[::-1]  # type: ignore[arg-type]


def test_an_evaluation_is_asked_the_same_in_every_epoch(tokenizer: Any) -> None:
    fixed = MaskedTokens(encode_masked(rows(5), tokenizer, max_length=None), tokenizer, seed=1, fixed=True)
    before = fixed[:]
    fixed.set_epoch(3)
    assert fixed[:] == before


def test_a_short_text_still_hides_one_token_and_no_special_one(tokenizer: Any) -> None:
    encoded = encode_masked([Row(where="a", text="w1", text_pair="w2")], tokenizer, max_length=None)
    assert encoded.examples[0]["hideable"] == [False, True, False, True, False]
    assert encoded.examples[0]["token_type_ids"] == [0, 0, 0, 1, 1]
    for epoch in range(20):
        hidden = MaskedTokens(encoded, tokenizer, seed=0)
        hidden.set_epoch(epoch)
        labels = hidden[0]["labels"]
        assert sum(label != NO_LOSS for label in labels) == 1
        assert labels[0] == labels[2] == labels[4] == NO_LOSS


def test_long_texts_are_cut_and_counted(tokenizer: Any) -> None:
    encoded = encode_masked(rows(2), tokenizer, max_length=12)
    assert encoded.lengths == [12, 12]
    assert (encoded.truncated, encoded.tokens_cut) == (2, 60)
    assert all(example["input_ids"][-1] == 2 for example in encoded)


def test_what_cannot_be_masked_is_named(tokenizer: Any) -> None:
    bad = [Row(where="f:1", text=""), Row(where="f:2", prompt="a", completion="b"), Row(where="f:3", text="w1")]
    with pytest.raises(DataError) as caught:
        encode_masked(bad, tokenizer, max_length=None)
    assert "f:1: its text has no tokens" in str(caught.value)
    assert "f:2: no 'text'" in str(caught.value)
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    with pytest.raises(DataError, match=r"no mask token; .*BERT"):
        encode_masked(bad[2:], plain, max_length=None)
