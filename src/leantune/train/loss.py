"""The loss on the tokens that carry it, from logits at those positions alone.

With short completions most logits are computed to be thrown away: at 49,152 words a vocabulary-wide row costs more
than several layers. So the hidden states are gathered in front of the output embedding, by a hook that every
architecture's ``forward`` passes through, and whatever the model does to its logits afterwards (a softcap, a
scaling) is done to the gathered ones. Position ``i`` predicts token ``i + 1``: row ``b`` has loss at position ``i``
where ``labels[b, i + 1] != -100``, and a label at position 0 is never predicted.

    loss = sum over those (b, i) of -log softmax(logits[b, i])[labels[b, i + 1]]  /  number of them in the step
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leantune.core import prompt
from leantune.core.errors import ModelError, describe

IGNORED = -100


@dataclass(frozen=True)
class Selection:
    """The positions of a batch whose next token carries loss, in row order.

    Attributes:
        index: ``(N,)`` positions in the batch flattened to ``sequences * length``.
        target: ``(N,)`` the token each one predicts.
        row: ``(N,)`` the row each one is in.
        rows: rows in the batch; more than sequences where rows are packed.
        labels: ``(sequences, length)`` the labels it was made of.
    """

    index: Tensor
    target: Tensor
    row: Tensor
    rows: int
    labels: Tensor

    @classmethod
    def of(cls, labels: Tensor, documents: Tensor | None = None) -> Selection:
        """The selection of a batch.

        Args:
            labels: ``(sequences, length)``, aligned with the input tokens as usual. In a packed batch the first token
                of a row must have none, or it would be predicted from the row before it.
            documents: ``(sequences, length)`` the row of each position where rows are packed, -1 for padding.
        """
        sequences, length = labels.shape
        sequence, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        row, rows = sequence, sequences
        if documents is not None:
            row, rows = documents[sequence, column + 1], int(documents.max()) + 1
        return cls(sequence * length + column, labels[sequence, column + 1], row, rows, labels)


def count_targets(labels: Tensor) -> Tensor:
    """How many tokens of ``labels`` carry loss."""
    return (labels[:, 1:] != IGNORED).sum()


def count_items(task: str, labels: Tensor) -> Tensor:
    """What the loss of a batch is a mean over: tokens that carry loss, or rows where a head answers once a row."""
    if task == "causal-lm":
        return count_targets(labels)
    # A hidden token is predicted where it stands, not from the position before it.
    return (labels != IGNORED).sum() if task == "masked-lm" else torch.tensor(len(labels), device=labels.device)


@contextmanager
def selected_logits(model: nn.Module, selection: Selection) -> Iterator[None]:
    """Inside, ``model(...).logits`` has shape ``(1, N, vocabulary)``: one row for each selected position.

    Raises:
        ModelError: the model's logits do not come from one pass of its output embedding over all positions.
    """
    head = output_embedding(model)
    outer = vars(_GATHER).copy()
    vars(_GATHER).update(head=head, index=selection.index, labels=selection.labels, passes=0, refused=None)
    handle = head.register_forward_pre_hook(_gather)
    try:
        yield
    finally:
        handle.remove()
        passes, refused = _GATHER.passes, _GATHER.refused
        vars(_GATHER).update(outer)
    if refused is not None:
        raise _not_selectable(model, f"its head is given {refused}")
    if passes != 1:
        raise _not_selectable(model, f"its head ran {passes} times in a forward pass")


class _Gather:
    """What is gathered now. One object for all batches and the hook reads it as a global: torch.compile takes what a
    module's hook holds for constant, and would compile the model anew for every number of selected positions."""

    def __init__(self) -> None:
        self.head: nn.Module | None = None
        self.index: Tensor | None = None
        self.labels: Tensor | None = None
        self.passes = 0
        self.refused: tuple[int, ...] | None = None


_GATHER = _Gather()


def _gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The hook of a head: the hidden states of the selection in place of all."""
    if module is not _GATHER.head or _GATHER.index is None or _GATHER.labels is None:
        return args
    _GATHER.passes += 1
    hidden, *rest = args
    # Compared with a tensor's shape and not with numbers, which would be compiled in.
    if hidden.shape[:2] != _GATHER.labels.shape:
        _GATHER.refused = tuple(hidden.shape)
        return args
    flat = hidden.reshape(-1, hidden.shape[-1])
    return (flat.index_select(0, _GATHER.index.to(flat.device)).unsqueeze(0), *rest)


def output_embedding(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits."""
    find = getattr(without_adapter(model), "get_output_embeddings", None)
    head: nn.Module | None = find() if find is not None else None
    if head is None:
        raise _not_selectable(model, "it names no output embedding")
    return head


def without_adapter(model: Any) -> nn.Module:
    """The base model inside a PEFT model, inside a copy of it that DDP has wrapped; a plain model as it is."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    base: nn.Module = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return base


def _not_selectable(model: nn.Module, why: str) -> ModelError:
    base = without_adapter(model)
    return ModelError(
        describe(
            type(base).__name__, why, "one pass of one output embedding over (rows, length, width)", "set logits: all"
        )
    )


def selected_losses(model: nn.Module, inputs: dict[str, Any], selection: Selection) -> Tensor:
    """``(N,)`` losses in nats, by a forward pass that computes logits only at the selection."""
    with selected_logits(model, selection), prompt.told_by(selection.labels):
        logits = model(**inputs).logits
    return token_losses(logits.squeeze(0), selection.target)


def dense_losses(model: nn.Module, inputs: dict[str, Any], selection: Selection) -> Tensor:
    """``(N,)`` losses in nats, by a forward pass that computes logits at every position."""
    with prompt.told_by(selection.labels):
        logits = model(**inputs).logits
    return token_losses(logits.flatten(0, 1)[selection.index], selection.target)


def token_losses(logits: Tensor, target: Tensor) -> Tensor:
    """``(N,)`` cross-entropies in nats, in float32 or better, of logits ``(N, vocabulary)``."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(wide, target.to(wide.device), reduction="none")


def per_row(losses: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """The sum of the losses of each row, and how many there are: two tensors of shape ``(rows,)``."""
    row = selection.row.to(losses.device)
    sums = losses.new_zeros(selection.rows).index_add(0, row, losses)
    counts = torch.bincount(row, minlength=selection.rows)
    return sums, counts
