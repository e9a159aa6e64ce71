"""The trained slice of one adapter in one linear layer: its delta, and the entries that it stands for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leantune.core.errors import AdapterError, describe
from leantune.kernels.partial_linear import Axis
from leantune.methods._selection import Slice


class SliceDelta(nn.Module):
    """One adapter's trained slice, the entries it stands for, and where these stand in a permuted base."""

    index: Tensor
    standing: Tensor | None
    position: Tensor | None

    def __init__(self, shape: tuple[int, int], chosen: Slice) -> None:
        super().__init__()
        self.axis: Axis = chosen.axis
        self.weight = nn.Parameter(torch.zeros(shape))
        self.place(chosen)

    def place(self, chosen: Slice) -> None:
        """Stand for these entries, as many as before."""
        self.waits = chosen.provisional
        # Beside the entries it stood for; at first the entries are where they were made, and follow the base then.
        device = self.index.device if "index" in self._buffers else chosen.index.device
        # A copy: adapters with one choice share no buffer.
        self.register_buffer("index", chosen.index.to(device, copy=True))
        # The checkpoint's layout is what a file holds; positions belong to this process.
        standing = None if chosen.standing is None else chosen.standing.to(device)
        self.register_buffer("standing", standing, persistent=False)
        self._locate()

    def _locate(self) -> None:
        """Find where the entries stand in the base: as they are numbered, in one run, or here and there."""
        position = None if self.standing is None else self.standing[self.index.to(self.standing.device)]
        self.run: slice | None = None
        if position is not None and position.numel():
            first, end = int(position[0]), int(position[0]) + position.numel()
            if torch.equal(position, torch.arange(first, end, device=position.device)):
                self.run, position = slice(first, end), None
        self.register_buffer("position", position, persistent=False)

    @property
    def entries(self) -> Tensor | slice:
        """The chosen entries as they stand in the base now."""
        if self.run is not None:
            return self.run
        return self.index if self.position is None else self.position

    def _resize(self, count: int) -> None:
        if count == self.index.numel():
            return
        shape = (self.weight.shape[0], count) if self.axis == "in" else (count, self.weight.shape[1])
        self.weight = nn.Parameter(self.weight.new_zeros(shape), requires_grad=self.weight.requires_grad)
        self.index = self.index.new_zeros(count)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        stored = state_dict.get(prefix + "index")
        # The file decides what was trained; the config's choice may have been drawn otherwise by another version.
        if stored is not None:
            self._require_known(prefix + "index", stored)
            self._resize(stored.numel())
        self.waits = self.waits and stored is None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._locate()

    def _require_known(self, name: str, stored: Tensor) -> None:
        """Positions are looked up by entry, where a wrong one would become another entry's."""
        if self.standing is None or not stored.numel():
            return
        low, high, last = int(stored.min()), int(stored.max()), self.standing.numel() - 1
        if low < 0 or high > last:
            raise AdapterError(describe(name, f"{low} to {high}", f"0 to {last}", "save the adapter again"))
