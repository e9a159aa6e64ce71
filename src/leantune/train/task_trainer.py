r"""The training loop of several tasks: each one trains as it would alone, all of them in the same forward passes.

The loss of an optimizer step, over the tasks ``i`` that have rows in it::

    L = sum_i  (1 / n_i) sum_t l_t        t: the tokens of task i that carry loss (its rows, for a head), n_i of them

in all forward passes of the step together. Given the frozen part that they share, ``dL/dB_i`` is the gradient of task
``i`` alone; clipping, rate, schedule and optimizer state are its own (:mod:`leantune.train.task_optimizer`). So the
parameters after a run are those of one run a task on the same rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from leantune.core.errors import ConfigError, MethodError, describe
from leantune.methods import TrainingPlan
from leantune.methods._shared_projection import replacing_shared
from leantune.train.loss import IGNORED, Selection, dense_losses, selected_losses
from leantune.train.setup import SCHEDULES
from leantune.train.task_data import TASK, Task
from leantune.train.task_head import head_losses, rows_by_task, set_rows
from leantune.train.task_optimizer import (
    Named,
    TaskSchedule,
    clip_gradients,
    parameter_groups,
    parameters_by_task,
    schedule_shape,
)
from leantune.train.task_sampler import TaskSampler, steps_by_task, task_shares
from leantune.train.task_validation import validate_tasks
from leantune.train.trainer import LeanTrainer


def with_tasks(plan: TrainingPlan) -> TrainingPlan:
    """A method's plan with the column of the tasks.

    Raises:
        MethodError: the method steers what is each task's own.
    """
    for part in ("parameter_groups", "optimizer", "sampler", "scheduler", "clip", "loss", "loss_reduction"):
        if getattr(plan, part) is not None:
            got = f"the method brings its own {part.replace('_', ' ')}"
            raise MethodError(describe("tasks", got, "a method whose tasks train apart", "train one task"))
    return dataclasses.replace(plan, batch_columns=tuple(dict.fromkeys([*plan.batch_columns, TASK])))


class TaskTrainer(LeanTrainer):
    """A :class:`LeanTrainer` whose rows belong to several tasks, each with an adapter of its own on the model.

    Args:
        model: a PEFT model with an adapter for each task, by its name.
        tasks: in the order of their numbers in the column ``task_index`` of the rows.
        plan: what the method asks for.
        keywords: everything else :class:`LeanTrainer` takes.
    """

    def __init__(
        self, model: nn.Module, *, tasks: Sequence[Task], plan: TrainingPlan | None = None, **keywords: Any
    ) -> None:
        self.tasks = {task.name: task for task in tasks}
        self.names = list(self.tasks)
        self.owned, self.shared = parameters_by_task(model, self.names)
        self._group_owners: list[int] = []
        # Of the optimizer step being taken.
        self._counts = torch.zeros(len(self.names))
        self._losses = torch.zeros(len(self.names), dtype=torch.float64)
        self._norms: list[float | None] = []
        self._passes_begun = 0
        plan = dataclasses.replace(with_tasks(plan or TrainingPlan()), scheduler=self._schedule)
        kind = "causal-lm" if not tasks[0].has_head else "classification"
        super().__init__(model=model, plan=plan, **{**keywords, "task": kind})
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            got = f"{max(self.args.world_size, self.args.n_gpu)} processes or devices"
            do = "train on one, or each task in a run of its own"
            raise ConfigError(describe("tasks", got, "one: a task may be absent from some of them", do))
        self._shared_clip = self.args.max_grad_norm
        # The trainer clips at all when any part does.
        self.args.max_grad_norm = max(self._clips())

    def _clips(self) -> list[float]:
        """The largest gradient norm of each task, and that of what they share."""
        return [task.config.clip for task in self.tasks.values()] + [self._shared_clip] * bool(self.shared)

    @property
    def _parts(self) -> list[Named]:
        """The trained parameters of each task, and what they share as one more part."""
        return [*self.owned.values(), *([self.shared] if self.shared else [])]

    def present(self) -> list[int]:
        """The numbers of the parts that take part in the optimizer step: tasks with rows in it, and what is shared."""
        found = [number for number, items in enumerate(self._counts.tolist()) if items > 0]
        return [*found, *([len(self.names)] if self.shared else [])]

    # Rows

    def shares(self) -> list[float]:
        """The share of each task among the rows that are drawn."""
        config = next(iter(self.tasks.values())).config
        counts = [len(task.train) for task in self.tasks.values()]
        return task_shares(counts, config.task_sampling, config.task_temperature)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        numbers, lengths = [example[TASK] for example in rows], [len(example["input_ids"]) for example in rows]
        size, passes = self.args.train_batch_size, self.args.gradient_accumulation_steps
        shares = dict(zip(self.names, self.shares(), strict=True))
        return TaskSampler(numbers, shares, self.args.seed, lengths=lengths, rows_a_pass=size, passes=passes)

    def steps_by_task(self, steps: int) -> list[int]:
        """In how many of a run's optimizer steps each task takes part."""
        rows: Any = self.train_dataset
        numbers = [example[TASK] for example in rows]
        rows_a_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return steps_by_task(self._get_train_sampler(), numbers, len(self.names), rows_a_step, steps)

    # The loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """``(tasks,)`` what each task's loss is a mean over, in all forward passes of a step: tokens, or rows."""
        if not batch_samples:
            return None
        found = torch.zeros(len(self.names), dtype=torch.long)
        for batch in batch_samples:
            found += self._count(batch["labels"].to("cpu"), batch[TASK].to("cpu"))
        self._counts, self._passes_begun = found, 0
        self._losses = torch.zeros(len(self.names), dtype=torch.float64)
        return found.clamp(min=1).to(device)

    def _count(self, labels: Tensor, numbers: Tensor) -> Tensor:
        rows = (labels[:, 1:] != IGNORED).sum(1) if labels.dim() > 1 else torch.ones_like(numbers)
        return torch.zeros(len(self.names), dtype=torch.long, device=rows.device).index_add(0, numbers, rows)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one forward pass, as its share of the loss of the step: each task's own mean, summed."""
        inputs = dict(inputs)
        columns = {name: inputs.pop(name) for name in self.plan.batch_columns if name in inputs}
        numbers, labels = columns[TASK], inputs.pop("labels")
        set_rows(model, [self.names[number] for number in numbers.tolist()], self._step_key(model))
        if model.training and self.plan.before_forward is not None:
            self.plan.before_forward(columns)
        losses, owner, outputs = self._row_losses(model, inputs, labels, numbers)
        items = num_items_in_batch if isinstance(num_items_in_batch, Tensor) else self._count(labels, numbers).clamp(1)
        each = losses.new_zeros(len(self.names)).index_add(0, owner, losses) / items.to(losses.device)
        loss = each.sum()
        if model.training:
            self._check_finite("the loss", loss.detach())
            self._losses += each.detach().to("cpu", torch.float64)
        return (loss, outputs if outputs is not None else {"loss": loss}) if return_outputs else loss

    def _step_key(self, model: nn.Module) -> int | None:
        """What dropout is keyed by: the number of the forward pass in the run; nothing outside of training."""
        if not model.training:
            return None
        self._passes_begun += 1
        return self.state.global_step * self.args.gradient_accumulation_steps + self._passes_begun - 1

    def _row_losses(
        self, model: nn.Module, inputs: dict[str, Any], labels: Tensor, numbers: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """The losses of a batch, the number of each one's task, and the model's outputs where they are kept."""
        if self.task == "causal-lm":
            selection = Selection.of(labels)
            compute = selected_losses if self.logits == "selected" else dense_losses
            losses = compute(model, inputs, selection)
            return losses, numbers[selection.row].to(losses.device), None
        outputs = model(**inputs)
        names = [self.names[number] for number in numbers.tolist()]
        rows = rows_by_task(names, outputs.logits.device)
        losses = head_losses(outputs.logits, labels.to(outputs.logits.device), rows, self.tasks)
        return losses, numbers.to(losses.device), outputs

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        """As :meth:`LeanTrainer.train`; the model's forward is that of its active adapter again afterwards."""
        try:
            return super().train(*arguments, **keywords)
        finally:
            set_rows(cast(nn.Module, self.model), None)

    # The step

    def _parameter_groups(self, model: nn.Module, decay: float) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(model)) if decay else set()
        rates = [task.config.learning_rate for task in self.tasks.values()]
        owned = list(zip(self._parts, [*rates, self.args.learning_rate], strict=False))
        groups, self._group_owners = parameter_groups(owned, decayed, decay)
        return groups

    def _schedule(self, optimizer: torch.optim.Optimizer, steps: int, arguments: Any) -> TaskSchedule:
        """The schedule of each task, over the steps that it will take part in."""
        shapes = []
        for task, own in zip(self.tasks.values(), self.steps_by_task(steps), strict=True):
            warmup = math.ceil(task.config.warmup_ratio * own)
            shapes.append(schedule_shape(SCHEDULES[task.config.schedule], warmup, own))
        if self.shared:
            name = str(arguments.lr_scheduler_type.value)
            shapes.append(schedule_shape(name, arguments.get_warmup_steps(steps), steps))
        return TaskSchedule(optimizer, self._group_owners, shapes, self.present)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The norm of all gradients together, after each task's has been clipped by itself."""
        del model
        self._norms = clip_gradients(list(zip(self._parts, self._clips(), strict=True)), self.present())
        return torch.tensor(math.sqrt(sum(norm**2 for norm in self._norms if norm is not None)))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            # Nothing is clipped; absent tasks lose their gradients all the same.
            unclipped = [(part, 0.0) for part in self._parts]
            self._norms = clip_gradients(unclipped, self.present())
            grad_norm = torch.tensor(math.sqrt(sum(norm**2 for norm in self._norms if norm is not None)))
        return super()._get_grad_norm(model, grad_norm)

    # Figures

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """As the Trainer's; the line of a step tells each task's loss, gradient norm and rate too."""
        if "loss" in logs and "learning_rate" in logs:
            schedule = cast(TaskSchedule, self.lr_scheduler)
            for number in set(self.present()) & set(range(len(self.names))):
                name, norm = self.names[number], self._norms[number]
                logs[f"loss/{name}"] = float(self._losses[number])
                logs[f"grad_norm/{name}"] = float("nan") if norm is None else norm
                logs[f"learning_rate/{name}"] = schedule.used[number]
        super().log(logs, *arguments, **keywords)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure every task that has rows for it, by its own metrics; no random number is drawn."""
        del ignore_keys
        rows: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
        with torch.random.fork_rng(devices=[]):
            metrics = validate_tasks(self, rows, metric_key_prefix)
        set_rows(cast(nn.Module, self.model), None)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As :meth:`LeanTrainer._load_from_checkpoint`; what is shared comes back with the tasks that share it."""
        with replacing_shared():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
