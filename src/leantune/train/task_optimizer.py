"""What each task steps by: its own parameters, its own gradient norm, its own learning rate and schedule.

A task that no row of a step belongs to takes no step: its parameters have no gradient (not zeros, which would decay
Adam's moments and count a step), and its schedule stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

Named = dict[str, nn.Parameter]


def parameters_by_task(model: nn.Module, tasks: Iterable[str]) -> tuple[dict[str, Named], Named]:
    """The trained parameters of each task, and those that all of them train, by their names in the model.

    Args:
        model: a PEFT model with an adapter for each task.
        tasks: their names.
    """
    owners: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            for container in module.adapter_layer_names:
                for task, part in cast(nn.ModuleDict, getattr(module, container)).items():
                    owners |= {id(parameter): task for parameter in part.parameters()}
    found: dict[str, Named] = {task: {} for task in tasks}
    shared: Named = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = owners.get(id(parameter))
            (shared if owner is None else found[owner])[name] = parameter
    return found, shared


def parameter_groups(
    owned: Sequence[tuple[Named, float]], decayed: set[str], decay: float
) -> tuple[list[dict[str, Any]], list[int]]:
    """Optimizer groups, each of one owner, and the number of each group's owner.

    Args:
        owned: of each owner its parameters and its learning rate.
        decayed: names of the parameters that weight decay is for.
        decay: the weight decay.
    """
    groups, owners = [], []
    for number, (parameters, rate) in enumerate(owned):
        for names, own in ((parameters.keys() & decayed, decay), (parameters.keys() - decayed, 0.0)):
            chosen = [parameter for name, parameter in parameters.items() if name in names]
            if chosen:
                groups.append({"params": chosen, "lr": rate, "weight_decay": own})
                owners.append(number)
    return groups, owners


def clip_gradients(owned: Sequence[tuple[Named, float]], present: Iterable[int]) -> list[float | None]:
    """Scale the gradient of each owner that takes part down to its own largest norm.

    Args:
        owned: of each owner its parameters and its largest norm; 0 leaves the gradient as it is.
        present: numbers of the owners that take part in the step; the others lose whatever gradient they have.

    Returns:
        The norm of each owner before that; None where it takes no part.
    """
    taking = set(present)
    norms: list[float | None] = []
    for number, (parameters, largest) in enumerate(owned):
        if number not in taking:
            for parameter in parameters.values():
                parameter.grad = None
            norms.append(None)
            continue
        limit = largest if largest > 0 else float("inf")
        norms.append(float(nn.utils.clip_grad_norm_(parameters.values(), limit)))
    return norms


def schedule_shape(name: str, warmup: int, steps: int) -> Callable[[int], float]:
    """The share of the peak rate as a function of the steps taken, as a run of so many steps has it.

    Args:
        name: transformers' name of the schedule.
        warmup: steps in which the rate rises.
        steps: how many there will be.
    """
    alone = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    made: Any = get_scheduler(name, alone, num_warmup_steps=warmup, num_training_steps=max(steps, 1))
    return cast(Callable[[int], float], made.lr_lambdas[0])


class TaskSchedule(LRScheduler):
    """A learning rate for each group, by the steps that its owner has taken.

    Args:
        optimizer: its groups are those of :func:`parameter_groups`.
        owners: the owner of each group.
        shapes: of each owner the share of the peak rate after so many steps of its own.
        present: the numbers of the owners that took part in the step just taken.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        owners: Sequence[int],
        shapes: Sequence[Callable[[int], float]],
        present: Callable[[], Iterable[int]],
    ) -> None:
        self.owners = list(owners)
        self.shapes = list(shapes)
        self.present = present
        self.taken: list[int] = [0] * len(self.shapes)
        # The rate of each owner in the step just taken.
        self.used: dict[int, float] = {}
        self._begun = False
        super().__init__(optimizer)
        self._begun = True

    def step(self, epoch: int | None = None) -> None:
        """Count the step for those who took it, and set the rates of the next one."""
        if self._begun:
            self.used = {owner: float(rate) for owner, rate in zip(self.owners, self.get_last_lr(), strict=True)}
            for owner in self.present():
                self.taken[owner] += 1
        super().step(epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rates after the steps taken."""
        return [
            base * self.shapes[owner](self.taken[owner]) for base, owner in zip(self.base_lrs, self.owners, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Counts and rates; the shapes are made anew."""
        kept = ("taken", "last_epoch", "_step_count", "_last_lr", "base_lrs")
        return {name: getattr(self, name) for name in kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from these counts."""
        vars(self).update(state_dict)
