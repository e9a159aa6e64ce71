r"""S2FT: train a few whole heads and channels of coupled layers, with a backward that touches nothing else.

For a layer ``y = W x + b`` with ``W (out, in)`` and chosen entries ``S``::

    input columns (o, down):                 y = W x + D x[S]        D (out, s)
    output rows (q, k, v, gate, up):         y = W x;  y[S] += D x   D (s, in)

``D`` is float32, zero at start, and is all that trains; ``W`` is written by merging alone.

Source: S2FT (NeurIPS 2024): coupled structures section 3.1 (eqs. 1-2), selection section 3.2, partial
back-propagation section 3.3; the width that matches LoRA rank r, ``s = floor(r (d + d') / d')``, section 4.1.

Where we deviate, and why: the paper permutes the chosen units to the front and writes the slice into ``W``. Here
entries are gathered and the slice stays beside ``W``: a checkpoint keeps its layout, any query head of a
grouped-query model can be chosen, adapters with different choices share one base, and a quantised base works.
The authors' code draws units over all layers at once, so some layers may get none; here each block gets the same.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn

from leantune.core.errors import ConfigError, TargetError, describe, did_you_mean, raise_all
from leantune.kernels.partial_linear import Axis, add_slice, partial_linear
from leantune.methods import _selection as selecting
from leantune.methods._base import AdapterConfig, AdapterLayer, AdapterModel
from leantune.methods._peft import add_peft_type, prefix_of, register_with_peft
from leantune.methods._registry import Method, register
from leantune.methods.structure import HeadLayout, Structure, find_structures

_CHOICES = {"selection": ("random", "weight"), "order": ("largest", "smallest"), "coupling": ("shared", "independent")}


@dataclass
class S2FTConfig(AdapterConfig):
    """Options of S2FT. Give at most one of ``ratio``, ``heads``/``channels``, ``match_lora_rank``.

    Raises:
        ConfigError: two budgets, a value out of range, or an unknown choice; all problems at once.
    """

    ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of a block's targeted weights that trains (default 0.02). Attention gets as many whole "
            "heads as fit into half of it, the channels get the rest."
        },
    )
    heads: int | None = field(
        default=None, metadata={"help": "Query heads that train in each block, instead of ratio."}
    )
    channels: int | None = field(
        default=None, metadata={"help": "Feed-forward channels that train in each block, instead of ratio."}
    )
    match_lora_rank: int | None = field(
        default=None,
        metadata={"help": "Train as many parameters as LoRA of this rank would on the same modules, instead of ratio."},
    )
    selection: str = field(
        default="random",
        metadata={"help": "How heads and channels are chosen: 'random', or 'weight' (by the norm of their weights)."},
    )
    order: str = field(
        default="largest", metadata={"help": "Which end of a ranking is taken: 'largest' or 'smallest'."}
    )
    coupling: str = field(
        default="shared",
        metadata={
            "help": "'shared': both sides of a structure (up and down, value and output) train the same units; "
            "'independent': each side chooses its own."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random choice."})
    achieved_ratio: float | None = field(
        default=None, metadata={"help": "Set by Leantune: the share of the targeted weights that trains."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("s2ft")
        problems = [
            describe(f"S2FTConfig.{name}", repr(getattr(self, name)), "one of " + ", ".join(known), near)
            for name, known in _CHOICES.items()
            if getattr(self, name) not in known
            for near in [did_you_mean(str(getattr(self, name)), known)]
        ]
        ways = {
            "ratio": self.ratio is not None,
            "heads/channels": self.heads is not None or self.channels is not None,
            "match_lora_rank": self.match_lora_rank is not None,
        }
        given = [way for way, present in ways.items() if present]
        if len(given) > 1:
            problems.append(
                describe("S2FTConfig", " and ".join(given), "one way to set the budget", "remove the others")
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            problems.append(describe("S2FTConfig.ratio", repr(self.ratio), "a share in (0, 1]", "try 0.02"))
        for name in ("heads", "channels", "match_lora_rank"):
            value = getattr(self, name)
            if value is not None and (value < 0 or (name == "match_lora_rank" and value == 0)):
                problems.append(describe(f"S2FTConfig.{name}", repr(value), "a positive count", "try 1"))
        if given == ["heads/channels"] and not (self.heads or self.channels):
            problems.append(describe("S2FTConfig", "no heads and no channels", "something to train", "try channels=64"))
        raise_all(problems, ConfigError)

    @property
    def budget(self) -> selecting.Budget:
        """The budget these options set."""
        unset = self.heads is None and self.channels is None and self.match_lora_rank is None
        ratio = 0.02 if unset and self.ratio is None else self.ratio
        return selecting.Budget(ratio, self.heads, self.channels, self.match_lora_rank)


class _SliceDelta(nn.Module):
    """One adapter's trained slice and the entries it stands for."""

    index: Tensor

    def __init__(self, shape: tuple[int, int], index: Tensor, axis: Axis) -> None:
        super().__init__()
        self.axis: Axis = axis
        self.weight = nn.Parameter(torch.zeros(shape))
        self.register_buffer("index", index)


