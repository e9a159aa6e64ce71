r"""Ranks by layer under one budget of trained parameters.

A layer of rank ``r`` trains ``r^2`` parameters and captures the energy ``sigma_1^2 + .. + sigma_r^2`` of what it starts
from. Its next rank costs ``2 r + 1`` parameters and captures ``sigma_{r+1}^2``: the gain for each parameter falls with
``r``, so that taking the best next rank of all layers again and again captures the most, but for what is left of
the budget when no further rank fits in.

Source: ours; the paper (arXiv 2411.19557, section 4) names layer-wise ranks as future work.
"""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Mapping

from torch import Tensor

WIDEST = 2
"""No layer gets more than this many times the uniform rank: its spectrum need not be known further."""


def uniform_ranks(shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, int]:
    """The same rank everywhere, but no more than a layer has."""
    return {path: min(rank, *shape) for path, shape in shapes.items()}


def clamped_ranks(shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, int]:
    """As :func:`uniform_ranks`, with a warning where a layer has less than was asked for."""
    ranks = uniform_ranks(shapes, rank)
    clamped = [path for path in shapes if ranks[path] < rank]
    if clamped:
        out, width = shapes[clamped[0]]
        warnings.warn(
            f"r={rank} is more than {len(clamped)} of {len(ranks)} modules have, which get their smaller side instead "
            f"(e.g. {clamped[0]}, {out} x {width}: {ranks[clamped[0]]})"
        )
    return ranks


def allot(spectra: Mapping[str, Tensor], uniform: Mapping[str, int]) -> dict[str, int]:
    """Ranks that capture the most energy with no more parameters than ``uniform`` trains; at least 1 in each layer.

    Args:
        spectra: path -> singular values, falling; a layer's rank is at most their number.
        uniform: path -> rank, which sets the budget. It is the answer where what is left of the budget in the end
            would have the ranks found capture less.
    """
    energies = {path: values.double().square().tolist() for path, values in spectra.items()}
    found = _greedy(energies, sum(rank**2 for rank in uniform.values()))

    def captured(ranks: Mapping[str, int]) -> float:
        return sum(sum(energies[path][:rank]) for path, rank in ranks.items())

    return found if captured(found) >= captured(uniform) else dict(uniform)


def _greedy(energies: Mapping[str, list[float]], budget: int) -> dict[str, int]:
    ranks = dict.fromkeys(energies, 1)
    left = budget - len(ranks)
    # Largest gain first; of equals the first path, so that every process decides alike.
    heap = [(-energy[1] / 3, path) for path, energy in energies.items() if len(energy) > 1]
    heapq.heapify(heap)
    while heap:
        _, path = heapq.heappop(heap)
        cost = 2 * ranks[path] + 1
        if cost > left:
            continue
        ranks[path] += 1
        left -= cost
        rank, energy = ranks[path], energies[path]
        if rank < len(energy):
            heapq.heappush(heap, (-energy[rank] / (2 * rank + 1), path))
    return ranks
