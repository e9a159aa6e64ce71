r"""Adapter files without the frozen factors of ``s B R A``: one that recomputes them, and one that shares them.

A file holds ``B`` and ``A`` as a rule, so that nothing but it decides what they are. Two smaller forms:

recomputed
    ``R`` and a probe for each layer, about ``3 r^2`` numbers. With fixed signs ``P (k, out)`` and ``Q (in, k)``,
    ``k = r + 8``, the probe is ``P B (k, r)`` and ``A Q (r, k)``. Who reads it decomposes the base weight again.
    Singular vectors have free signs, and turn freely where singular values coincide: least squares over
    ``P B' T = P B`` and ``T' A' Q = A Q`` finds ``B' T = B`` and ``T' A' = A``. The eight rows beyond the unknowns tell
    another subspace from a turned one, and ``T`` and ``T'`` must be rotations; beyond :data:`TOLERANCE` the file is
    refused. ``R' = T R T'`` then gives ``B' R' A' = B R A``.
shared
    ``R`` alone; ``B`` and ``A`` stand in a file beside or above the adapter's folder, named after the hash of its
    content, which any number of adapters with the same factors share.

In memory an adapter is whole: once read, it is saved with its factors again unless asked otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from leantune.core.errors import AdapterError, ConfigError, describe, did_you_mean, raise_all
from leantune.methods import _low_rank_start as low_rank_start
from leantune.methods._base import AdapterConfig, AdapterModel
from leantune.methods._core_factor import CoreFactors

STORED, RECOMPUTED, SHARED = FORMS = ("stored", "recomputed", "shared")
TOLERANCE = 1e-4
"""By how much recomputed factors may differ from the stored ones, but for a rotation."""
EXTRA = 8
"""Probes beyond the rank: they see what lies outside the span, and keep the least squares away from singular."""
_PEFT = "base_model.model."


@dataclass
class FactorConfig(AdapterConfig):
    """Options of a method with frozen factors; where a file has them is set on saving."""

    factors: str = field(
        default=STORED,
        metadata={"help": "Set by Leantune: where the frozen factors of this file are.", "is_result": True},
    )
    factor_file: str | None = field(
        default=None,
        metadata={"help": "Set by Leantune: the file beside or above, with shared factors.", "is_result": True},
    )
    factor_hash: str | None = field(
        default=None, metadata={"help": "Set by Leantune: the hash of the shared factors.", "is_result": True}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # The local folder that the config was read from. No field: it is written nowhere.
        self.read_from: Path | None = None
        problems = []
        if self.factors not in FORMS:
            where = f"{type(self).__name__}.factors"
            problems.append(describe(where, repr(self.factors), did_you_mean(self.factors, FORMS), "leave it out"))
        if self.factor_file is not None and Path(self.factor_file).name != self.factor_file:
            where = f"{type(self).__name__}.factor_file"
            problems.append(describe(where, repr(self.factor_file), "the name of a file, without a path", "mend it"))
        raise_all(problems, ConfigError)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; the config remembers the folder, by which shared factors are found."""
        config = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        config.read_from = folder if folder.is_dir() else None
        return config


class FactorModel(AdapterModel):
    """A model whose adapters may come from a file without their frozen factors."""

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        whole = complete(model, config, adapter_name, state_dict)
        remapped: dict[str, Any] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=whole
        )
        return remapped


@dataclass(frozen=True)
class Core:
    """One layer's factors on a model, and what they are called in a file.

    Attributes:
        path: of the layer in the base model.
        key: what stands before ``weight``, ``B`` and ``A`` in a file, with the dot.
        layer: the adapter layer.
        adapter: the adapter's name on the model.
        factors: its factors there.
    """

    path: str
    key: str
    layer: Any
    adapter: str
    factors: CoreFactors


def cores(model: nn.Module, adapter_name: str) -> Iterator[Core]:
    """The factors of an adapter in every layer that it changes."""
    for name, module in model.named_modules():
        if not isinstance(module, CoreFactors):
            continue
        container, _, own = name.rpartition(".")
        if own != adapter_name:
            continue
        container = container.removeprefix(_PEFT)
        path = container.rpartition(".")[0]
        layer = model.get_submodule(name.rsplit(".", 2)[0])
        yield Core(path, f"{_PEFT}{container}.", layer, adapter_name, module)


