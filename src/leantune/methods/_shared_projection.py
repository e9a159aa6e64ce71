r"""The projection ``A (r, in)`` that all tasks of a layer share, and its four starts.

With ``s`` the scaling of ``W + s B A``::

    kaiming         entries uniform in +-1/sqrt(in), as stock LoRA draws its A
    gaussian        entries N(0, 1), as in algorithm 1 of the paper: sqrt(3 in) times as large
    orthonormal     A = Q / s with Q Q^T = I, Q uniform among all such
    activation_pca  A = Q / s, the rows of Q the r principal directions of the layer's inputs (uncentred), all tasks
                    together

A frozen ``A`` confines the change of a weight to its row space. Gradient descent on ``B`` moves the weight by
``-lr s^2 G A^T A`` where ``G = dL/dW``; preconditioned by ``(s^2 A A^T)^-1`` (LoRA-FA, arXiv 2308.03303) the move is
``-lr G P``, the full gradient projected onto that space, whatever the scale of ``A``. Rows of length ``1/s`` make that
preconditioner the identity, so for the two orthonormal starts the plain gradient is the preconditioned one.

Of all rank-r projections, the principal directions lose least of the inputs' energy, and so of any ``G = dY^T X``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from leantune.core.errors import AdapterError, describe
from leantune.methods._row_task import seeded

STARTS = ("kaiming", "gaussian", "orthonormal", "activation_pca")
FROM_DATA = ("activation_pca",)
KEY = "multi_lora_shared.weight"
"""How the key of an ``A`` in an adapter file ends; what comes before is the path of its layer."""
EXACT_WIDTH = 1024
"""Up to this width principal directions come from all eigenvectors, beyond it from an iteration on a few."""

_replaces: ContextVar[bool] = ContextVar("replaces", default=False)


@contextmanager
def replacing_shared() -> Iterator[None]:
    """Inside, the ``A`` of a file takes the place of one that other tasks use: all of them are being read back."""
    token = _replaces.set(True)
    try:
        yield
    finally:
        _replaces.reset(token)


def replaces_shared() -> bool:
    """Whether a file's ``A`` may take the place of one in use."""
    return _replaces.get()


class SharedProjection(nn.Module):
    """``A (r, in)``: a buffer while it is frozen, a parameter where it trains."""

    weight: Tensor

    def __init__(self, value: Tensor, *, trains: bool, waits: bool, scaling: float) -> None:
        super().__init__()
        self.trains, self.waits, self.scaling = trains, waits, scaling
        if trains:
            self.weight = nn.Parameter(value)
        else:
            self.register_buffer("weight", value)

    def start(self, value: Tensor) -> None:
        """Give a waiting projection its value."""
        with torch.no_grad():
            self.weight.copy_(value)
        self.waits = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.waits = self.waits and prefix + "weight" not in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@dataclass(frozen=True)
class ParameterCount:
    """How many entries the adapters of several tasks have, with one ``A`` and without.

    Attributes:
        shared: of ``A``, all layers together.
        factor: of one task's ``B``.
        tasks: how many tasks.
    """

    shared: int
    factor: int
    tasks: int

    @property
    def total(self) -> int:
        """``r in + k r out``."""
        return self.shared + self.tasks * self.factor

    @property
    def separate(self) -> int:
        """``k r (in + out)``: of as many LoRAs of this rank."""
        return self.tasks * (self.shared + self.factor)

    def __str__(self) -> str:
        return (
            f"{self.total:,} adapter parameters for {self.tasks} task{'s' if self.tasks > 1 else ''} "
            f"(A {self.shared:,}, B {self.factor:,} each); as separate LoRAs {self.separate:,}"
        )


class InputMoment:
    """The sum of ``x^T x`` over a layer's inputs, ``(in, in)``; a source of ``Calibration.activations``."""

    def __init__(self, module: nn.Module, width: int) -> None:
        self.module, self.shape = module, (width, width)

    def listen(self, add: Callable[[Tensor], None], kept: Callable[[nn.Module, Tensor], Tensor]) -> RemovableHandle:
        """See :class:`leantune.methods._calibration.ActivationSource`."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            del output
            values = kept(module, args[0])
            values = values if values.dtype == torch.float64 else values.float()
            add((values.t() @ values).double())

        return self.module.register_forward_hook(hook)


def draw(start: str, rank: int, width: int, scaling: float, seed: int, path: str) -> Tensor:
    """A random ``A (rank, width)``, float64 on the CPU; it depends on the seed and the layer's path alone."""
    generator = seeded("shared projection", seed, path)
    if start == "kaiming":
        return (torch.rand(rank, width, generator=generator, dtype=torch.float64) * 2 - 1) / width**0.5
    noise = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    if start == "gaussian":
        return noise
    basis, triangle = torch.linalg.qr(noise.t())
    # With a positive diagonal the basis is uniform, and the same wherever it is computed.
    return (basis * triangle.diagonal().sign()).t().contiguous() / scaling


