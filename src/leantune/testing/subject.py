"""What a check gets: one method with one set of options, and the tiny models to try it on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from leantune.methods import Method
from leantune.methods._base import AdapterLayer
from leantune.methods._initialization import StartingLayer, initialize
from leantune.testing import model as tiny

STEP_SIZE = 0.05
"""Of a start that is an optimizer's first step; methods with another start ignore it."""

Wrapped = Any
"""A model with a method on it: a ``PeftModel``, or the model itself where the method is no adapter."""


class NotApplicable(Exception):
    """A check does not apply, by a fact that the method or its layers state; the text is that fact."""


def only_when(fact: bool, otherwise: str) -> None:
    """Leave the check when ``fact`` is false; ``otherwise`` says why it does not apply."""
    if not fact:
        raise NotApplicable(otherwise)


@dataclass(frozen=True)
class Subject:
    """One method, its options on tiny models, and a family of language model.

    Attributes:
        method: the registered method.
        options: options of its config that replace its ``toy_options``.
        family: one of ``leantune.testing.model.FAMILIES``.
    """

    method: Method
    options: Mapping[str, Any] = field(default_factory=dict)
    family: str = "llama"

    def config(self, **more: Any) -> Any:
        """A config with the toy options, those of this subject, and ``more``."""
        return self.method.make_config(**{**self.method.toy_options, **self.options, **more})

    def base(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The language model; the same weights at each call."""
        return tiny.language_model(self.family, dtype)

    def wrap(self, base: nn.Module | None = None, *, started: bool = True, **more: Any) -> Wrapped:
        """The method on a model, by default the float64 language model; the same numbers at each call.

        Args:
            base: another model.
            started: give the trained parameters values as after some training (a fresh adapter often does nothing).
            more: further options of the config.
        """
        if base is None:
            base = self.base()
        if self.method.is_adapter and hasattr(base, "config"):
            more.setdefault("task_type", "CAUSAL_LM")
        with torch.random.fork_rng(devices=[]):
            # A seed of its own: a method that draws anew on load must not draw the same by chance.
            torch.manual_seed(20240717)
            config = self.config(**more)
            wrapped = self.method.apply(base, config)
            if self.method.needs_batches(config):
                initialize(wrapped, calibration_batches(wrapped), step_size=STEP_SIZE, loss=calibration_loss)
        if started:
            start(wrapped)
        return wrapped.eval()

    def add(self, model: Wrapped, adapter: str, **more: Any) -> None:
        """A further adapter of this method on a language model, as fresh as one can be trained."""
        config = self.config(task_type="CAUSAL_LM", **more)
        model.add_adapter(adapter, config)
        # A method may let it share the start of the adapters that are there.
        starting = (each for each in model.modules() if isinstance(each, StartingLayer))
        if any(each.waits_for_data(adapter) for each in starting):
            initialize(model, calibration_batches(model), step_size=STEP_SIZE, loss=calibration_loss)

    def wrap_perceptron(self, dtype: torch.dtype = torch.float64, *, started: bool = True, **more: Any) -> Wrapped:
        """The method on both linear layers of the perceptron."""
        if self.method.is_adapter:
            more = {"target_modules": ["lin0", "lin1"], **more}
        return self.wrap(tiny.perceptron(dtype), started=started, **more)


def calibration_batches(model: Wrapped) -> list[dict[str, Tensor]]:
    """Two batches for a start that comes from data, for whichever tiny model it is."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(inner, "config"):
        return [{"input_ids": tokens(rows, 6, seed=rows)} for rows in (3, 2)]
    layer = next(module for module in inner.modules() if isinstance(module, nn.Linear))
    dtype = layer.weight.dtype
    return [{"x": points(rows, dtype, seed=rows, width=layer.in_features)} for rows in (3, 2)]


def calibration_loss(model: Wrapped, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of such a batch, which no labels are needed for."""
    return objective(model(batch["x"]) if "x" in batch else model(**batch).logits)


def start(model: Wrapped, adapter: str | None = None, seed: int = 1) -> None:
    """Give the trained parameters (of one adapter) values as after some training: noise, seeded."""
    generator = torch.Generator().manual_seed(seed)
    touched = 0
    with torch.no_grad():
        for parameter in trained(model, adapter).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype) * 0.3)
            touched += parameter.numel()
    if touched == 0:
        raise AssertionError(f"adapter {adapter or '(active)'}: nothing trains")


def trained(model: Wrapped, adapter: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; with ``adapter``, those of that adapter whether it is active or not."""
    if adapter is None:
        return {name: value for name, value in model.named_parameters() if value.requires_grad}
    return {name: value for name, value in model.named_parameters() if adapter in name.split(".")}


def tokens(rows: int = 3, length: int = 7, seed: int = 3) -> Tensor:
    """Token ids, ``(rows, length)``, seeded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny.VOCABULARY, (rows, length), generator=generator)


def points(rows: int = 5, dtype: torch.dtype = torch.float64, seed: int = 4, width: int = 6) -> Tensor:
    """Inputs of the perceptron, ``(rows, width)``, seeded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)


def logits(model: Wrapped, ids: Tensor, **more: Any) -> Tensor:
    """The language model's logits, ``(rows, length, vocabulary)``."""
    return model(input_ids=ids, **more).logits


def no_grad_logits(model: Wrapped, ids: Tensor, **more: Any) -> Tensor:
    """The logits, detached."""
    with torch.no_grad():
        return logits(model, ids, **more)


def objective(output: Tensor, seed: int = 5) -> Tensor:
    """A smooth scalar of an output whose gradient is of its own size: a seeded weighted sum of squares and entries.

    transformers' loss is formed in float32 and would hide what float64 shows.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return (output * weight).sum() + 0.5 * (output.square() * weight).sum()


def gradients(model: Wrapped) -> dict[str, Tensor]:
    """A copy of the gradient of every trained parameter; a missing one is an error."""
    found: dict[str, Tensor] = {}
    for name, parameter in trained(model).items():
        if parameter.grad is None:
            raise AssertionError(f"{name}: trains but got no gradient")
        found[name] = parameter.grad.clone()
    model.zero_grad()
    return found


def layers_of(model: Wrapped) -> dict[str, Any]:
    """The adapted layers, by their path in the base model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {name: module for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}


def own_layers(model: Wrapped) -> dict[str, AdapterLayer]:
    """The adapted layers that stand on :class:`leantune.methods._base.AdapterLayer`, with its promises."""
    return {name: layer for name, layer in layers_of(model).items() if isinstance(layer, AdapterLayer)}


def dense_twin(base: nn.Module, model: Wrapped, adapters: list[str]) -> nn.Module:
    """``base`` with the delta of the adapters of ``model`` added to its weights: the reference of every forward."""
    with torch.no_grad():
        for path, layer in layers_of(model).items():
            weight = base.get_parameter(f"{path}.weight")
            for adapter in adapters:
                weight.add_(_delta(layer, adapter).to(weight.dtype))
    return base


def _delta(layer: Any, adapter: str) -> Tensor:
    """The adapter's change of the stored weight; of a variant that is more than ``B A``, what its merge does."""
    if adapter not in getattr(layer, "lora_variant", {}):
        return layer.get_delta_weight(adapter)
    merged = copy.deepcopy(layer)
    merged.merge(adapter_names=[adapter])
    return merged.get_base_layer().weight - layer.get_base_layer().weight
