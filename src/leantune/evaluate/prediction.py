"""What a model with a classification or regression head says of each example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from leantune.evaluate.mode import device_of, evaluating


def predict(
    model: Any,
    examples: Sequence[dict[str, Any]],
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    batch_size: int = 16,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> np.ndarray:
    """The head's outputs, (examples, outputs), in the order given and in float64.

    Args:
        model: a sequence classification model or a PeftModel over one. Its training flags are left as they were.
        examples: as :func:`leantune.data.encode_classification` or ``encode_regression`` makes them.
        collator: joins examples to a batch.
        batch_size: examples at once; sorted by length.
        progress: called as ``progress("predict", done, total)`` after each batch, in examples.
    """
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].get("input_ids", ())))
    found: dict[int, np.ndarray] = {}
    device = device_of(model)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collator([examples[index] for index in chosen])
            batch.pop("labels", None)
            logits = model(**{name: value.to(device) for name, value in batch.items()}).logits
            found.update(zip(chosen, logits.double().cpu().numpy(), strict=True))
            if progress is not None:
                progress("predict", start + len(chosen), len(order))
    return np.stack([found[index] for index in range(len(examples))])