def principal_directions(moment: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading eigenvectors of a symmetric ``(in, in)`` moment as orthonormal rows, largest first."""
    width = moment.shape[0]
    if width <= EXACT_WIDTH:
        rows = torch.linalg.eigh(moment).eigenvectors[:, -rank:].flip(1).t()
    else:
        few = min(width, 2 * rank + 10)
        basis = torch.randn(width, few, generator=seeded("principal directions"), dtype=moment.dtype)
        for _ in range(12):
            basis = torch.linalg.qr(moment @ basis).Q
        small = torch.linalg.eigh(basis.t() @ moment @ basis).eigenvectors
        rows = (basis @ small[:, -rank:].flip(1)).t()
    # An eigenvector's sign is free: its largest entry is made positive.
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return (rows * largest.sign()).contiguous()


def read_shared(folder: str) -> dict[str, Tensor]:
    """Every ``A`` of an adapter file, by the path of its layer.

    Args:
        folder: an adapter folder, a run folder, or the safetensors file itself.

    Raises:
        AdapterError: there is no such file, it cannot be read, or it holds no shared projection.
    """
    root, name = Path(folder), "adapter_model.safetensors"
    # Of a run with several tasks any adapter will do.
    places = (root, root / name, root / "adapter" / name, *sorted(root.glob(f"adapter/*/{name}")))
    path = next((each for each in places if each.is_file()), None)
    if path is None:
        where = f"shared_from: {folder}"
        raise AdapterError(describe(where, "no adapter there", f"a folder with {name}", "give a multi-lora adapter"))
    try:
        with safe_open(str(path), framework="pt") as file:
            keys = [key for key in file.keys() if key.endswith(f".{KEY}")]  # noqa: SIM118 - not a mapping
            found = {
                key.removesuffix(f".{KEY}").removeprefix("base_model.model."): file.get_tensor(key) for key in keys
            }
    except (SafetensorError, OSError) as error:
        raise AdapterError(describe(str(path), str(error), "a whole safetensors file", "copy it again")) from error
    if not found:
        raise AdapterError(
            describe(str(path), "holds no shared projection", "an adapter of multi-lora", "give that of another task")
        )
    return found


def groups_within(sources: Mapping[str, InputMoment], most_bytes: int) -> list[list[str]]:
    """The sources in groups whose moments fit into so many bytes together; one at least in each."""
    groups: list[list[str]] = []
    room = 0
    for path, source in sources.items():
        size = source.shape[0] * source.shape[1] * torch.float64.itemsize
        if size > room:
            groups.append([])
            room = most_bytes
        groups[-1].append(path)
        room -= size
    return groups


def disagreements(
    config: Any, targeted: Mapping[str, tuple[int, SharedProjection | None]], given: Mapping[str, Tensor]
) -> list[str]:
    """Why a new task cannot take the ``A`` that is on a model, or that of another adapter's file.

    Args:
        config: of the new task.
        targeted: for each layer it targets the number of inputs, and ``A`` where there is one.
        given: ``A`` by layer from ``shared_from``; empty where that was not asked for.
    """
    problems = []
    for path, (width, present) in targeted.items():
        rank, stored = min(config.r, width), given.get(path)
        if config.shared_from is not None and stored is None:
            where = f"{config.shared_from}: {path}"
            near = ", ".join(sorted(given)[:3])
            problems.append(describe(where, "no shared projection", "one for every targeted layer", f"it has {near}"))
        if stored is not None and stored.shape != (rank, width):
            got, wanted = f"A of shape {tuple(stored.shape)}", f"{(rank, width)}"
            problems.append(describe(f"{config.shared_from}: {path}", got, wanted, f"set r={len(stored)}"))
        if present is None:
            continue
        if len(present.weight) != rank:
            got, wanted = f"r={config.r}", f"r={len(present.weight)}, the rank of the A that its tasks share"
            problems.append(describe(path, got, wanted, "give every task the same r"))
        if present.trains != config.train_shared:
            got, wanted = f"train_shared={config.train_shared}", f"{present.trains}, as the other tasks have it"
            problems.append(describe(path, got, wanted, "one answer for all tasks of a model"))
        if stored is not None and not present.waits and not _same(present.weight, stored):
            problems.append(_different(f"{config.shared_from}: {path}", "drop shared_from, or load that task first"))
    return problems


def other_projections(used: Mapping[str, SharedProjection], found: Mapping[str, Any], task: str) -> list[str]:
    """Each layer for which a file holds another ``A`` than the one that other tasks on the model use.

    Args:
        used: ``A`` by the layer's path in the model.
        found: the file's tensors by their key in the model (or their names alone, where only these are asked for).
        task: the adapter that is being loaded.
    """
    problems = []
    for path, shared in used.items() if not replaces_shared() else ():
        stored = found.get(f"{path}.{KEY}")
        if isinstance(stored, Tensor) and not shared.waits and not _same(shared.weight, stored):
            do = "load it on a model of its own, or train it with shared_from=..."
            problems.append(_different(f"adapter '{task}', {path}", do))
    return problems


def _same(present: Tensor, stored: Tensor) -> bool:
    return present.shape == stored.shape and torch.equal(present.detach().cpu(), stored.to("cpu", present.dtype))


def _different(where: str, do: str) -> str:
    return describe(where, "another shared A than that of the tasks on this model", "the same, to the bit", do)
