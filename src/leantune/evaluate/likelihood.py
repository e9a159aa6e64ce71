"""How likely a model finds the answers: nats per token that carries loss, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from leantune.core import prompt
from leantune.core.errors import DataError, describe
from leantune.data import NO_LOSS
from leantune.evaluate.mode import device_of, evaluating

# Positions whose log-softmax is formed at once; a row of it is as wide as the vocabulary.
_CHUNK_POSITIONS = 256


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of examples.

    Attributes:
        loss: mean nats per token that carries loss, every token weighing the same.
        tokens: tokens that carry loss.
        row_nats: nats of each example, in the order given.
        row_tokens: tokens that carry loss of each example.
    """

    loss: float
    tokens: int
    row_nats: np.ndarray
    row_tokens: np.ndarray

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that is more than a float holds."""
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """``exp(loss)``, infinite where that is more than a float holds."""
    return math.exp(loss) if loss < 709.0 else math.inf


@contextmanager
def _only_positions(model: Any, selected: torch.Tensor) -> Iterator[list[bool]]:
    """Let the output layer see the selected positions alone; yields a list that fills once it did.

    Everything a model does after its output layer (scaling, capping of logits) is elementwise, so this holds for any
    of them.
    """
    head: nn.Module | None = model.get_output_embeddings()
    seen: list[bool] = []
    if head is None:
        yield seen
        return

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(True)
        return (args[0][selected].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield seen
    finally:
        handle.remove()


def _token_nats(model: Any, batch: dict[str, Any], shift: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of every token that carries loss, and the batch row each belongs to."""
    labels = batch.pop("labels")
    selected = labels != NO_LOSS
    targets = labels[selected]
    if shift:
        # The output at a position predicts the token after it.
        selected = torch.zeros_like(labels, dtype=torch.bool)
        selected[:, :-1] = labels[:, 1:] != NO_LOSS
        targets = labels[:, 1:][selected[:, :-1]]
        batch["use_cache"] = False
    with _only_positions(model, selected) as seen, prompt.told_by(labels if shift else None):
        output = model(**batch)
    logits = output.logits[0] if seen else output.logits[selected]
    nats = [
        functional.cross_entropy(part if part.dtype == torch.float64 else part.float(), target, reduction="none")
        for part, target in zip(logits.split(_CHUNK_POSITIONS), targets.split(_CHUNK_POSITIONS), strict=True)
    ]
    return torch.cat(nats), selected.nonzero()[:, 0]


def likelihood(
    model: Any,
    examples: Sequence[dict[str, Any]],
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    batch_size: int = 16,
    *,
    shift: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Likelihood:
    """Score the tokens that carry loss; logits are formed at their positions alone.

    Args:
        model: a language model or a PeftModel over one. Its training flags are left as they were.
        examples: as :func:`leantune.data.encode` makes them.
        collator: joins examples to a batch of ``input_ids``, ``attention_mask`` and ``labels``, padded on the right.
        batch_size: examples at once; sorted by length, so that little is padded.
        shift: a position predicts the token after it, as in a causal model; False: its own, as in a masked one.
        progress: called as ``progress("likelihood", done, total)`` after each batch, in examples.

    Raises:
        DataError: no token carries loss.
    """
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index]["input_ids"]))
    row_nats, row_tokens = np.zeros(len(examples)), np.zeros(len(examples), dtype=np.int64)
    device = device_of(model)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = np.array(order[start : start + batch_size])
            batch = collator([examples[index] for index in chosen])
            names = ("input_ids", "attention_mask", "labels", *(() if shift else ("token_type_ids",)))
            given = {name: batch[name].to(device) for name in names if name in batch}
            nats, rows = _token_nats(model, given, shift)
            places = chosen[rows.cpu().numpy()]
            np.add.at(row_nats, places, nats.double().cpu().numpy())
            np.add.at(row_tokens, places, 1)
            if progress is not None:
                progress("likelihood", start + len(chosen), len(order))
    tokens = int(row_tokens.sum())
    if tokens == 0:
        raise DataError(describe("data", "no token carries loss", "at least one", "check the rows and max_length"))
    return Likelihood(float(row_nats.sum()) / tokens, tokens, row_nats, row_tokens)
