r"""LoRA that starts away from zero over an untouched base: ``W0 + s (B A - B0 A0)``, with ``B0 A0`` the start.

PiSSA and LoRA-GA start from factors that are not zero, and so that the function stays what it was, their code takes
``s B0 A0`` out of the base weight. An adapter made so means something else over the base as everybody has it. Here the
base is left alone and the start is taken out in the adapter: one stock LoRA of rank ``2 r``, half of it frozen::

    W0 + s [B, -B0] [A; A0]        B (out, r), A (r, in) train; B0, A0 are constants

In memory, in every checkpoint and in the file it is that same plain LoRA, with ``r`` and ``lora_alpha`` of its config
doubled: any reader of LoRA gets the trained function, and bfloat16 weights are not rounded a second time. The factors
themselves are computed by PEFT's own code, on a layer that is thrown away.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from leantune.core import packed_weight
from leantune.core.errors import MethodError, describe
from leantune.methods._calibration import Calibration, LinearGradient
from leantune.methods._initialization import StartingLayer, expects_file, waits

STARTS = ("pissa", "lora_ga")
FROM_DATA = "lora_ga"


def starts_elsewhere(config: LoraConfig) -> bool:
    """Whether the config asks for a start that is not zero."""
    start = config.init_lora_weights
    return isinstance(start, str) and start.startswith(STARTS)


class OffsetFactor(nn.Module):
    """A factor of rank ``2 r`` whose second half stays at the start; ``weight`` is the whole.

    Args:
        shape: of the half that trains.
        dim: along which the halves stand: 0 for ``A (2 r, in)``, 1 for ``B (out, 2 r)``.
        waits: whether the start is still to be computed.
    """

    def __init__(self, shape: tuple[int, ...], dim: int, waits: bool, **where: Any) -> None:
        super().__init__()
        self.dim, self.waits = dim, waits
        self.trained = nn.Parameter(torch.zeros(shape, **where))
        self.register_buffer("fixed", torch.zeros(shape, **where))

    @property
    def weight(self) -> Tensor:
        """Both halves."""
        return torch.cat([self.trained, cast(Tensor, self.fixed)], self.dim)

    def start(self, value: Tensor) -> None:
        """Begin at ``value``, and take it out again: of ``B`` the frozen half is negative."""
        with torch.no_grad():
            self.trained.copy_(value)
            cast(Tensor, self.fixed).copy_(value if self.dim == 0 else -value)
        self.waits = False

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T``."""
        return F.linear(x, self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.waits and not expects_file():
            raise waits(prefix.rstrip(".").rpartition(".")[2])
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        del local_metadata, strict, unexpected_keys
        key = f"{prefix}weight"
        if key not in state_dict:
            missing_keys.append(key)
        elif (value := state_dict[key]).shape != self.weight.shape:
            error_msgs.append(f"size mismatch for {key}: {tuple(value.shape)}, not {tuple(self.weight.shape)}")
        else:
            with torch.no_grad():
                for half, part in zip((self.trained, self.fixed), value.chunk(2, self.dim), strict=True):
                    cast(Tensor, half).copy_(part)
            self.waits = False


class OffsetLinear(StartingLayer, LoraLinear):
    """Stock LoRA on a linear layer or ``Conv1D``, whose adapters may start elsewhere than at zero."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if packed_weight.is_packed(base_layer):
            got = f"init_lora_weights={config.init_lora_weights!r} over packed weights"
            raise MethodError(describe("LoraConfig", got, "a base in plain numbers", "load it without quantization"))
        transposed = isinstance(base_layer, Conv1D)
        config.fan_in_fan_out = transposed
        super().__init__(base_layer, adapter_name, config=config, is_target_conv_1d_layer=transposed, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """As PEFT's; an adapter that starts elsewhere gets twice the rank, half of it frozen."""
        if starts_elsewhere(config) and not hasattr(config, "offset_start"):
            # The first layer of this injection is given the numbers from before.
            r, lora_alpha = 2 * r, lora_alpha * _double(config)
        start: str | None = getattr(config, "offset_start", None)
        plain = copy.copy(config)
        if start is not None:
            # PEFT's own start would write into the base weight.
            plain.init_lora_weights = True
        super().update_layer(adapter_name, r, lora_alpha=cast(int, lora_alpha), config=plain, **kwargs)
        if start is None:
            return
        where = {"device": self.lora_A[adapter_name].weight.device, "dtype": self._trained_dtype()}
        waits = start == FROM_DATA
        self.lora_A[adapter_name] = OffsetFactor((r // 2, cast(int, self.in_features)), 0, waits, **where)
        self.lora_B[adapter_name] = OffsetFactor((cast(int, self.out_features), r // 2), 1, waits, **where)
        twin = self._twin(adapter_name, config)
        if twin is not None:
            for container in (self.lora_A, self.lora_B):
                container[adapter_name].load_state_dict(container[twin].state_dict())
        elif not waits:
            self.begin(adapter_name, config, None)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _trained_dtype(self) -> torch.dtype:
        weight = cast(Tensor, self.get_base_layer().weight)
        return torch.float64 if weight.dtype == torch.float64 else torch.float32

    def _twin(self, adapter_name: str, config: LoraConfig) -> str | None:
        """An adapter of the same config object, whose true copy this one must be (a reference model)."""
        known: dict[str, LoraConfig] = self.__dict__.setdefault("_configs", {})
        known[adapter_name] = config
        twins = [name for name, other in known.items() if other is config and name != adapter_name]
        return next((name for name in twins if name in self.lora_A and not self.waits_for_data(name)), None)

    def begin(self, adapter_name: str, config: LoraConfig, gradient: Tensor | None) -> None:
        """Compute and place the start of one adapter.

        Args:
            adapter_name: the adapter.
            config: its config, with its rank doubled.
            gradient: ``dL/dW (out, in)``, for a start that comes from it.
        """
        factor_A, factor_B = (cast(OffsetFactor, each[adapter_name]) for each in (self.lora_A, self.lora_B))
        weight = cast(Tensor, self.get_base_layer().weight).detach()
        weight = weight.t() if self.fan_in_fan_out else weight
        B, A = start_factors(weight, config, self.r[adapter_name] // 2, self.scaling[adapter_name], gradient)
        factor_A.start(A)
        factor_B.start(B)

    def waits_for_data(self, adapter: str) -> bool:
        """Whether the gradient has still to be seen."""
        return adapter in self.lora_A and getattr(self.lora_A[adapter], "waits", False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's; in training no adapter may wait."""
        if self.training and not self.disable_adapters:
            self.require_start(self.active_adapters)
        result: Tensor = super().forward(x, *args, **kwargs)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's; no adapter may wait."""
        self.require_start(self.active_adapters if adapter_names is None else adapter_names)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)


def _double(config: Any) -> float:
    """Double the rank in a config, the scaling as it was; by how much ``lora_alpha`` grows for that."""
    factor = 2**0.5 if config.use_rslora else 2
    config.offset_start = config.init_lora_weights
    # One that waits for data says so until it has it.
    config.init_lora_weights = FROM_DATA if config.offset_start == FROM_DATA else True
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {name: 2 * r for name, r in config.rank_pattern.items()}
    config.alpha_pattern = {name: factor * alpha for name, alpha in config.alpha_pattern.items()}
    return factor


def start_factors(
    weight: Tensor, config: Any, r: int, scaling: float, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``(B0, A0)`` as PEFT computes them: ``B0 (out, r)``, ``A0 (r, in)``, float32.

    Args:
        weight: ``W0 (out, in)``; left as it is.
        config: its ``offset_start`` names the start, its ``lora_ga_config`` how a gradient is used.
        r: the rank.
        scaling: ``s``.
        gradient: ``dL/dW (out, in)`` for LoRA-GA.

    Raises:
        MethodError: the layer has not that many directions.
    """
    needed = 2 * r if gradient is not None else r
    if needed > min(weight.shape):
        got = f"{r}, whose start takes {needed} directions of a layer of {weight.shape[0]} x {weight.shape[1]}"
        most = min(weight.shape) * r // needed
        raise MethodError(describe("r", got, f"at most {most}", "lower r, or leave the small layers out"))
    plain = LoraConfig(r=r, lora_alpha=cast(int, scaling * r), init_lora_weights=config.offset_start)
    plain.lora_ga_config = config.lora_ga_config or LoraGAConfig()
    devices = [weight.device] if weight.device.type == "cuda" else []
    # PEFT draws random directions for its SVD: the same ones each time, and none from the run's own stream.
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        base: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        base.weight = nn.Parameter(weight.float(), requires_grad=False)
        if gradient is not None:
            base._peft_loraga_grad = gradient
        scratch: Any = LoraLinear(base, "start", config=plain, r=r, lora_alpha=plain.lora_alpha)
    return scratch.lora_B["start"].weight.detach(), scratch.lora_A["start"].weight.detach()


def start_from_gradients(model: nn.Module, adapters: list[str], data: Calibration) -> None:
    """Give waiting adapters their start from the gradient of each layer, one layer after the other.

    Args:
        model: the tuner, with its ``peft_config``.
        adapters: those that share one config object.
        data: measures the gradients.
    """
    config = cast(Any, model).peft_config[adapters[0]]
    layers = {name: each for name, each in model.named_modules() if isinstance(each, OffsetLinear)}
    layers = {name: each for name, each in layers.items() if any(map(each.waits_for_data, adapters))}
    sources = {
        name: LinearGradient(each.get_base_layer(), cast(tuple[int, int], (each.out_features, each.in_features)))
        for name, each in layers.items()
    }
    for name, gradient in data.weight_gradients(sources):
        for adapter in adapters:
            layers[name].begin(adapter, config, gradient)
    # From here on it is plain LoRA, and its file says so.
    config.init_lora_weights, config.lora_ga_config = True, None
