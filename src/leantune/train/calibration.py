"""A method's start from data, within a run: which rows, through which batches and loss, and what is told of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from leantune.data.packing import DOCUMENTS
from leantune.methods._initialization import initialize
from leantune.train.config import RunConfig
from leantune.train.trainer import LeanTrainer

LEAST_ROWS = 32
MOST_ROWS = 512


def calibrate(config: RunConfig, trainer: LeanTrainer, rows: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """Compute the start that the run's method takes from data, if it takes one.

    Rows are drawn by the run's seed, put into batches by its collator and measured with its loss; the random state
    that training begins from is not touched.

    Args:
        config: the settings.
        trainer: of the run, before it trains.
        rows: the training rows as the collator takes them, not packed; of a stream, which cannot be drawn from, the
            first ones are taken, out of their packs.
        say: shows a line.

    Returns:
        ``{"calibration": {rows, tokens, batches, passes, time_s}}`` for run.json; nothing where no data is asked for.
    """
    model: Any = trainer.model
    configs = getattr(model, "peft_config", {})
    if not any(config.chosen_method.needs_batches(each) for each in configs.values()):
        return {}
    began = time.perf_counter()
    drawn = draw_rows(rows, config.calibration_share, config.seed)
    say(f"calibrating on {len(drawn):,} rows")
    groups = [drawn[first : first + config.batch_size] for first in range(0, len(drawn), config.batch_size)]
    batches = [trainer.data_collator(group) for group in groups]
    items = trainer._get_num_items_in_batch(batches, trainer.args.device)

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        found: Tensor = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
        return found

    told = initialize(model, batches, step_size=config.learning_rate, loss=loss)
    facts = {name: told[name] for name in ("rows", "tokens", "batches", "passes")}
    seconds = time.perf_counter() - began
    passes = f"{facts['passes']:,} pass" + ("es" if facts["passes"] > 1 else "")
    say(f"calibrated in {seconds:.1f} s ({facts['tokens']:,} tokens, {passes})")
    return {"calibration": {**facts, "time_s": seconds}}


def draw_rows(rows: Any, share: float, seed: int) -> list[Any]:
    """``share`` of the rows, drawn by the seed: at least 32, at most 512, and no more than there are."""
    if not hasattr(rows, "__len__"):
        return list(islice((row for each in rows for row in each.get(DOCUMENTS, [each])), LEAST_ROWS))
    total = len(rows)
    count = min(max(round(share * total), LEAST_ROWS), MOST_ROWS, total)
    # A generator of its own. Longer rows first: where memory does not suffice, it is known at once.
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return sorted((rows[number] for number in order), key=lambda row: -len(row.get("input_ids", ())))
