"""Single entries of a weight: how many train, which ones, and one adapter's trained values at them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leantune.core.errors import AdapterError, describe
from leantune.kernels.sparse_linear import index_dtype
from leantune.methods._selection import seeded


def count_entries(out: int, width: int, ratio: float, match_lora_rank: int | None) -> int:
    """How many entries of an ``(out, width)`` weight train: the share, or what LoRA of that rank would train."""
    wanted = ratio * out * width if match_lora_rank is None else match_lora_rank * (out + width)
    return max(1, min(round(wanted), out * width))


def random_entries(total: int, count: int, *words: object) -> Tensor:
    """``count`` of ``total`` flat positions, each set equally likely, ascending; seeded by the words.

    Memory follows the smaller of ``count`` and what is left out, never ``total`` alone: drawn with repetition until
    enough differ. All sets of the size that came out are then equally likely, and so are those of a random part of it.
    """
    generator = seeded("entries", *words)
    if 2 * count > total:
        left_out = random_entries(total, total - count, "left out", *words)
        kept = torch.ones(total, dtype=torch.bool)
        kept[left_out] = False
        return kept.nonzero()[:, 0]
    drawn = torch.empty(0, dtype=torch.int64)
    while drawn.numel() < count:
        more = torch.randint(total, (2 * (count - drawn.numel()) + 8,), generator=generator)
        drawn = torch.cat([drawn, more]).unique()
    keep = torch.randperm(drawn.numel(), generator=generator)[:count]
    return drawn[keep].sort().values


def ranked_entries(weight: Tensor, count: int, largest: bool) -> Tensor:
    """The flat positions of the ``count`` largest or smallest ``|W|``, ascending; of equal ones any."""
    return weight.abs().reshape(-1).topk(count, largest=largest, sorted=False).indices.sort().values


class EntryDelta(nn.Module):
    """One adapter's trained values and the entries of the weight that they stand at.

    Attributes:
        weight: ``(K,)`` the values.
        index: ``(K,)`` their flat positions in ``(out, width)``, ascending.
    """

    index: Tensor

    def __init__(self, entries: Tensor, out: int, width: int) -> None:
        super().__init__()
        self.size = out * width
        self.weight = nn.Parameter(torch.zeros(entries.numel()))
        self.register_buffer("index", entries.to(index_dtype(out, width), copy=True))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        stored = state_dict.get(prefix + "index")
        # The file decides what was trained; another version may draw otherwise.
        if stored is not None:
            self._require_entries(prefix + "index", stored)
            if stored.numel() != self.index.numel():
                fresh = self.weight.new_zeros(stored.numel())
                self.weight = nn.Parameter(fresh, requires_grad=self.weight.requires_grad)
                self.index = self.index.new_zeros(stored.numel())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _require_entries(self, name: str, stored: Tensor) -> None:
        """The products walk through the positions in order, and a wrong one would be memory of something else."""
        if not stored.numel() or stored.device.type == "meta":
            return
        low, high = int(stored[0]), int(stored[-1])
        if low < 0 or high >= self.size or not bool((stored[1:] > stored[:-1]).all()):
            got = f"{stored.numel()} positions from {low} to {high}"
            wanted = f"ascending ones from 0 to {self.size - 1}, each once"
            raise AdapterError(describe(name, got, wanted, "save the adapter again, or load its own base"))
