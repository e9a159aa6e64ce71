"""The dry run: everything a run does before its first step, and what its steps would be. Nothing trains or is written.

It prepares exactly as a run does (:func:`leantune.train.setup.prepare`), so it meets the same errors, and the numbers
come from the trainer that would train, not from a copy of its arithmetic.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import nn

from leantune.core.errors import RunError, describe
from leantune.methods._initialization import start_from_file
from leantune.train import summary as summaries
from leantune.train import task_result
from leantune.train.config import RunConfig
from leantune.train.folder import ADAPTER, CHECKPOINTS, CONFIG, MODEL, PICTURE
from leantune.train.meter import Meter
from leantune.train.record import METRICS, RECORD, plain
from leantune.train.setup import Prepared, prepare
from leantune.train.task_trainer import TaskTrainer
from leantune.train.tracker import check_trackers
from leantune.train.trainer import LeanTrainer

# Batches put together to count padding; the share hardly moves after so many.
BATCHES_COUNTED = 5000
# AdamW keeps a running mean of the gradient and one of its square.
_OPTIMIZER_COPIES = 2


def dry_run(config: RunConfig) -> dict[str, Any]:
    """What a run would do, JSON-serialisable.

    Args:
        config: the settings.

    Returns:
        ``base``, ``method``, ``parameters`` (trained, at_once, total, and ``groups``: parameters of one name, shape and
        dtype over all blocks), ``data`` and ``eval_data``, ``steps`` (batches, steps, epochs; tokens and padding share
        of the first epoch), ``learning_rate`` (peak, warm-up, the rate at some steps), ``bytes`` (of what trains, its
        gradients, the optimizer), ``writes`` (each file or folder of the run folder), and ``config``, all of it.

    Raises:
        LeantuneError: whatever would stop the run before its first step.
    """
    config = config.resolved()
    _check_writable(Path(config.out))
    check_trackers(config.report_to)
    # A tracker may write as soon as a trainer has it, so this one gets none.
    with tempfile.TemporaryDirectory(prefix="leantune-dry-run-") as scratch:
        prepared = prepare(config.model_copy(update={"report_to": []}), checkpoints=Path(scratch))
        known = summaries.before(config, prepared.base, prepared.model, prepared.examples, prepared.trainer.plan)
        known |= task_result.before(prepared) if prepared.tasks else {}
        steps = _steps(prepared.trainer)
        trained = [each for each in prepared.model.parameters() if each.requires_grad]
        size = sum(each.numel() * each.element_size() for each in trained)
        at_once = math.ceil(size * known["trained_at_once"] / max(known["trainable_parameters"], 1))
        found = {
            "base": known["base"],
            "method": {"name": known["method"]["name"], "title": known["method"]["title"], "config": config_of(known)},
            "parameters": {
                "trained": known["trainable_parameters"],
                "at_once": known["trained_at_once"],
                "total": known["total_parameters"],
                "groups": parameter_groups(prepared.model),
            },
            **({name: known[name] for name in ("tasks", "task_parameters")} if prepared.tasks else {}),
            "data": known["data"],
            "eval_data": known["eval_data"],
            "steps": steps,
            "learning_rate": _learning_rate(config, prepared.trainer, steps["steps"]),
            "bytes": {"trained": size, "gradients": at_once, "optimizer": _OPTIMIZER_COPIES * at_once},
            "device": str(prepared.trainer.args.device),
            "writes": _writes(config, prepared, at_once, steps["steps"]),
            "config": known["config"],
        }
    return {name: plain(value) for name, value in found.items()}


def config_of(summary: dict[str, Any]) -> dict[str, Any]:
    """The options of the run's method as its record has them, empty ones and PEFT's bookkeeping left out."""
    from leantune.methods import get
    from leantune.train.option import user_options

    known = user_options(get(summary["method"]["name"]).config)
    options = summary["method"]["config"].items()
    return {name: value for name, value in options if name in known and value not in (None, {}, [])}


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """What trains, with parameters that differ in a block's or expert's number alone as one group.

    Returns:
        Records of ``name`` (numbers as ``*``), ``count``, ``shape``, ``dtype``, ``each`` and ``parameters``, in the
        order of the model.
    """
    is_wrapped = hasattr(model, "peft_config")
    groups: dict[tuple[str, tuple[int, ...], str], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_wrapped:
            for adapter in model.peft_config:  # type: ignore[union-attr]
                name = re.sub(rf"\.{re.escape(adapter)}(?=\.|$)", "", name)
            name = name.removeprefix("base_model.model.")
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", name).removesuffix(".weight")
        shape, dtype = tuple(parameter.shape), str(parameter.dtype).removeprefix("torch.")
        group = groups.setdefault(
            (name, shape, dtype),
            {
                "name": name,
                "count": 0,
                "shape": list(shape),
                "dtype": dtype,
                "each": parameter.numel(),
                "parameters": 0,
            },
        )
        group["count"] += 1
        group["parameters"] += parameter.numel()
    return list(groups.values())


def _steps(trainer: LeanTrainer) -> dict[str, Any]:
    """Batches, steps and epochs as the trainer counts them, and its first epoch put together batch by batch."""
    if trainer.task == "image-classification":
        # An image counts as one token whatever is on it, and reading it is most of the work.
        trainer.data_collator = _without_images
    loader = trainer.get_train_dataloader()
    arguments = trainer.args
    epochs, an_epoch, _, _, rows_a_step, batches, steps = trainer.set_initial_training_values(arguments, loader)
    used = steps * arguments.gradient_accumulation_steps
    wanted = min(used, batches if batches is not None else used)
    meter = Meter()
    counted = 0
    for batch in islice(loader, min(wanted, BATCHES_COUNTED)):
        meter.add(batch)
        counted += 1
    return {
        "steps": steps,
        "steps_an_epoch": an_epoch,
        "epochs": steps / an_epoch if an_epoch else epochs,
        "batches_an_epoch": batches,
        "rows_a_step": rows_a_step,
        "counted_batches": counted,
        "counted_all_of_first_epoch": counted == wanted,
        "rows": meter.rows,
        "tokens": meter.tokens,
        "loss_tokens": meter.loss_tokens,
        "computed_positions": meter.cells,
        "padding_share": meter.padding,
    }


def _without_images(examples: list[dict[str, Any]]) -> dict[str, Any]:
    return {"labels": torch.tensor([example["labels"] for example in examples])}


def _learning_rate(config: RunConfig, trainer: LeanTrainer, steps: int) -> dict[str, Any]:
    """The peak, the warm-up and the rate at a few steps, of the optimizer and schedule that the run would use."""
    trainer.create_optimizer_and_scheduler(num_training_steps=steps)
    warmup = trainer.args.get_warmup_steps(steps)
    scheduler: Any = trainer.lr_scheduler
    shapes = getattr(scheduler, "lr_lambdas", None)
    points = []
    if shapes is not None:
        rates = list(zip(scheduler.base_lrs, shapes, strict=True))
        at = sorted({0, warmup, (warmup + steps) // 2, steps - 1} & set(range(steps)))
        points = [{"step": step + 1, "rate": max(base * shape(step) for base, shape in rates)} for step in at]
    return {
        "peak": config.learning_rate,
        "is_default": config.lr == config.chosen_method.default_learning_rate,
        "schedule": config.schedule,
        "warmup_steps": warmup,
        "points": points,
        "optimizer": type(trainer.optimizer).__name__,
        "weight_decay": config.weight_decay,
        "clip": config.clip,
        **_rates_by_task(trainer, steps),
    }


def _rates_by_task(trainer: LeanTrainer, steps: int) -> dict[str, Any]:
    """Of several tasks each one's peak rate, course, and the steps it takes part in; nothing of one."""
    if not isinstance(trainer, TaskTrainer):
        return {}
    facts = {}
    for (name, task), own in zip(trainer.tasks.items(), trainer.steps_by_task(steps), strict=True):
        config = task.config
        warmup = math.ceil(config.warmup_ratio * own)
        facts[name] = {"peak": config.learning_rate, "schedule": config.schedule, "warmup_steps": warmup, "steps": own}
    return {"tasks": facts}