class S2FTLayer(AdapterLayer):
    """A linear layer with trained slices beside it, one an adapter."""

    adapter_layer_names = ("s2ft_slice",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.s2ft_slice = nn.ModuleDict()

    def update_layer(  # type: ignore[override]
        self, adapter_name: str, config: S2FTConfig, template: str | None, *, chosen: selecting.Slice
    ) -> None:
        """Create the zero slice (noise when ``init_weights`` is False) at the chosen entries."""
        if template is not None and template in self.s2ft_slice:
            twin = self.s2ft_slice[template]
            chosen = selecting.Slice(twin.axis, twin.index.clone())
        count = chosen.index.numel()
        shape = (self.out_features, count) if chosen.axis == "in" else (count, self.in_features)
        slice_delta = _SliceDelta(shape, chosen.index, chosen.axis)
        if not config.init_weights:
            nn.init.normal_(slice_delta.weight, std=0.02)
        self.s2ft_slice[adapter_name] = slice_delta
        self.place(adapter_name, inference_mode=config.inference_mode)

    def add_share(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        """``result + D x[S]``, or ``result[S] += D x``."""
        own = self.s2ft_slice[adapter]
        return add_slice(result, x, own.weight, own.index, own.axis)

    def fused(self, adapter: str, x: Tensor) -> Tensor | None:
        """One kernel for base and slice where the base is a dense frozen matrix."""
        if not self.is_plain(x):
            return None
        own = self.s2ft_slice[adapter]
        weight = self.base_layer.weight.t() if self.transposed else self.base_layer.weight
        return partial_linear(x, weight, self.base_layer.bias, own.weight, own.index, own.axis)

    def delta_region(self, adapter: str) -> tuple[Tensor, int | None, Tensor | None]:
        """The slice, and where it stands in ``W``."""
        own = self.s2ft_slice[adapter]
        return own.weight.detach(), 1 if own.axis == "in" else 0, own.index

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Rank ``s`` with a one-hot factor: ``D E`` for columns, ``E^T D`` for rows, ``E[i, S_i] = 1``."""
        own = self.s2ft_slice[adapter]
        delta = own.weight.detach()
        length = self.in_features if own.axis == "in" else self.out_features
        one_hot = delta.new_zeros(own.index.numel(), length)
        one_hot[torch.arange(own.index.numel(), device=delta.device), own.index] = 1
        return (delta, one_hot) if own.axis == "in" else (one_hot.t().contiguous(), delta)


class S2FTModel(AdapterModel):
    """Chooses the slices of all targeted modules, block by block, and injects the layers."""

    prefix = prefix_of("s2ft")
    tuner_layer_cls = S2FTLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def layer_options(self, config: S2FTConfig, adapter_name: str, path: str) -> dict[str, Any] | None:
        """The chosen entries of the module at ``path``; None when the budget gives it none."""
        cache = self.__dict__.setdefault("_chosen", {})
        if adapter_name not in cache:
            cache[adapter_name] = self._choose(config)
        chosen = cache[adapter_name].get(path)
        return None if chosen is None else {"chosen": chosen}

    def _choose(self, config: S2FTConfig) -> dict[str, selecting.Slice]:
        layers = dict(self._linears())
        shapes: dict[str, tuple[int, int]] = {}
        for path, layer in layers.items():
            width_in, out = _get_in_out_features(layer)
            shapes[path] = (out, width_in)
        targets = {path for path in shapes if self._check_target_module_exists(config, path)}
        layout = HeadLayout.of(getattr(self.model, "config", None))

        # A choice by weight reads the weights, dequantised where needed, one layer at a time.
        def weight_of(path: str) -> Tensor:
            probe = S2FTLayer(layers[path], "probe")
            return probe.dense_weight()

        found = [selecting.targeted(each, targets) for each in find_structures(shapes, layout)]
        slices: dict[str, list[selecting.Slice]] = {}
        # The structures of one block follow each other in the model; sorting keeps plain ones apart.
        for _, group in itertools.groupby(
            sorted((each for each in found if each.parts), key=lambda each: each.block), key=lambda each: each.block
        ):
            for path, chosen in _choose_block(list(group), config, shapes, weight_of):
                slices.setdefault(path, []).append(chosen)
        joined = {
            path: selecting.Slice(many[0].axis, torch.cat([each.index for each in many]).sort().values)
            for path, many in slices.items()
        }
        if targets and not joined:
            raise TargetError(
                describe(
                    "S2FTConfig",
                    f"heads={config.heads}, channels={config.channels} choose nothing of {', '.join(sorted(targets)[:3])}",
                    "at least one head or channel of a targeted module",
                    "set channels for feed-forward or plain layers, heads for attention",
                )
            )
        trained = sum(each.index.numel() * shapes[path][0 if each.axis == "in" else 1] for path, each in joined.items())
        total = sum(shapes[path][0] * shapes[path][1] for path in targets)
        config.achieved_ratio = trained / total if total else None
        return joined


def _choose_block(
    structures: list[Structure], config: S2FTConfig, shapes: dict[str, tuple[int, int]], weight_of: Any
) -> list[tuple[str, selecting.Slice]]:
    """``(module, slice)`` of every part that trains in one block."""
    halves = {each.kind: selecting.sides(each, config.coupling) for each in structures}  # type: ignore[arg-type]
    if "plain" in halves:
        counts = {"plain": selecting.plain_channels(structures[0].parts[0], config.budget)}
    else:
        modules = {part.module: shapes[part.module] for each in structures for part in each.parts}
        counts = selecting.count_units({kind: list(of.values()) for kind, of in halves.items()}, config.budget, modules)
    chosen_slices = []
    for kind, by_side in halves.items():
        for side, half in by_side.items():
            count = selecting.side_count(half, counts[kind])
            if count == 0:
                continue
            chosen = selecting.choose_units(
                half,
                count,
                side=side,
                selection=config.selection,  # type: ignore[arg-type]
                order=config.order,  # type: ignore[arg-type]
                seed=config.seed,
                weight_of=weight_of,
            )
            units = selecting.choice_units(half.parts)
            chosen_slices += [
                (part.module, selecting.Slice(part.axis, selecting.entries(part, chosen, units))) for part in half.parts
            ]
    return chosen_slices


def _trainable_parameters(config: S2FTConfig, out_features: int, in_features: int) -> int:
    part = find_structures({"layer": (out_features, in_features)}, None)[0].parts[0]
    return selecting.plain_channels(part, config.budget) * out_features


def _apply(model: nn.Module, config: S2FTConfig) -> nn.Module:
    return get_peft_model(model, config)  # type: ignore[arg-type]


register_with_peft("s2ft", S2FTConfig, S2FTModel)
register(
    Method(
        name="s2ft",
        title="Structured sparse fine-tuning",
        config=S2FTConfig,
        formula="W + D E_S (columns) or W + E_S^T D (rows)",
        paper="S2FT, NeurIPS 2024",
        trainable_parameters=_trainable_parameters,
        apply=_apply,
        default_learning_rate=2e-3,
        toy_options={"channels": 3},
    )
)
