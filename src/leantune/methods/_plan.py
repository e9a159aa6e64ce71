"""What a method asks of the training loop beyond gradients of its own parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class TrainingPlan:
    """Everything by which a method steers training; the trainer asks every method for one.

    An empty plan means: AdamW over the trainable parameters, shuffled rows, the mean loss per token.

    Attributes:
        callbacks: ``transformers.TrainerCallback`` objects, added after the trainer's own.
        parameter_groups: ``(model, learning_rate, weight_decay) -> list of parameter groups`` for the optimizer.
        optimizer: ``(parameter groups, learning_rate, training_arguments) -> torch.optim.Optimizer``.
        sampler: ``(dataset, seed) -> torch.utils.data.Sampler`` of row indices.
        scheduler: ``(optimizer, total steps, training_arguments) -> LRScheduler``; replaces the run's schedule.
        clip: ``(max_norm) -> norm``; replaces clipping of the norm of all gradients together.
        before_forward: called with the extra columns before each training forward. What it sets stays until the next
            call: a checkpointed layer is run again in the backward.
        loss: ``(model, inputs, columns) -> scalar``; replaces the whole loss of a training forward. It is a mean in
            the method's own sense: an optimizer step takes the mean over its forward passes.
        after_optimizer_step: called with the global step (from 1) after each optimizer step.
        batch_columns: names of extra columns that the collator must carry into the batch.
        loss_reduction: ``(loss_sum, tokens, columns) -> scalar``, with ``loss_sum`` and ``tokens`` of shape
            ``(rows,)`` (nats, counts) and ``columns`` the extra batch columns; replaces the mean per token.
        needs_evaluation: why the method cannot do without rows to evaluate on; empty where it can.
        is_settled: ``() -> bool``, asked after training: whether the model still computes what it did after the last
            step. It does not where the end of training chooses among what was trained.
        is_over: ``(TrainerState) -> bool``: whether the method ends the training at this step, whatever steps are
            left. A run that goes on from a checkpoint asks it first.
        trained_at_once: the most parameters that a step trains, where it trains only some of those that are trainable.
        take_step_loss: called once, before training, with ``() -> float``: the loss of the newest optimizer step's
            batches by the model as it then stands, in evaluation mode and without gradients.
    """

    callbacks: list[Any] = field(default_factory=list)
    parameter_groups: Callable[[nn.Module, float, float], list[dict[str, Any]]] | None = None
    optimizer: Callable[..., Any] | None = None
    sampler: Callable[[Any, int], Any] | None = None
    scheduler: Callable[[Any, int, Any], Any] | None = None
    clip: Callable[[float], Tensor] | None = None
    before_forward: Callable[[dict[str, Any]], None] | None = None
    loss: Callable[[Any, dict[str, Any], dict[str, Any]], Tensor] | None = None
    after_optimizer_step: Callable[[int], None] | None = None
    batch_columns: tuple[str, ...] = ()
    loss_reduction: Callable[[Tensor, Tensor, dict[str, Any]], Tensor] | None = None
    needs_evaluation: str = ""
    is_settled: Callable[[], bool] | None = None
    is_over: Callable[[Any], bool] | None = None
    trained_at_once: int | None = None
    take_step_loss: Callable[[Callable[[], float]], None] | None = None
