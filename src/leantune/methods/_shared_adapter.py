"""Adapters that have one projection ``A`` a layer in common: how it is made, started, trained, checked and dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from leantune.core import packed_weight
from leantune.core.errors import AdapterError, ConfigError, raise_all
from leantune.methods import _shared_projection as sharing
from leantune.methods._base import AdapterLayer, AdapterModel, linear_features
from leantune.methods._calibration import Calibration
from leantune.methods._shared_projection import SharedProjection


class TaskFactor(nn.Module):
    """One task's ``B (out, r)``."""

    def __init__(self, out_features: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, rank))


class SharingLayer(AdapterLayer):
    """An adapter layer with ``multi_lora_B[task]`` and one ``multi_lora_shared``, which stays while a task does."""

    adapter_layer_names = ("multi_lora_B",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.multi_lora_shared: SharedProjection | None = None
        self.multi_lora_B = nn.ModuleDict()

    @property
    def shared(self) -> SharedProjection:
        """The layer's ``A``."""
        return cast(SharedProjection, self.multi_lora_shared)

    def factor(self, adapter: str) -> Tensor:
        """``B (out, r)`` of a task."""
        return cast(TaskFactor, self.multi_lora_B[adapter]).weight

    def take_shared(self, config: Any, path: str, given: Tensor | None) -> None:
        """Make ``A`` where there is none yet: as given, as drawn, or to wait for data.

        Args:
            config: of the first task.
            path: of the layer in the model, which a random ``A`` depends on.
            given: ``A`` from another adapter's file.
        """
        if self.multi_lora_shared is not None:
            return
        rank, device = min(config.r, self.in_features), self.weight.device
        value = given
        if value is None and not config.waits_for_data and device.type != "meta":
            value = sharing.draw(config.shared_init, rank, self.in_features, config.scaling, config.seed, path)
        if value is None:
            value = torch.zeros(rank, self.in_features)
        self.multi_lora_shared = SharedProjection(
            value.to(device, self.trained_dtype(), copy=True),
            trains=config.train_shared,
            waits=given is None and config.waits_for_data,
            scaling=config.scaling,
        )

    def waits_for_data(self, adapter: str) -> bool:
        """Whether ``A`` is still to be computed."""
        return adapter in self.multi_lora_B and self.shared.waits

    def _settle_shared(self) -> None:
        """``A`` trains when it may and some task's ``B`` does; it goes with the last task."""
        if self.multi_lora_shared is None:
            return
        if not self.multi_lora_B:
            self.multi_lora_shared = None
        elif self.shared.trains:
            self.shared.weight.requires_grad_(any(each.requires_grad for each in self.multi_lora_B.parameters()))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; ``A`` follows."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._settle_shared()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As PEFT's; ``A`` follows."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._settle_shared()

    def enable_adapters(self, enabled: bool) -> None:
        """As PEFT's; ``A`` follows."""
        super().enable_adapters(enabled)
        self._settle_shared()

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; ``A`` stays while another task is there."""
        super().delete_adapter(adapter_name)
        self._settle_shared()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if self.multi_lora_shared is not None and self.shared.weight.device.type != "meta":
            # A file read without copying brings its own dtype and device.
            self.shared.to(device or self.weight.device, self.trained_dtype())

    def _widen(self, names: list[str]) -> None:
        super()._widen(names)
        packed_weight.widen(self.shared)


class SharingModel(AdapterModel):
    """Sees to it that the tasks of a layer agree on their ``A``, and starts it from data where that is asked for."""

    def sharing_layers(self) -> dict[str, SharingLayer]:
        """The adapted layers by their path in the base model."""
        return {path: each for path, each in self.model.named_modules() if isinstance(each, SharingLayer)}

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        source = peft_config.shared_from
        self._given = {} if source is None else sharing.read_shared(source)
        raise_all(sharing.disagreements(peft_config, self._targeted(peft_config), self._given), ConfigError)

    def _targeted(self, config: Any) -> dict[str, tuple[int, SharedProjection | None]]:
        """Inputs, and ``A`` where there is one, of every layer that the config targets."""
        found = {}
        for path, base in self._linears():
            if self._check_target_module_exists(config, path):
                module = self.model.get_submodule(path)
                shared = module.multi_lora_shared if isinstance(module, SharingLayer) else None
                found[path] = (linear_features(base)[0], shared)
        return found

    def layer_options(self, config: Any, path: str) -> dict[str, Any] | None:
        """The path of the layer, and its ``A`` where that comes from another adapter's file."""
        del config
        return {"path": path, "given": self._given.get(path)}

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.sharing_layers().values() if not autocast_adapter_dtype else ():
            # What trains follows the wish for the base's dtype; a frozen A keeps the bits that its tasks agree on.
            if (
                layer.has(adapter_name)
                and layer.shared.trains
                and layer.weight.dtype in (torch.float16, torch.bfloat16)
            ):
                layer.shared.to(layer.weight.dtype)

    def start_from_data(self, adapters: list[str], data: Calibration) -> None:
        """Compute the ``A`` of every layer that waits and has one of the tasks."""
        layers = self.sharing_layers()
        waiting = {path: each for path, each in layers.items() if any(map(each.waits_for_data, adapters))}
        sources = {path: sharing.InputMoment(each.get_base_layer(), each.in_features) for path, each in waiting.items()}
        for group in sharing.groups_within(sources, data.gradient_bytes):
            for path, moment in data.activations({path: sources[path] for path in group}).items():
                shared = waiting[path].shared
                shared.start(sharing.principal_directions(moment, len(shared.weight)) / shared.scaling)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        found: dict[str, Any] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        used = {
            path: each.shared
            for path, each in model.named_modules()
            if isinstance(each, SharingLayer) and adapter_name in each.multi_lora_B and len(each.multi_lora_B) > 1
        }
        raise_all(sharing.other_projections(used, found, adapter_name), AdapterError)
        return found
