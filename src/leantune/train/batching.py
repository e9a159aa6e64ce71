"""How the rows of a run become batches, and how much of these is padding: plain, by length, packed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from leantune.data import Encoded, Packs, Row, RowStream
from leantune.data.packing import padding_share
from leantune.train.config import RunConfig
from leantune.train.rows import streamed
from leantune.train.sampler import LengthSampler

# What is not in use is worked out on so many rows at most: enough for the share, which is all that is asked of it.
ROWS_COUNTED = 20_000


def stream(config: RunConfig, encode: Callable[[list[Row]], Encoded]) -> RowStream:
    """The training file of a run as a stream.

    Args:
        config: file, order, packing.
        encode: rows to examples.
    """
    return RowStream(
        partial(streamed, config),
        encode,
        shuffle_buffer=config.shuffle_buffer,
        seed=config.seed,
        pack_length=config.max_length if config.packing else None,
        source=str(config.data),
    )


def stream_facts(dataset: Any) -> dict[str, int] | None:
    """What a stream has read so far, a few rows more than were trained on; None for rows that are held."""
    if not isinstance(dataset, RowStream):
        return None
    names = ("rows_read", "passes", "truncated", "tokens_cut")
    return {name: getattr(dataset, name) for name in names}


def batching(config: RunConfig, examples: Encoded | RowStream, packs: Packs | None) -> dict[str, Any]:
    """Expected padding of the batches of an epoch, for each way to make them.

    Args:
        config: batch size, capacity, seed, and which way is in use.
        examples: the training rows.
        packs: their packs, where they are packed.

    Returns:
        ``way`` (``"plain"``, ``"grouped"``, ``"packed"`` or, for what is not counted beforehand, ``"streamed"``);
        ``padding_share`` of each way; ``rows_counted`` for the ways not in use; ``packs``, ``pack_length`` and
        ``pack_filled`` (None without packing).
    """
    found: dict[str, Any] = {"packs": None, "pack_length": config.max_length if config.packing else None}
    found["pack_filled"] = None
    if isinstance(examples, RowStream):
        return {**found, "way": "streamed", "padding_share": {}, "rows_counted": 0}
    way = "packed" if packs is not None else "grouped" if config.group_by_length else "plain"
    some = examples.lengths
    if len(some) > ROWS_COUNTED:
        some = [some[row] for row in _order(len(some), config.seed)[:ROWS_COUNTED]]
    shares = {each: _share(config, examples.lengths if each == way else some, each) for each in ("plain", "grouped")}
    if config.task == "causal-lm":
        lengths = (packs or Packs.of([{"input_ids": range(n)} for n in some], config.max_length, config.seed)).lengths
        shares["packed"] = _share(config, lengths, "plain")
    if packs is not None:
        found |= {"packs": len(packs), "pack_filled": packs.filled}
    return {**found, "way": way, "padding_share": shares, "rows_counted": len(some)}


def _share(config: RunConfig, lengths: list[int], way: str) -> float:
    """Padding of the first epoch: of any seeded one, since the share hardly depends on it."""
    if way == "grouped":
        order = list(LengthSampler(lengths, config.batch_size, config.seed))
    else:
        order = _order(len(lengths), config.seed)
    size = config.batch_size
    return padding_share(lengths, [order[start : start + size] for start in range(0, len(order), size)])


def _order(rows: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def batch_line(facts: dict[str, Any], rows: int | None) -> str:
    """What a person is told of the batches before the first step.

    Args:
        facts: as :func:`batching` gives them.
        rows: training rows, None where they are not counted.
    """
    if facts["way"] == "streamed":
        return "batches read while training" + (", packed on the way" if facts["pack_length"] else "")
    shares = {name: f"{share:.0%}" for name, share in facts["padding_share"].items()}
    if facts["way"] == "packed":
        return (
            f"packing {rows:,} rows in {facts['packs']:,} sequences of {facts['pack_length']:,} tokens, "
            f"{facts['pack_filled']:.0%} filled; padding {shares['plain']} -> {shares['packed']}"
        )
    if facts["way"] == "tasks":
        return f"batches of rows of all tasks; padding {shares['tasks']}"
    others = {"plain": "plain", "grouped": "grouped by length", "packed": "packed"}
    rest = ", ".join(f"{others[name]} {share}" for name, share in shares.items() if name != facts["way"])
    return f"batches padding {shares[facts['way']]} ({rest})"
