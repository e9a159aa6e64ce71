"""Examples to one batch of tensors, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from leantune.data.encoding import NO_LOSS


class Collator:
    """Pads ``input_ids`` on the right and carries labels and extra columns.

    Args:
        pad_token_id: id to pad with. It is masked by ``attention_mask`` and -100 labels, so it may be the end-of-text
            id.
        columns: names of extra columns to carry: numbers become a tensor, anything else a list.
        pad_to_multiple_of: round the batch's length up to a multiple of this many tokens.
    """

    def __init__(
        self, pad_token_id: int, columns: Sequence[str] = (), *, pad_to_multiple_of: int | None = None
    ) -> None:
        self.pad_token_id = pad_token_id
        self.columns = tuple(columns)
        self.pad_to_multiple_of = pad_to_multiple_of

    def _pad(self, rows: list[list[int]], length: int, value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.long)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Join examples to a batch.

        Returns:
            ``input_ids``, ``attention_mask`` (batch, length), ``labels`` (batch, length), or (batch,) where a label
            is one number, and the extra columns.
        """
        ids = [example["input_ids"] for example in examples]
        length = max(len(row) for row in ids)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch: dict[str, Any] = {
            "input_ids": self._pad(ids, length, self.pad_token_id),
            "attention_mask": self._pad([[1] * len(row) for row in ids], length, 0),
        }
        if "token_type_ids" in examples[0]:
            batch["token_type_ids"] = self._pad([example["token_type_ids"] for example in examples], length, 0)
        if "labels" in examples[0]:
            labels = [example["labels"] for example in examples]
            is_tokens = isinstance(labels[0], list)
            batch["labels"] = self._pad(labels, length, NO_LOSS) if is_tokens else torch.tensor(labels)
        for name in self.columns:
            values = [example[name] for example in examples]
            is_numeric = all(isinstance(value, (int, float)) for value in values)
            batch[name] = torch.tensor(values) if is_numeric else values
        return batch
