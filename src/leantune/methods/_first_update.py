"""The start from the first step: gradients of one layer after another, their step, and its truncated SVD."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from leantune.core.errors import MethodError, describe
from leantune.core.linalg import subspace_overlap
from leantune.methods import _low_rank_start as starting
from leantune.methods import _rank_budget as budgeting
from leantune.methods._base import linear_features
from leantune.methods._calibration import Calibration, GradientSource, LinearGradient
from leantune.methods._first_step import first_step, step_of
from leantune.methods._selection import seeded
from leantune.methods._sketch import LinearSketch, RandomMatrices

Starts = Iterator[tuple[str, starting.Start]]


def estimate(config: Any, bases: Mapping[str, nn.Module], data: Calibration) -> tuple[dict[str, int] | None, Starts]:
    """The start of every layer from the first step on its weight.

    Args:
        config: a LoraXSConfig.
        bases: path -> base layer.
        data: the batches, the optimizer and its step size; ``data.told`` gets what a run reports of the start.

    Returns:
        The ranks that ``r="auto"`` gave (None otherwise), and path -> start, one layer after another.

    Raises:
        MethodError: no step size, or an optimizer whose first step is not known.
    """
    if data.step_size is None:
        raise MethodError(
            describe(
                "initialize",
                "no step_size, which is the length of the optimizer's first step that this start approximates",
                "the learning rate of the first step above zero",
                "call leantune.initialize(model, batches, step_size=...)",
            )
        )
    if isinstance(data.optimizer, str):
        # Refuse an unknown one before, and not after, a pass over the batches.
        step_of(data.optimizer)
    shapes = {path: linear_features(base)[::-1] for path, base in bases.items()}
    name = data.optimizer if isinstance(data.optimizer, str) else getattr(data.optimizer, "__name__", "custom")
    data.told.update(optimizer=name, step_size=data.step_size)
    if config.r != "auto":
        ranks = budgeting.uniform_ranks(shapes, config.r)
        return None, _told(_starts(config, bases, shapes, ranks, data), data)
    widest = budgeting.uniform_ranks(shapes, budgeting.WIDEST * config.rank_budget)
    # All layers' spectra are known before the first rank is; their factors wait where there is room.
    found = {path: start.to("cpu") for path, start in _starts(config, bases, shapes, widest, data)}
    spectra = {path: start.S for path, start in found.items()}
    ranks = budgeting.allot(spectra, budgeting.uniform_ranks(shapes, config.rank_budget))
    return ranks, _told(((path, start.cut(ranks[path])) for path, start in found.items()), data)


def _starts(
    config: Any,
    bases: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    data: Calibration,
) -> Starts:
    if config.sketch is not None:
        yield from _sketched_starts(config, bases, shapes, ranks, data)
        return
    sources = {path: LinearGradient(base, shapes[path]) for path, base in bases.items()}
    for path, gradient in data.weight_gradients(sources):
        start = _start(config, path, gradient, ranks[path], data)
        # Let go of, before the next one comes.
        del gradient
        yield path, _shared(start)


def _sketched_starts(
    config: Any,
    bases: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    data: Calibration,
) -> Starts:
    matrices = RandomMatrices(config.seed, torch.empty(0, dtype=data.dtype, device=data.device))
    sketches = {path: LinearSketch(base, shapes[path], config.sketch, matrices) for path, base in bases.items()}
    # A wide sketch would take more room than a small gradient does.
    sketches = {path: sketch for path, sketch in sketches.items() if sketch.shape[1] < math.prod(shapes[path])}
    order = torch.randperm(len(bases), generator=seeded("sampled layer", config.seed)).tolist()
    sampled = next((path for path in map(sorted(bases).__getitem__, order) if path in sketches), None)
    data.told.update(sketched=len(sketches), layers=len(bases))
    # The one exact gradient comes first, and is compared when its sketch has come.
    wanted: dict[tuple[str, str], GradientSource] = {}
    if sampled is not None:
        wanted["exact", sampled] = LinearGradient(bases[sampled], shapes[sampled])
    wanted |= {("own", path): sketches.get(path) or LinearGradient(bases[path], shapes[path]) for path in bases}
    exact: Tensor | None = None
    for (kind, path), total in data.weight_gradients(wanted):
        if kind == "exact":
            exact = total
            continue
        gradient = sketches[path].reconstruct(total) if path in sketches else total
        del total
        if path == sampled and exact is not None:
            data.told.update(_agreement(config, path, exact, gradient, ranks[path], data))
            exact = None
        yield path, _shared(_start(config, path, gradient, ranks[path], data))


def _agreement(config: Any, path: str, exact: Tensor, sketched: Tensor, rank: int, data: Calibration) -> dict[str, Any]:
    """How far the subspaces of gradient and step, out of the sketch, are the exact ones: 1 is the same."""

    def overlap(make: Callable[[Tensor], starting.Start]) -> float:
        one, two = make(exact.clone()), make(sketched.clone())
        return (subspace_overlap(one.U, two.U) + subspace_overlap(one.Vh.t(), two.Vh.t())) / 2

    return {
        "overlap": overlap(lambda gradient: _start(config, path, gradient, rank, data)),
        "gradient_overlap": overlap(lambda gradient: starting.decompose(gradient, rank, config.seed, path)),
        "overlap_module": path,
    }


def _start(config: Any, path: str, gradient: Tensor, rank: int, data: Calibration) -> starting.Start:
    assert data.step_size is not None
    step = first_step(data.optimizer, gradient, data.step_size)
    if config.noise:
        starting.add_noise(step, config.noise, config.seed, path)
    return starting.decompose(step, rank, config.seed, path)


def _told(starts: Starts, data: Calibration) -> Starts:
    """Pass the starts on, and add up how much of the steps they hold."""
    kept = total = 0.0
    for path, start in starts:
        kept += start.captured * start.energy
        total += start.energy
        data.told["captured"] = kept / total if total else 1.0
        yield path, start


def _shared(start: starting.Start) -> starting.Start:
    """The same bits in every process: the gradients are, but a decomposition may differ between machines."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        for value in (start.U, start.S, start.Vh):
            distributed.broadcast(value, 0)
    return start