def _writes(config: RunConfig, prepared: Prepared, trained_bytes: int, steps: int) -> list[dict[str, Any]]:
    """Each file and folder of the run folder; sizes of the large ones, of tensors alone."""
    folder = Path(config.out)
    if config.chosen_method.is_adapter:
        result, size = ADAPTER, 0
        for name in prepared.model.peft_config:
            with start_from_file():
                state = get_peft_model_state_dict(prepared.model, adapter_name=name, save_embedding_layers=False)
            size += sum(each.numel() * each.element_size() for each in state.values())
    else:
        result = MODEL
        size = sum(each.numel() * each.element_size() for each in prepared.model.parameters())
    written: list[dict[str, Any]] = [
        {"path": folder / CONFIG, "what": "these settings"},
        {"path": folder / METRICS, "what": f"a line for each of {steps:,} steps"},
        {"path": folder / RECORD, "what": "versions, hashes, times, evaluation"},
        {"path": folder / PICTURE, "what": "the loss curve"},
        {"path": folder / result, "what": _what(prepared), "bytes": size},
    ]
    count = min(-(-steps // config.save_steps), config.keep_checkpoints) if config.save_steps else 0
    if count:
        each = size + _OPTIMIZER_COPIES * trained_bytes
        what = f"one every {config.save_steps:,} steps and at the end, {count} kept"
        written.append({"path": folder / CHECKPOINTS, "what": what, "bytes": count * each})
    return [{**entry, "path": entry["path"].as_posix()} for entry in written]


def _what(prepared: Prepared) -> str:
    if prepared.tasks:
        return f"a folder for each of {len(prepared.tasks)} tasks, with tokenizer and model card"
    return "the result, with tokenizer and model card"


def _check_writable(folder: Path) -> None:
    """A run would fail at its very first file."""
    nearest = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    if not os.access(nearest, os.W_OK):
        raise RunError(describe(str(folder), f"{nearest} cannot be written", "a folder of yours", "choose another out"))
