"""Masked language modelling: texts with some of their tokens hidden, another choice of tokens in each epoch.

Of every text 15% of the tokens (at least one, special tokens never) are to be predicted; of these 80% become the mask
token, 10% a random token and 10% stay (BERT, arXiv 1810.04805, section 3.1). The choice is a function of seed, epoch
and row alone, so it does not depend on the batches, on the number of processes, or on where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from leantune.core.errors import DataError, describe
from leantune.data.encoding import NO_LOSS, Encoded
from leantune.data.problem import Problems
from leantune.data.row import Row

MASK_SHARE = 0.15
_AS_MASK, _AS_RANDOM = 0.8, 0.1


def encode_masked(rows: Sequence[Row], tokenizer: Any, *, max_length: int | None) -> Encoded:
    """Tokenise texts, and pairs as the tokenizer joins them, for :class:`MaskedTokens` to hide tokens of.

    Args:
        rows: rows with ``text`` (and ``text_pair``); a label is left aside.
        tokenizer: a transformers tokenizer with a mask token.
        max_length: longest example in tokens; longer ones are cut and counted.

    Returns:
        Examples with ``input_ids`` and ``hideable``, a flag for each token that is no special one.

    Raises:
        DataError: the tokenizer has no mask token, or a row has no text or no token that could be hidden.
    """
    if tokenizer.mask_token_id is None:
        name = getattr(tokenizer, "name_or_path", "") or "the model"
        do = "choose a masked language model (BERT, RoBERTa, ...), or another task"
        raise DataError(describe(f"tokenizer of {name}", "no mask token", "one, to hide tokens with", do))
    problems = Problems("data")
    encoded = Encoded(max_length=max_length)
    for index, row in enumerate(rows):
        if row.text is None:
            problems.add(row.where, "no 'text'", "rows with 'text'", "name another task, or mend the data")
            continue
        options: dict[str, Any] = {"return_special_tokens_mask": True, "verbose": False}
        full = tokenizer(row.text, row.text_pair, **options)
        kept = full
        if max_length is not None and len(full["input_ids"]) > max_length:
            kept = tokenizer(row.text, row.text_pair, truncation=True, max_length=max_length, **options)
            encoded.truncated += 1
            encoded.tokens_cut += len(full["input_ids"]) - len(kept["input_ids"])
            encoded.loss_rows_cut += 1
        hideable = [not special for special in kept["special_tokens_mask"]]
        if not any(hideable):
            problems.add(row.where, "its text has no tokens", "at least one to hide", "fill it in, or delete the row")
            continue
        example = {**row.extra, "input_ids": list(kept["input_ids"]), "hideable": hideable, "row": index}
        if "token_type_ids" in kept:
            example["token_type_ids"] = list(kept["token_type_ids"])
        encoded.examples.append(example)
        encoded.lengths.append(len(hideable))
        encoded.loss_tokens += _count(sum(hideable), MASK_SHARE)
    problems.raise_if_any()
    encoded.total_tokens = sum(encoded.lengths)
    return encoded


def _count(hideable: int, share: float) -> int:
    """Tokens to hide: the share, rounded, and never none, or the row would teach nothing."""
    return max(1, round(share * hideable))


class MaskedTokens(Sequence[dict[str, Any]]):
    """Encoded texts with tokens hidden, and the hidden ones as labels; another choice in each epoch.

    Args:
        encoded: what :func:`encode_masked` made.
        tokenizer: its mask token hides; random tokens are drawn from its vocabulary without the special ones.
        seed: of the choice.
        share: of the tokens to predict.
        fixed: one choice for all epochs, for an evaluation.
    """

    def __init__(
        self, encoded: Encoded, tokenizer: Any, *, seed: int, share: float = MASK_SHARE, fixed: bool = False
    ) -> None:
        self.encoded = encoded
        self.mask_token_id = int(tokenizer.mask_token_id)
        special = set(tokenizer.all_special_ids)
        self.ordinary = np.array([token for token in range(len(tokenizer)) if token not in special])
        self.seed = seed
        self.share = share
        self.fixed = fixed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the tokens of an epoch."""
        self.epoch = 0 if self.fixed else epoch

    def __len__(self) -> int:
        return len(self.encoded)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        example = dict(self.encoded[index])
        places = np.flatnonzero(example.pop("hideable"))
        # The row's own number, not its place: sorting the rows by length changes no choice.
        draw = np.random.default_rng([self.seed, self.epoch, int(example["row"]), int(self.fixed)])
        chosen = draw.permutation(places)[: _count(len(places), self.share)]
        ids = np.array(example["input_ids"])
        labels = np.full(len(ids), NO_LOSS)
        labels[chosen] = ids[chosen]
        fate, words = draw.random(len(chosen)), draw.choice(self.ordinary, len(chosen))
        ids[chosen[fate < _AS_MASK]] = self.mask_token_id
        random = (fate >= _AS_MASK) & (fate < _AS_MASK + _AS_RANDOM)
        ids[chosen[random]] = words[random]
        return {**example, "input_ids": ids.tolist(), "labels": labels.tolist()}
