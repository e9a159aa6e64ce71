"""The callbacks a method needs, for LeanTrainer and for people with a Trainer of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from leantune.data import MaskedTokens
from leantune.methods import TrainingPlan, of_config
from leantune.methods._registry import METHOD_CONFIG


class _AfterOptimizerStep(TrainerCallback):
    """Calls a plan's ``after_optimizer_step`` with the number of the step just taken."""

    def __init__(self, call: Callable[[int], None]) -> None:
        self.call = call

    @override
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        # The Trainer counts the step only after this event.
        self.call(state.global_step + 1)


class MaskingEpoch(TrainerCallback):
    """Tells a data set of masked texts which epoch begins, in every process and after a resume alike.

    Args:
        dataset: its ``set_epoch`` chooses the tokens to hide.
    """

    def __init__(self, dataset: MaskedTokens) -> None:
        self.dataset = dataset

    @override
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """An epoch begins, or goes on where a checkpoint left it."""
        self.dataset.set_epoch(int(state.epoch or 0))


def plan_of(model: nn.Module) -> TrainingPlan:
    """The training plan of the method of a model's active adapter, or of the method that trains the model itself."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        own = getattr(model, METHOD_CONFIG, None)
        return TrainingPlan() if own is None else of_config(own).plan(model)
    adapter = getattr(model, "active_adapter", None)
    config = configs[adapter] if isinstance(adapter, str) and adapter in configs else next(iter(configs.values()))
    return of_config(config).plan(model)


def plan_callbacks(plan: TrainingPlan) -> list[TrainerCallback]:
    """A plan's callbacks, its ``after_optimizer_step`` among them."""
    after = [_AfterOptimizerStep(plan.after_optimizer_step)] if plan.after_optimizer_step is not None else []
    return [*plan.callbacks, *after]


def callbacks(model: nn.Module) -> list[TrainerCallback]:
    """What to add to a Trainer of your own so that the model's method trains as it should.

    Example:
        ``Trainer(model, args, callbacks=leantune.callbacks(model), ...)``

    Args:
        model: a PEFT model with one of Leantune's methods.
    """
    return plan_callbacks(plan_of(model))