def signs(rows: int, columns: int, name: str) -> Tensor:
    """The fixed probe of that name: +1 and -1, ``(rows, columns)``, float64, on every machine and in every version."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    # numpy froze the stream of RandomState for good; that of torch's generators is nobody's promise.
    drawn = numpy.random.RandomState(seed).random_sample((rows, columns))
    return torch.from_numpy(numpy.where(drawn < 0.5, -1.0, 1.0))


def probe(B: Tensor, A: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """``P B (k, r)`` and ``A Q (r, k)`` in float64, ``k = r + 8``, each by the square root of its length.

    Args:
        B: ``(out, r)``.
        A: ``(r, in)``.
        path: of the layer; each has probes of its own.
    """
    count = B.shape[1] + EXTRA
    left = signs(count, B.shape[0], f"B {path}") @ B.detach().to("cpu", torch.float64)
    right = A.detach().to("cpu", torch.float64) @ signs(count, A.shape[1], f"A {path}").t()
    return left / B.shape[0] ** 0.5, right / A.shape[1] ** 0.5


def turned(R: Tensor, stored: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    """``R`` for other factors of the same subspaces, and how far these are from being the same.

    Args:
        R: ``(r, r)``, between the factors whose probe was stored.
        stored: their probe.
        found: the probe of the factors at hand.

    Returns:
        ``T R T'`` in float64, and by how much the found factors are not the stored ones, turned: the largest part of
        a stored direction that they miss, or entry of ``T^T T - I`` (the singular values are others then).
    """
    core = R.detach().to("cpu", torch.float64)
    if all(torch.equal(mine.to(theirs.dtype), theirs) for mine, theirs in zip(found, stored, strict=True)):
        # The very same factors: the same bits of R as well.
        return core, 0.0
    left, left_missed = _solved(found[0], stored[0].to("cpu", torch.float64))
    right, right_missed = _solved(found[1].t(), stored[1].to("cpu", torch.float64).t())
    return left @ core @ right.t(), max(left_missed, right_missed)


def _solved(found: Tensor, stored: Tensor) -> tuple[Tensor, float]:
    """``T`` with ``found T ~ stored``, and the largest relative error of a column, or of ``T`` being a rotation."""
    lengths = torch.linalg.vector_norm(found, dim=0).clamp(min=torch.finfo(found.dtype).tiny)
    turn = torch.linalg.pinv(found / lengths, rtol=1e-12) @ stored
    missed = torch.linalg.vector_norm(found / lengths @ turn - stored, dim=0)
    whole = torch.linalg.vector_norm(stored, dim=0)
    floor = torch.finfo(torch.float32).eps * whole.max().clamp(min=torch.finfo(found.dtype).tiny)
    turn = turn / lengths[:, None]
    bent = (turn.t() @ turn - torch.eye(len(turn)).to(turn)).abs().max()
    return turn, max(float((missed / whole.clamp(min=float(floor))).max()), float(bent))


def recompute(
    core: Core, config: Any, R: Tensor, stored: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """``B``, ``R``, ``A`` of a layer from its base weight, and how far they are from the stored ones.

    Args:
        core: the layer.
        config: the adapter's, whose start decomposes the weight.
        R: between the stored factors; its rank decides.
        stored: the probe of these; default: of the factors on the model.
    """
    if stored is None:
        stored = probe(core.factors.B, core.factors.A, core.path)
    rank, dtype = R.shape[-1], core.layer.trained_dtype()
    # In float64, or the rounding would turn singular vectors of neighbouring values by more than the tolerance.
    start = low_rank_start.decompose(core.layer.dense_weight().double(), rank, config.seed, core.path)
    B, _, A = start.factors(config.chosen_split, config.scaling(rank), keep_function=True)
    B, A = B.to(dtype), A.to(dtype)
    new, missed = turned(R, stored, probe(B, A, core.path))
    return B, new.to(R.dtype), A, missed


def in_file(
    model: nn.Module, config: Any, adapter_name: str, whole: dict[str, Tensor], found: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a file of this config must hold: shapes by key.

    Args:
        model: the model with the adapter.
        config: as read from the file.
        adapter_name: its name on the model.
        whole: the adapter's state with all factors.
        found: what the file does hold; its ranks decide.
    """
    form = getattr(config, "factors", STORED)
    if form == STORED:
        return whole
    expected = dict(whole)
    for core in cores(model, adapter_name):
        for name in ("B", "A"):
            expected.pop(core.key + name, None)
        if form == RECOMPUTED:
            weight = found.get(core.key + "weight", core.factors.weight)
            rank = weight.shape[-1] if weight.dim() else 0
            expected[core.key + "probe_B"] = torch.zeros(rank + EXTRA, rank)
            expected[core.key + "probe_A"] = torch.zeros(rank, rank + EXTRA)
    return expected


