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
from leantune.train import distributed
from leantune.train.config import RunConfig
from leantune.train.record import parameter_counts
from leantune.train.trainer import LeanTrainer

LEAST_ROWS = 32
MOST_ROWS = 512


def calibrate(config: RunConfig, trainer: LeanTrainer, rows: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """Compute the start that the run's method takes from data, if it takes one.

    Rows are drawn by the run's seed, put into batches by its collator and measured with its loss, each process taking
    its share of them; the random state that training begins from is not touched.

    Args:
        config: the settings, resolved.
        trainer: of the run, before it trains.
        rows: the training rows as the collator takes them, not packed; of a stream, which cannot be drawn from, the
            first ones are taken, out of their packs.
        say: shows a line.

    Returns:
        ``{"calibration": {rows, tokens, batches, passes, time_s, epoch_share, ...}}`` for run.json, and how many
        parameters train by then; nothing where no data is asked for.
    """
    model: Any = trainer.model
    configs = getattr(model, "peft_config", {})
    if not any(config.chosen_method.needs_batches(each) for each in configs.values()):
        return {}
    began = time.perf_counter()
    share = config.calibration_share or config.chosen_method.calibration_share
    drawn = draw_rows(rows, share, config.seed)
    say(f"calibrating on {len(drawn):,} rows")
    world, own = distributed.processes(), drawn
    if world > 1 and len(drawn) >= world:
        own = drawn[trainer.args.process_index :: world]
    groups = [own[first : first + config.batch_size] for first in range(0, len(own), config.batch_size)]
    batches = [trainer.data_collator(group) for group in groups]
    items = trainer._get_num_items_in_batch(batches, trainer.args.device)

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        found: Tensor = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
        # Made for gradients that are averaged over the processes; a calibration's are added up.
        return found / world

    told = initialize(model, batches, first_rate(trainer), loss, optimizer=config.optimizer)
    tokens = distributed.sums([told["tokens"]], trainer.args.device)[0]
    facts = {key: value for key, value in told.items() if key not in ("adapters", "batches", "rows", "tokens")}
    facts = {"rows": len(drawn), "tokens": tokens, "batches": len(batches), **facts}
    if hasattr(rows, "__len__"):
        facts["epoch_share"] = facts["passes"] * len(drawn) / len(rows)
    facts["time_s"] = time.perf_counter() - began
    say(_account(facts))
    return {"calibration": facts, **parameter_counts(model)}


def _account(facts: dict[str, Any]) -> str:
    """What a start took, in a line."""
    passes = f"{facts['passes']:,} pass" + ("es" if facts["passes"] > 1 else "")
    parts = [f"{facts['tokens']:,} tokens", passes]
    if "epoch_share" in facts:
        parts.append(f"as many rows as {facts['epoch_share']:.2%} of an epoch")
    if "step_size" in facts:
        parts.append(f"first step of {facts['optimizer']} at {facts['step_size']:.3g}")
    if "captured" in facts:
        parts.append(f"{facts['captured']:.1%} of it captured")
    if "overlap" in facts:
        agreement = f"subspaces agree to {facts['overlap']:.2f} in {facts['overlap_module']}"
        parts.append(f"{facts['sketched']} of {facts['layers']} layers sketched: {agreement}")
    elif facts.get("sketched") == 0:
        parts.append("no layer sketched: no gradient is larger than a sketch this wide")
    return f"calibrated in {facts['time_s']:.1f} s ({', '.join(parts)})"


def first_rate(trainer: LeanTrainer) -> float:
    """The learning rate of the run's first step that is above zero: a warm-up begins at zero.

    That of the named schedule over the run's own number of steps; a plan's own schedule counts as its peak.
    """
    peak = trainer.args.learning_rate
    if trainer.plan.scheduler is not None:
        return peak
    held, trainer.lr_scheduler = trainer.lr_scheduler, None
    optimizer = torch.optim.SGD([torch.zeros(())], lr=peak)
    try:
        with torch.random.fork_rng(devices=[]):
            steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
        schedule = trainer.create_scheduler(steps, optimizer)
        for _ in range(steps):
            rate = float(optimizer.param_groups[0]["lr"])
            if rate > 0:
                return rate
            optimizer.step()
            schedule.step()
    finally:
        trainer.lr_scheduler = held
        trainer._created_lr_scheduler = False
    return peak


def time_share(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The record's ``calibration`` with ``epoch_time_share``, what it took of the time of a training epoch."""
    facts, epochs = summary.get("calibration"), summary.get("epochs")
    if not facts or not epochs:
        return {}
    return {"calibration": {**facts, "epoch_time_share": facts["time_s"] / (summary["train_time_s"] / epochs)}}


def draw_rows(rows: Any, share: float, seed: int) -> list[Any]:
    """``share`` of the rows, drawn by the seed: at least 32, at most 512, and no more than there are."""
    if not hasattr(rows, "__len__"):
        return list(islice((row for each in rows for row in each.get(DOCUMENTS, [each])), LEAST_ROWS))
    total = len(rows)
    count = min(max(round(share * total), LEAST_ROWS), MOST_ROWS, total)
    # A generator of its own. Longer rows first: where memory does not suffice, it is known at once.
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return sorted((rows[number] for number in order), key=lambda row: -len(row.get("input_ids", ())))
