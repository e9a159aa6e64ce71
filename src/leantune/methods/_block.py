"""The blocks of a model, by the paths of their modules: which a config chooses, which a round of boosting trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import Tensor, nn

from leantune.core.errors import TargetError, describe
from leantune.methods._selection import seeded

SAMPLINGS = ("uniform", "balanced", "gradient")


def block_of(path: str, patterns: Iterable[str] = ()) -> str:
    """The block that a module belongs to: ``model.layers.3`` of ``model.layers.3.self_attn.q_proj``.

    Args:
        path: of the module.
        patterns: names of the list of blocks, where the first number in the path is not theirs.

    Returns:
        The path up to the first number, or up to that behind one of the names. A module outside of such a list (a
        head, a layer of a plain perceptron) is a block of its own: its own path.
    """
    parts, names = path.split("."), set(patterns)
    for place, part in enumerate(parts):
        if part.isdigit() and (not names or (place > 0 and parts[place - 1] in names)):
            return ".".join(parts[: place + 1])
    return path


def keep_chosen_blocks(config: Any, model: nn.Module) -> None:
    """Write "all-linear" out as the paths of the linear layers in the blocks of ``layers_to_transform``.

    PEFT writes out all of them, and of a path that is given whole it does not ask in which block it is.

    Raises:
        TargetError: no such block has one.
    """
    if config.layers_to_transform is None or str(config.target_modules).lower() != "all-linear":
        return
    _maybe_include_all_linear_layers(config, model)
    paths = config.target_modules
    config.target_modules = {path.rpartition(".")[2] for path in paths}
    chosen = {path for path in paths if "." in path and check_target_module_exists(config, path)}
    if not chosen:
        got = f"layers_to_transform={config.layers_to_transform!r}"
        do = "count from 0, or leave it out"
        raise TargetError(describe("target_modules", got, "blocks that have linear modules", do))
    config.target_modules = chosen


class BlockSampler:
    """Which of ``count`` blocks each round trains, by number.

    A choice is a function of the seed and the round (and of the norms, for ``"gradient"``): a resumed run makes the
    same one, and no other random number of the program is drawn.

    Args:
        sampling: ``"uniform"``: any set of blocks is as likely as any other; ``"balanced"``: those that were chosen
            least so far, ties drawn, so that usage never differs by more than one; ``"gradient"``: drawn without
            replacement with probability in proportion to the norm of the block's gradient.
        count: how many blocks there are.
        size: how many a round trains.
        seed: of the draws.
    """

    def __init__(self, sampling: str, count: int, size: int, seed: int) -> None:
        self.sampling = sampling
        self.count = count
        self.size = min(size, count)
        self.seed = seed
        self._usage = torch.zeros(count, dtype=torch.int64)
        self._dealt = 0

    def choose(self, round_number: int, norms: Sequence[float] | None = None) -> list[int]:
        """The blocks of a round (counted from 0), sorted.

        Args:
            round_number: which round.
            norms: of the gradient of each block, for ``"gradient"``.
        """
        if self.sampling == "gradient":
            if norms is None:
                raise AssertionError("a choice by gradient needs the norms")
            return self._by_norm(round_number, torch.tensor(norms, dtype=torch.float64))
        if self.sampling == "balanced":
            return self._least_used(round_number)
        return self._smallest(self._noise(round_number))

    def _noise(self, round_number: int) -> Tensor:
        generator = seeded("xgblora", "blocks", self.seed, round_number)
        return torch.rand(self.count, generator=generator, dtype=torch.float64)

    def _smallest(self, keys: Tensor) -> list[int]:
        return sorted(keys.argsort()[: self.size].tolist())

    def _least_used(self, round_number: int) -> list[int]:
        if round_number < self._dealt:
            self._usage.zero_()
            self._dealt = 0
        chosen: list[int] = []
        # A round depends on those before it; they are dealt again where this one was not asked in its turn.
        for number in range(self._dealt, round_number + 1):
            chosen = self._smallest(self._usage + self._noise(number))
            self._usage[chosen] += 1
        self._dealt = round_number + 1
        return chosen

    def _by_norm(self, round_number: int, norms: Tensor) -> list[int]:
        # The order statistics of exponential variables with these rates are draws without replacement.
        rates = norms.clamp(min=torch.finfo(torch.float64).tiny)
        return self._smallest(-torch.log1p(-self._noise(round_number)) / rates)
