r"""Bottleneck adapters: a small network of two layers after a linear layer (series) or beside it (parallel).

    series:      y = W x + b;   y' = y + s U f(D y)      D (k, out), U (out, k)
    parallel:    y = W x + b;   y' = y + s U f(D x)      D (k, in),  U (out, k)

``k`` is the width of the bottleneck and ``f`` its non-linearity; ``U`` is zero at start. ``D`` and ``U`` are float32.

Source: series: Houlsby et al., arXiv 1902.00751, figure 2; parallel: He et al., arXiv 2110.04366, eq. 9. The defaults
are those of LLM-Adapters (arXiv 2304.01933), which the S2FT paper's tables compare with: width 256, tanh, in series
after the feed-forward network, in parallel beside its up and its down projection. Their trained shares of LLaMA-7B,
0.99% and 3.54%, are what these targets give without biases.

Where we deviate: there both matrices start from noise; here ``U`` starts from zero, as in Houlsby et al. up to their
noise, so that a fresh adapter changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import get_peft_model
from torch import Tensor, nn

from leantune.core.errors import ConfigError, describe, did_you_mean, raise_all
from leantune.methods._base import AdapterConfig, AdapterLayer, AdapterModel
from leantune.methods._family import places
from leantune.methods._peft import add_peft_type, prefix_of, register_with_peft
from leantune.methods._region import NoRegion
from leantune.methods._registry import Method, register

_ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}
_CHOICES = {"placement": ("series", "parallel"), "non_linearity": tuple(_ACTIVATIONS)}
_CANNOT_MERGE = "a bottleneck is not linear, so that no weight of the base can hold it"


@dataclass
class BottleneckConfig(AdapterConfig):
    """Options of series and parallel adapters.

    Raises:
        ConfigError: a value out of range, or an unknown choice; all problems at once.
    """

    placement: str = field(
        default="series",
        metadata={"help": "'series': on the output of each targeted layer; 'parallel': beside it, on its input."},
    )
    bottleneck_size: int = field(default=256, metadata={"help": "Width of the bottleneck."})
    non_linearity: str = field(
        default="tanh", metadata={"help": "Between its layers: " + ", ".join(_ACTIVATIONS) + "."}
    )
    scaling: float = field(default=1.0, metadata={"help": "Factor of the adapter's share of the output."})
    with_bias: bool = field(default=False, metadata={"help": "Give both layers of the adapter a bias."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("bottleneck")
        problems = [
            describe(f"BottleneckConfig.{name}", repr(getattr(self, name)), "one of " + ", ".join(known), near)
            for name, known in _CHOICES.items()
            if getattr(self, name) not in known
            for near in [did_you_mean(str(getattr(self, name)), known)]
        ]
        if self.bottleneck_size < 1:
            got = repr(self.bottleneck_size)
            problems.append(describe("BottleneckConfig.bottleneck_size", got, "a width from 1", "try 64"))
        raise_all(problems, ConfigError)


class BottleneckLinear(NoRegion, AdapterLayer):
    """A linear layer with bottlenecks after or beside it, one an adapter; those active together follow each other.

    PEFT finds it by the "Linear" in its name when a further adapter targets "all-linear".
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("configs",)
    cannot_merge = _CANNOT_MERGE

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        # PEFT reads an adapter's name one level above the parameter: a container for each of the two layers.
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.configs: dict[str, BottleneckConfig] = {}

    def update_layer(self, adapter_name: str, config: BottleneckConfig, template: str | None, **kwargs: Any) -> None:
        """Create both layers; the second one zero."""
        del template, kwargs
        source = self.out_features if config.placement == "series" else self.in_features
        down = nn.Linear(source, config.bottleneck_size, bias=config.with_bias)
        up = nn.Linear(config.bottleneck_size, self.out_features, bias=config.with_bias)
        nn.init.normal_(up.weight, std=0.0 if config.init_weights else 0.2)
        if config.with_bias:
            nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.configs[adapter_name] = config
        self.place(adapter_name, inference_mode=config.inference_mode)

    def add_share(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        """``result`` plus the bottleneck of it, or of ``x``."""
        config, down = self.configs[adapter], cast(nn.Linear, self.bottleneck_down[adapter])
        source = result if config.placement == "series" else x
        hidden = _ACTIVATIONS[config.non_linearity](down(source.to(down.weight.dtype)))
        share: Tensor = self.bottleneck_up[adapter](hidden) * config.scaling
        return result + share.to(result.dtype)


def feed_forward_layers(paths: Iterable[str]) -> list[tuple[str, str]]:
    """The up and the down projection of every feed-forward network that a family knows; of a gate and an up, the up."""
    up: dict[str, str] = {}
    found = []
    for path, place in places(paths).items():
        if place.kind != "ffn":
            continue
        if place.role == "down":
            found.append((place.block, path))
        else:
            # The gate stands before the up projection.
            up[place.block] = path
    return [(up[block], down) for block, down in found if block in up]


class BottleneckModel(AdapterModel):
    """Injects the layers."""

    prefix = prefix_of("bottleneck")
    tuner_layer_cls = BottleneckLinear

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            paths = [name for name, _ in self._linears()]
            series = peft_config.placement == "series"
            wanted = {path for up, down in feed_forward_layers(paths) for path in ((down,) if series else (up, down))}
            if wanted:
                peft_config.target_modules = _short(wanted, paths)
        return super()._prepare_adapter_config(peft_config, model_config)

    def default_targets(self) -> tuple[str, ...]:
        """Nothing further: what S2FT trains by default is no place for a bottleneck."""
        return ()


def _short(wanted: set[str], paths: list[str]) -> set[str]:
    """The shortest path endings that match these of all paths; the whole paths where no ending does."""
    for depth in range(1, max(path.count(".") for path in wanted) + 1):
        endings = {".".join(path.split(".")[-depth:]) for path in wanted}
        if {path for path in paths if any(f".{path}".endswith(f".{end}") for end in endings)} == wanted:
            return endings
    return wanted


def _trainable_parameters(config: BottleneckConfig, out_features: int, in_features: int) -> int:
    source = out_features if config.placement == "series" else in_features
    biases = (config.bottleneck_size + out_features) if config.with_bias else 0
    return config.bottleneck_size * (source + out_features) + biases


def _apply(model: nn.Module, config: BottleneckConfig) -> nn.Module:
    return get_peft_model(model, config)


register_with_peft("bottleneck", BottleneckConfig, BottleneckModel)
SERIES = register(
    Method(
        name="series-adapter",
        title="Series bottleneck adapter",
        config=BottleneckConfig,
        formula="y + s U f(D y), y = W x",
        paper="arXiv 1902.00751; LLM-Adapters, 2304.01933",
        trainable_parameters=_trainable_parameters,
        apply=_apply,
        mergeable=False,
        lora_form=False,
        cannot_merge=_CANNOT_MERGE,
        default_learning_rate=1e-3,
        toy_options={"bottleneck_size": 4},
    )
)
register(
    SERIES.preset(
        "parallel-adapter",
        {"placement": "parallel"},
        title="Parallel bottleneck adapter",
        formula="W x + s U f(D x)",
        paper="arXiv 2110.04366; LLM-Adapters, 2304.01933",
    )
)
