"""Which task each row of a batch belongs to, told once for all layers of a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from leantune.kernels.grouped_linear import RowGroups


def seeded(*parts: object) -> torch.Generator:
    """A generator on the CPU whose seed is a hash of the parts: the same in every process and order of calls."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class RowTasks(list[str]):
    """The task of each row, in the order of the batch; ``__base__`` is none.

    Attributes:
        step: what dropout is keyed by beside the task, or None for the global random state.
    """

    def __init__(self, names: Iterable[str], step: int | None = None) -> None:
        super().__init__(names)
        self.step = step
        self._groups: dict[tuple[tuple[str, ...], torch.device], RowGroups] = {}

    def groups(self, tasks: tuple[str, ...], device: torch.device) -> RowGroups:
        """The rows of each of ``tasks``, sorted; a layer without a task leaves its rows alone. Computed once."""
        found = self._groups.get((tasks, device))
        if found is None:
            number = {name: position for position, name in enumerate(tasks)}
            found = RowGroups.of([number.get(name) for name in self], len(tasks), device)
            self._groups[(tasks, device)] = found
        return found

    def dropped(self, x: Tensor, task: str, share: float, key: str) -> Tensor:
        """``x (rows, ..., width)`` with dropout on the rows of one task.

        With a step the mask depends on key, task and step alone: not on the rows of other tasks, nor on padding
        behind the task's own.
        """
        own = torch.tensor([row for row, name in enumerate(self) if name == task], device=x.device)
        # Positions first: what a longer neighbour pads comes after all that is drawn without it.
        shape = (*x.shape[1:-1], len(own), x.shape[-1])
        source = None if self.step is None else seeded("dropout", key, task, self.step)
        kept = torch.rand(shape, generator=source).movedim(-2, 0).to(x.device) >= share
        return x.index_copy(0, own, x[own] * kept / (1 - share))