def complete(model: nn.Module, config: Any, adapter_name: str, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a file with its frozen factors, wherever they are; a whole one as it is.

    Args:
        model: the model that the state is for.
        config: the adapter's; afterwards it says that the factors are in the adapter.
        adapter_name: its name on the model.
        state: key in the file -> tensor (anything else is passed on, for those who ask for names alone).

    Raises:
        AdapterError: the base weights give another subspace, or the shared file is missing, damaged or of other shapes.
    """
    if not all(isinstance(value, Tensor) for value in state.values()):
        return state
    own = [core for core in cores(model, adapter_name) if core.key + "weight" in state]
    bare = [core for core in own if core.key + "B" not in state or core.key + "A" not in state]
    whole = dict(state)
    if any(core.key + "probe_B" in state for core in own):
        for core in own:
            _recomputed(core, config, whole)
    elif config.factors == SHARED and bare:
        shared = read_shared(config.factor_file, config.factor_hash, config.read_from)
        raise_all([problem for core in bare for problem in _taken(core, shared, whole)], AdapterError)
    elif config.factors == RECOMPUTED and bare:
        got = f"no probe of {bare[0].path} in the file"
        raise AdapterError(describe("compact adapter", got, "R and a probe of every layer", "export it again"))
    config.factors, config.factor_file, config.factor_hash = STORED, None, None
    return whole


def _recomputed(core: Core, config: Any, state: dict[str, Tensor]) -> None:
    """Replace a layer's ``R`` and probe by ``B``, ``R`` and ``A``, in place."""
    weight = state[core.key + "weight"]
    stored = state.pop(core.key + "probe_B"), state.pop(core.key + "probe_A")
    B, R, A, missed = recompute(core, config, weight, stored)
    # Written so that a NaN is refused.
    if not missed <= TOLERANCE:
        raise AdapterError(
            describe(
                f"compact adapter, module {core.path}",
                f"the factors recomputed from this base weight are {missed:.2%} off by the stored probe",
                f"those of the training, to {TOLERANCE:.2%}",
                "load the very base it was trained on, in its dtype, or the adapter's folder with stored factors",
            )
        )
    state[core.key + "B"], state[core.key + "A"] = B.to(weight.device), A.to(weight.device)
    state[core.key + "weight"] = R.to(weight.device)


def _taken(core: Core, shared: Mapping[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """Put a layer's shared factors into a state; what is wrong with them."""
    rank = state[core.key + "weight"].shape[-1]
    for name, shape in (("B", (core.layer.out_features, rank)), ("A", (rank, core.layer.in_features))):
        key = core.key + name
        got = tuple(shared[key].shape) if key in shared else "missing"
        if got != shape:
            return [describe(f"shared factors: {key}", f"{got}", f"shape {shape}", "load the base it was trained on")]
        state[key] = shared[key].to(state[core.key + "weight"].device)
    return []


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of names, dtypes, shapes and values, whatever file they are in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def find_shared(name: str, folder: Path | None) -> Path | None:
    """The file of shared factors beside an adapter's files, else above its folder."""
    places = () if folder is None else (folder / name, folder.resolve().parent / name)
    return next((path for path in places if path.is_file()), None)


def read_shared(name: str | None, wanted: str | None, folder: Path | None) -> dict[str, Tensor]:
    """The shared factors of an adapter.

    Args:
        name: of the file.
        wanted: the hash of its content.
        folder: the adapter's, or None where it is no local one.

    Raises:
        AdapterError: it is not there, torn, or of another content.
    """
    path = find_shared(name or "", folder) if name else None
    if path is None:
        raise AdapterError(
            describe(
                str(name),
                f"neither in {folder} nor above it" if folder else "looked for beside a folder on the Hub",
                "the frozen factors that this adapter shares with others",
                "copy that file beside the adapter's folder" if folder else "download the folders first",
            )
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(
            describe(str(path), f"torn or no safetensors file ({error})", "a whole one", "copy it again")
        ) from error
    found = content_hash(tensors)
    if found != wanted:
        got = f"other content (sha256 {found[:16]}..., not {str(wanted)[:16]}...)"
        raise AdapterError(describe(str(path), got, "the factors that were trained with", "copy it again"))
    return tensors
