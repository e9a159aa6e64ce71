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

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from peft import get_peft_model
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn

from leantune.core.errors import ConfigError, TargetError, describe, did_you_mean, raise_all
from leantune.kernels.partial_linear import Axis, add_slice, partial_linear
from leantune.methods import _expert_choice as expert_choice
from leantune.methods import _selection as selecting
from leantune.methods._base import AdapterConfig, AdapterLayer, AdapterModel
from leantune.methods._calibration import Calibration
from leantune.methods._choice import Choice, choose
from leantune.methods._convolution import ConvolutionSlice, is_whole_convolution, refuse_calibration, weight_shape
from leantune.methods._discovery import discover, traced_targets
from leantune.methods._evidence import Questions
from leantune.methods._expert import ExpertLayer
from leantune.methods._peft import add_peft_type, prefix_of, register_with_peft
from leantune.methods._permutation import BasePermutation
from leantune.methods._registry import Method, register
from leantune.methods._slice import SliceDelta
from leantune.methods.structure import find_structures

_CHOICES = {"selection": selecting.SELECTIONS, "order": ("largest", "smallest"), "coupling": ("shared", "independent")}


@dataclass
class S2FTConfig(AdapterConfig):
    """Options of S2FT. Give at most one of ``ratio``, ``heads``/``channels``, ``match_lora_rank``.

    Raises:
        ConfigError: two budgets, a value out of range, or an unknown choice; all problems at once.
    """

    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of expert weights to adapt (path endings, e.g. experts.down_proj): channels of each expert "
            "then train. Default: the experts' down projections, where target_modules is not given either."
        },
    )
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
        metadata={
            "help": "How heads and channels are chosen: 'random', 'weight' (by the norm of their weights), or from "
            "calibration rows: 'activation', 'product' (weight times activation), 'gradient'."
        },
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
    permute: bool = field(
        default=False,
        metadata={
            "help": "Reorder the base in memory so that chosen units stand first (undone by unload, before which the "
            "base's weights are not to be read; files keep the checkpoint's layout). Grouped-query attention then "
            "chooses whole key/value groups."
        },
    )
    achieved_ratio: float | None = field(
        default=None,
        metadata={"help": "Set by Leantune: the share of the targeted weights that trains.", "is_result": True},
    )
    traced: list[dict[str, Any]] | None = field(
        default=None,
        metadata={"help": "Set by Leantune: the structures that a trace of the model found.", "is_result": True},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("s2ft")
        if isinstance(self.target_parameters, list):
            self.target_parameters = set(self.target_parameters)  # type: ignore[assignment]
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


class S2FTLinear(AdapterLayer):
    """A linear layer with trained slices beside it, one an adapter.

    PEFT finds it by the "Linear" in its name when a further adapter targets "all-linear".
    """

    adapter_layer_names = ("s2ft_slice",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.s2ft_slice = nn.ModuleDict()

    def _own(self, adapter: str) -> SliceDelta:
        return cast(SliceDelta, self.s2ft_slice[adapter])

    def update_layer(self, adapter_name: str, config: S2FTConfig, template: str | None, **kwargs: Any) -> None:
        """Create the zero slice (noise when ``init_weights`` is False) at the entries ``kwargs["chosen"]``."""
        chosen: selecting.Slice = kwargs["chosen"]
        if template is not None and template in self.s2ft_slice:
            twin = self._own(template)
            chosen = selecting.Slice(twin.axis, twin.index.clone(), twin.standing, twin.waits)
        count = chosen.index.numel()
        shape = (self.out_features, count) if chosen.axis == "in" else (count, self.in_features)
        own = SliceDelta(shape, chosen)
        if not config.init_weights:
            nn.init.normal_(own.weight, std=0.02)
        self.s2ft_slice[adapter_name] = own
        self.place(adapter_name, inference_mode=config.inference_mode)

    def waits_for_data(self, adapter: str) -> bool:
        """Whether the entries are still to be chosen."""
        return adapter in self.s2ft_slice and self._own(adapter).waits

    def choose(self, adapter: str, chosen: selecting.Slice) -> None:
        """Give a waiting adapter its entries."""
        self._own(adapter).place(chosen)

    def add_share(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        """``result + D x[S]``, or ``result[S] += D x``."""
        own = self._own(adapter)
        return add_slice(result, x, own.weight, own.entries, own.axis)

    def fused(self, adapter: str, x: Tensor) -> Tensor | None:
        """One kernel for base and slice where the base is a dense frozen matrix."""
        if not self.is_plain(x):
            return None
        own, base = self._own(adapter), cast(nn.Linear, self.base_layer)
        weight = base.weight.t() if self.transposed else base.weight
        return partial_linear(x, weight, base.bias, own.weight, own.entries, own.axis)

    def delta_region(self, adapter: str) -> tuple[Tensor, int | None, Tensor | None]:
        """The slice, and where it stands in ``W``."""
        own = self._own(adapter)
        length = self.in_features if own.axis == "in" else self.out_features
        where = own.entries
        if isinstance(where, slice):
            where = torch.arange(length, device=own.weight.device)[where]
        return own.weight.detach(), 1 if own.axis == "in" else 0, where

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Not over a permuted base: PEFT's converter would write the delta in the permuted order. Ours does not."""
        return adapter_name not in self.s2ft_slice or self._own(adapter_name).standing is None

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Rank ``s`` with a one-hot factor: ``D E`` for columns, ``E^T D`` for rows, ``E[i, S_i] = 1``."""
        own = self._own(adapter)
        delta = own.weight.detach()
        length = self.in_features if own.axis == "in" else self.out_features
        one_hot = delta.new_zeros(own.index.numel(), length)
        one_hot[torch.arange(own.index.numel(), device=delta.device), own.index] = 1
        return (delta, one_hot) if own.axis == "in" else (one_hot.t().contiguous(), delta)


class S2FTConv2d(ConvolutionSlice, S2FTLinear):
    """A convolution with trained slices of channels beside it, one an adapter."""


class S2FTModel(AdapterModel):
    """Chooses the slices of all targeted modules, block by block, and injects the layers."""

    prefix = prefix_of("s2ft")
    tuner_layer_cls = AdapterLayer
    without_targets = "; or set model.dummy_inputs = {argument: tensor}, by which coupled layers can be found"

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        # A name that names nothing is refused before any layer is replaced.
        expert_choice.targeted_experts(self.model, peft_config)
        # The first module of this injection chooses for all; an adapter of the same name may have gone before.
        self._chosen: dict[str, selecting.Slice] | None = None
        self.trained_and_total = (0, 0)

    def layer_options(self, config: S2FTConfig, path: str) -> dict[str, Any] | None:
        """The chosen entries of the module at ``path``; None when the budget gives it none."""
        if self._chosen is None:
            self._chosen = self._choose(config, None)
        chosen = self._chosen.get(path)
        return None if chosen is None else {"chosen": chosen}

    def adaptable(self, module: nn.Module) -> bool:
        """Convolutions too, where they mix all channels."""
        return super().adaptable(module) or is_whole_convolution(module)

    def layer_class(self, base: nn.Module) -> type[AdapterLayer]:
        """The layer for a convolution, or that for a linear one."""
        return S2FTConv2d if isinstance(base, nn.Conv2d) else S2FTLinear

    def default_targets(self) -> tuple[str, ...]:
        """The output side of every structure: by the table, and by a trace where that leaves layers of a block open."""
        layers, shapes = self._base_layers()
        by_name = super().default_targets()
        return (*by_name, *traced_targets(self.model, layers, shapes, by_name))

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            if peft_config.target_parameters is not None:
                return peft_config
            peft_config.target_parameters = expert_choice.default_expert_targets(self.model)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        # PEFT would wrap each parameter by itself; an expert's weights belong together.
        del model, low_cpu_mem_usage
        return expert_choice.inject_experts(self, peft_config, adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, ExpertLayer):
            # PEFT's would look for the one weight of a layer.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @property
    def permutation(self) -> BasePermutation:
        """The order in which the base's rows and columns stand."""
        return cast(BasePermutation, self.__dict__.setdefault("_permutation", BasePermutation()))

    def start_from_data(self, adapters: list[str], data: Calibration) -> None:
        """Choose the entries of adapters that wait for them, by what the batches show."""
        config = cast(S2FTConfig, self.peft_config[adapters[0]])
        layers, shapes = self._base_layers()
        questions = Questions(shapes)
        self._choice(config, shapes, questions)
        answers = questions.ask(data, layers, self.permutation, self._weight_squares(layers))
        ratio = config.achieved_ratio
        for path, chosen in self._choose(config, answers, starting=adapters).items():
            for adapter in adapters:
                cast(S2FTLinear, self.model.get_submodule(path)).choose(adapter, chosen)
        expert_choice.start_experts(self, adapters, config, data)
        config.achieved_ratio = ratio

    def _base_layers(self) -> tuple[dict[str, nn.Module], dict[str, tuple[int, int]]]:
        """The layers that could train, and their ``(out, in)``."""
        layers = dict(self._linears())
        return layers, {path: weight_shape(layer) for path, layer in layers.items()}

    def _weight_squares(self, layers: dict[str, nn.Module]) -> selecting.Squares:
        # A choice by weight reads the weights in the checkpoint's order, dequantised where needed, one at a time.
        def squares(measure: selecting.Measure, path: str, axis: Axis) -> Tensor:
            del measure
            layer = self.layer_class(layers[path])(layers[path], "probe", **get_quantization_kwargs(self))
            weight = self.permutation.original(path, layer.dense_weight())
            return weight.double().square().sum(0 if axis == "in" else 1).cpu()

        return squares

    def _choice(self, config: S2FTConfig, shapes: dict[str, tuple[int, int]], squares: selecting.Squares) -> Choice:
        targets = {path for path in shapes if self._check_target_module_exists(config, path)}
        layers, _ = self._base_layers()
        refuse_calibration(config.selection, {path: layers[path] for path in targets})
        found = discover(self.model, layers, shapes, targets, config.traced)
        config.traced = found.traced
        return choose(targets, config, shapes, found.structures, squares)

    def _choose(
        self, config: S2FTConfig, squares: selecting.Squares | None, starting: Iterable[str] = ()
    ) -> dict[str, selecting.Slice]:
        """The slices of all targeted modules; provisional ones while what decides them has not been measured."""
        layers, shapes = self._base_layers()
        waits = squares is None and config.selection in selecting.CALIBRATED
        choice = self._choice(config, shapes, squares or (Questions(shapes) if waits else self._weight_squares(layers)))
        slices = choice.slices()
        targets = {path for path in shapes if self._check_target_module_exists(config, path)}
        if targets and not slices and not config.target_parameters:
            raise TargetError(
                describe(
                    "S2FTConfig",
                    f"heads={config.heads}, channels={config.channels} choose nothing of "
                    + ", ".join(sorted(targets)[:3]),
                    "at least one head or channel of a targeted module",
                    "set channels for feed-forward or plain layers, heads for attention",
                )
            )
        trained = sum(each.index.numel() * shapes[path][each.axis == "out"] for path, each in slices.items())
        total = sum(shapes[path][0] * shapes[path][1] for path in targets)
        self.trained_and_total = (trained, total)
        config.achieved_ratio = trained / total if total else None
        if waits:
            # What comes from a file must know of the order that another adapter's choice gave to the base.
            slices = {path: replace(each, provisional=True) for path, each in slices.items()}
        elif config.permute:
            present = {name for layer in self._layers() for name in layer._get_available_adapters()}
            self.permutation.apply(layers, choice.layout, occupied=bool(present - set(starting)))
        return {path: self.permutation.place(path, each) for path, each in slices.items()}

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        model = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        self.permutation.undo(self.model)
        return model


def _trainable_parameters(config: S2FTConfig, out_features: int, in_features: int) -> int:
    part = find_structures({"layer": (out_features, in_features)}, None)[0].parts[0]
    return selecting.plain_channels(part, config.budget) * out_features


def _apply(model: nn.Module, config: S2FTConfig) -> nn.Module:
    return get_peft_model(model, config)


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
        needs_batches=lambda config: config.selection in selecting.CALIBRATED,
        toy_options={"heads": 1, "channels": 3},
    )
)
