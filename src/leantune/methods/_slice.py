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
        self.run = chosen.position if isinstance(chosen.position, slice) else None
        gathered = chosen.position.to(device) if isinstance(chosen.position, Tensor) else None
        self.register_buffer("position", gathered, persistent=False)

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
        if stored is not None and not torch.equal(stored.to(self.index.device), self.index):
            # The file decides what was trained; the config's choice may have been drawn otherwise by another version.
            if self.run is not None or self.position is not None:
                raise AdapterError(
                    describe(
                        prefix + "index",
                        "other entries than the base was permuted for",
                        "the choice this adapter was trained with",
                        "load it with permute=False",
                    )
                )
            self._resize(stored.numel())
        self.waits = self.waits and stored is None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
