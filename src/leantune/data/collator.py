"""Examples to one batch of tensors, padded on the right; packs of examples to one in which no row sees another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch

from leantune.data.encoding import NO_LOSS
from leantune.data.packing import DOCUMENTS

Form = Literal["positions", "mask", "varlen"]
"""How a model is told where the rows of a pack begin: see :class:`PackCollator`."""


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
        return batch | self._extra(examples)

    def _extra(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        for name in self.columns:
            values = [example[name] for example in examples]
            is_numeric = all(isinstance(value, (int, float)) for value in values)
            extra[name] = torch.tensor(values) if is_numeric else values
        return extra


class PackCollator(Collator):
    """Joins packs (examples with ``documents``) to a batch, and tells the model where each row begins.

    Three forms, for what a model understands:

    - ``"positions"``: ``position_ids`` that restart with each row, and no mask. transformers finds the rows in them
      and masks attention between rows, sliding windows included.
    - ``"mask"``: the same positions, and a mask ``(batch, 1, length, length)`` that says it outright.
    - ``"varlen"``: all rows of the batch in one sequence without padding, with the borders that FlashAttention takes
      (``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q``, ``max_length_k``).

    Nothing predicts the first token of a row: its label is -100 whatever the example says. Examples that are no packs
    (evaluation) are joined as :class:`Collator` does.

    Args:
        pad_token_id: id to pad with.
        columns: names of extra columns to carry, one value a row.
        pad_to_multiple_of: round the length up to a multiple of this many tokens (not ``"varlen"``).
        form: see above.
        mask_dtype: ``"mask"`` as numbers to add to the scores, in this dtype; None: as booleans.
    """

    def __init__(
        self,
        pad_token_id: int,
        columns: Sequence[str] = (),
        *,
        pad_to_multiple_of: int | None = None,
        form: Form = "positions",
        mask_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(pad_token_id, columns, pad_to_multiple_of=pad_to_multiple_of)
        self.form = form
        self.mask_dtype = mask_dtype

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Join packs to a batch.

        Returns:
            ``input_ids``, ``position_ids``, ``labels`` and ``documents``, all ``(batch, length)``, the last with the
            number of each position's row in the batch (-1 for padding); what the form adds; the extra columns, one
            value a row in that numbering.
        """
        if DOCUMENTS not in examples[0]:
            return super().__call__(examples)
        packs: list[list[dict[str, Any]]] = [example[DOCUMENTS] for example in examples]
        rows = [row for pack in packs for row in pack]
        if self.form == "varlen":
            packs = [rows]
        lengths = [sum(len(row["input_ids"]) for row in pack) for pack in packs]
        length = max(lengths)
        if self.pad_to_multiple_of and self.form != "varlen":
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        ids = [[token for row in pack for token in row["input_ids"]] for pack in packs]
        labels = [[token for row in pack for token in (NO_LOSS, *row["labels"][1:])] for pack in packs]
        positions = [[place for row in pack for place in range(len(row["input_ids"]))] for pack in packs]
        numbers = itertools.count()
        documents = [[n for row in pack for n in [next(numbers)] * len(row["input_ids"])] for pack in packs]
        batch: dict[str, Any] = {
            "input_ids": self._pad(ids, length, self.pad_token_id),
            # Each padded position restarts, and so sees itself alone.
            "position_ids": self._pad(positions, length, 0),
            "labels": self._pad(labels, length, NO_LOSS),
            DOCUMENTS: self._pad(documents, length, -1),
        }
        return batch | self._borders(batch[DOCUMENTS], rows) | self._extra(rows)

    def _borders(self, documents: torch.Tensor, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self.form == "mask":
            same = documents[:, None, :, None] == documents[:, None, None, :]
            allowed = same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()
            if self.mask_dtype is None:
                return {"attention_mask": allowed}
            closed = torch.finfo(self.mask_dtype).min
            return {"attention_mask": torch.zeros(same.shape, dtype=self.mask_dtype).masked_fill(~allowed, closed)}
        if self.form == "varlen":
            lengths = torch.tensor([len(row["input_ids"]) for row in rows], dtype=torch.int32)
            borders = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            longest = int(lengths.max())
            names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
            return dict(zip(names, (borders, borders.clone(), longest, longest), strict=True))
        return {}
