"""Any data file to rows, rows to token ids and a loss mask, examples to batches.

    file -> reader/ (what a record is) -> layout/ (what its columns mean) -> Row -> encode -> Encoded -> Collator

Reading and checking needs no torch; what makes batches imports it, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leantune.data.classification import encode_classification, encode_regression, find_label_names
from leantune.data.encoding import NO_LOSS, Encoded, check_answers, encode, prompt_ids, prompt_text, text_ids
from leantune.data.image import ImageCollator, encode_images
from leantune.data.masking import MaskedTokens, encode_masked
from leantune.data.packing import Packs
from leantune.data.report import masked_text, summary
from leantune.data.row import Row
from leantune.data.source import data_hash, iter_rows, read_rows

if TYPE_CHECKING:
    from leantune.data.collator import Collator, PackCollator
    from leantune.data.streaming import RowStream

__all__ = [
    "NO_LOSS",
    "Collator",
    "Encoded",
    "ImageCollator",
    "MaskedTokens",
    "PackCollator",
    "Packs",
    "Row",
    "RowStream",
    "check_answers",
    "data_hash",
    "encode",
    "encode_classification",
    "encode_images",
    "encode_masked",
    "encode_regression",
    "find_label_names",
    "iter_rows",
    "masked_text",
    "prompt_ids",
    "prompt_text",
    "read_rows",
    "summary",
    "text_ids",
]


def __getattr__(name: str) -> Any:
    if name in ("Collator", "PackCollator"):
        from leantune.data import collator

        return getattr(collator, name)
    if name == "RowStream":
        from leantune.data.streaming import RowStream

        return RowStream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
