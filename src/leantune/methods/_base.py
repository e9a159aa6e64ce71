"""What every adapter layer shares, written once: injection, forward, mixed batches, merge, exact undo, saving.

A method brings a config, a layer that says how its share of the output is formed, and one registering line. All
shapes here are in the orientation of ``nn.Linear``, weight ``(out, in)``; the transposed weight of GPT-2's ``Conv1D``
is turned at the edge, here.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from leantune.core import packed_weight
from leantune.core.errors import AdapterError, TargetError, describe, did_you_mean
from leantune.methods._block import keep_chosen_blocks
from leantune.methods._config import AdapterConfig as AdapterConfig
from leantune.methods._initialization import StartingLayer, StartingModel
from leantune.methods._region import read_region, write_region
from leantune.methods._registry import of_config
from leantune.methods.structure import default_targets

BASE_ROW = "__base__"
"""Name in ``adapter_names`` of a row that takes no adapter (PEFT's spelling)."""


class AdapterLayer(StartingLayer, nn.Module, BaseTunerLayer):
    """A linear base layer with adapters beside it; the base weight is written by :meth:`merge` alone.

    A method's layer names its containers in ``adapter_layer_names`` (``ModuleDict``s keyed by adapter) and gives
    :meth:`update_layer`, :meth:`add_share`, :meth:`delta_region` and :meth:`lora_factors`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.in_features, self.out_features = self.features()
        self.transposed = isinstance(self.get_base_layer(), Conv1D)
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        # What merging overwrote, newest last: (buffer name or the whole quantised parameter, dim, index).
        self._overwritten: list[tuple[Any, int | None, Tensor | None]] = []

    @abstractmethod
    def update_layer(self, adapter_name: str, config: Any, template: str | None, **kwargs: Any) -> None:
        """Create the adapter's parameters, then call :meth:`place`.

        Args:
            adapter_name: the new adapter.
            config: its config.
            template: an adapter that was made with the same config object, or None. What a start computed (indices,
                frozen factors) must be cloned from it: a reference model must be a true copy.
            kwargs: what the method's model passes for this module.
        """

    @abstractmethod
    def add_share(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        """``result`` ``(..., out)`` plus the adapter's share of the output for input ``x`` ``(..., in)``."""

    @abstractmethod
    def delta_region(self, adapter: str) -> tuple[Tensor, int | None, Tensor | None]:
        """``(delta, dim, index)``: what the adapter adds to ``weight.index_select(dim, index)``.

        Without ``index`` to all of it; with ``index`` and no ``dim``, to the entries of those flat positions.
        """

    @abstractmethod
    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """``(B, A)`` with ``B (out, k)``, ``A (k, in)`` and ``B A`` equal to the delta, scaling folded into ``B``."""

    def fused(self, adapter: str, x: Tensor) -> Tensor | None:
        """The whole layer by one kernel of the method's own; None where that kernel does not apply."""
        del adapter, x
        return None

    def features(self) -> tuple[int, int]:
        """``(in_features, out_features)`` of the base."""
        return linear_features(self.get_base_layer())

    def has(self, adapter: str) -> bool:
        """Whether this layer carries that adapter."""
        return any(adapter in getattr(self, name) for name in self.adapter_layer_names)

    def place(self, adapter_name: str, inference_mode: bool) -> None:
        """The end of every :meth:`update_layer`: onto the base's device, trainable when active.

        Trained parts are at least float32 whatever the base's dtype, and float64 over a float64 base.
        """
        self._move_adapter_to_device_of_base_layer(adapter_name)
        for container in self.adapter_layer_names:
            entry = getattr(self, container)
            if adapter_name in entry and self.trained_dtype() != next(entry[adapter_name].parameters()).dtype:
                entry[adapter_name].to(self.trained_dtype())
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def trained_dtype(self) -> torch.dtype:
        """float64 over a float64 base, else float32."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def dense_weight(self) -> Tensor:
        """The base weight ``(out, in)``, dequantised where needed; a view of it where it is dense."""
        return self._oriented_weight()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's change of the weight, dense, ``(out, in)`` (stored orientation for ``Conv1D``)."""
        delta, dim, index = self.delta_region(adapter)
        if index is not None:
            delta = write_region(delta.new_zeros(self.out_features, self.in_features), dim, index, delta)
        return delta.t() if self.transposed else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT asks this before its own (SVD) conversion; ours is exact: ``leantune.convert_to_lora``."""
        del adapter_name
        return True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``base(x)`` plus the share of each active adapter, or of each row's own adapter (``adapter_names``)."""
        names = kwargs.pop("adapter_names", None)
        if names is not None:
            self._check_mixed(x, names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if names is not None:
            return self._mixed_forward(x, names, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        active = [name for name in self.active_adapters if self.has(name)]
        if self.training:
            self.require_start(active)
        if self.quantization_backend is not None and self.training:
            # Some hosts cast what trains beside a quantised base to 16 bits, after the adapter was made.
            self._widen(active)
        if len(active) == 1 and not args and not kwargs:
            result = self.fused(active[0], x)
            if result is not None:
                return result
        result = self.base_layer(x, *args, **kwargs)
        for name in active:
            result = self.add_share(name, x, result)
        return result

    def _widen(self, names: list[str]) -> None:
        for container in self.adapter_layer_names:
            for name in names:
                if name in getattr(self, container):
                    packed_weight.widen(getattr(self, container)[name])

    def is_plain(self, x: Tensor) -> bool:
        """Whether a kernel may take the base's place: a dense frozen matrix of ``x``'s dtype that nobody hooks."""
        base = self.base_layer
        weight = getattr(base, "weight", None)
        bias = getattr(base, "bias", None)
        return (
            type(base) in (nn.Linear, Conv1D)
            and type(weight) is nn.Parameter
            and weight.dtype == x.dtype
            and not weight.requires_grad
            and not (bias is not None and bias.requires_grad)
            and not torch.is_autocast_enabled(x.device.type)
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and not base._backward_hooks
            and not base._backward_pre_hooks
        )

    def _check_mixed(self, x: Tensor, names: list[str]) -> None:
        if len(x) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_forward(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(names):
            if name == BASE_ROW or not self.has(name):
                continue
            rows = torch.tensor([row for row, own in enumerate(names) if own == name], device=x.device)
            result = result.index_copy(0, rows, self.add_share(name, x[rows], result[rows]))
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base weight, keeping what they overwrite so that :meth:`unmerge` is exact.

        Args:
            safe_merge: check for non-finite values first and change nothing when there are any.
            adapter_names: which ones; default: the active ones.

        Raises:
            ValueError: ``safe_merge`` found a non-finite value.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if not self.has(name):
                continue
            self.require_start([name])
            with torch.no_grad():
                self._merge_one(name, safe_merge)
            self.merged_adapters.append(name)

    def _merge_one(self, name: str, safe_merge: bool) -> None:
        delta, dim, index = self.delta_region(name)
        weight = self._oriented_weight()
        original = read_region(weight, dim, index)
        updated = (original.to(delta.dtype) + delta).to(weight.dtype)
        if safe_merge and not torch.isfinite(updated).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        if self.quantization_backend is not None:
            # Requantising cannot be undone by arithmetic: the quantised parameter itself is what is kept.
            self._overwritten.append((packed_weight.keep(self.get_base_layer()), None, None))
            whole = write_region(weight.clone(), dim, index, updated)
            self.set_base_weight(whole.t() if self.transposed else whole)
            return
        # A buffer, so that it follows the model to another device; not persistent: no file needs it.
        slot = f"_original_{len(self._overwritten)}"
        self.register_buffer(slot, original, persistent=False)
        self._overwritten.append((slot, dim, index))
        write_region(weight, dim, index, updated)

    def _oriented_weight(self) -> Tensor:
        """The base weight with outputs first, dequantised where needed; a view of it where it is dense."""
        weight = self.get_base_weight()
        return weight.t() if self.transposed else weight

    def unmerge(self) -> None:
        """Put back, bit for bit, what merging overwrote: all adapters, newest first.

        Subtracting the delta would not do: in bfloat16 it leaves 39% of a weight's entries changed.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        with torch.no_grad():
            while self._overwritten:
                kept, dim, index = self._overwritten.pop()
                if self.quantization_backend is not None:
                    packed_weight.put_back(self.get_base_layer(), kept)
                    continue
                write_region(self._oriented_weight(), dim, index, cast(Tensor, getattr(self, kept)))
                delattr(self, kept)
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return f"{type(self).__name__.lower()}.{super().__repr__()}"


def _pass_adapter_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    del module
    return args, {**kwargs, "adapter_names": adapter_names}


class AdapterModel(StartingModel):
    """Injects a method's layer into a model. A method sets ``prefix`` and ``tuner_layer_cls``, no more."""

    # Read by PEFT; our defaults come from the structures that are found in the model.
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012
    without_targets = ""
    """What else helps when no targets are given and there are no defaults, as the end of a sentence."""

    def layer_options(self, config: Any, path: str) -> dict[str, Any] | None:
        """What :meth:`AdapterLayer.update_layer` of the module at ``path`` gets; None leaves that module alone."""
        del config, path
        return {}

    def adaptable(self, module: nn.Module) -> bool:
        """Whether the method has a layer for this one: linear, transposed or packed."""
        return is_adaptable(module)

    def layer_class(self, base: nn.Module) -> type[AdapterLayer]:
        """The layer that wraps ``base``."""
        del base
        return cast(type[AdapterLayer], self.tuner_layer_cls)

    def default_targets(self) -> tuple[str, ...]:
        """What trains when the user names nothing; empty where the model is of no known family."""
        return default_targets([name for name, _ in self.model.named_modules()])

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            found = self.default_targets()
            if not found:
                raise TargetError(
                    describe(
                        f"{type(peft_config).__name__}.target_modules",
                        f"not given, and a model of type '{model_config.get('model_type', 'unknown')}' has no default",
                        "Please specify `target_modules` in `peft_config`",
                        self._what_is_there() + self.without_targets,
                    )
                )
            peft_config.target_modules = set(found)
        keep_chosen_blocks(peft_config, self.model)
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, but an error lists what is there when nothing matches, and a start reads the bare base."""
        merged = [layer for layer in self._layers() if layer.merged]
        if merged:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.")
            for layer in merged:
                layer.unmerge()
        packed_weight.steady(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except TargetError:
            raise
        except ValueError as error:
            if "odule" not in str(error) or "arget" not in str(error):
                raise
            targets = cast(AdapterConfig, self.peft_config[adapter_name]).target_modules
            near = ""
            if isinstance(targets, set) and len(targets) == 1:
                near = " " + did_you_mean(next(iter(targets)), self._linear_names())
            raise TargetError(
                describe("target_modules", str(error), "names of linear modules", self._what_is_there() + near)
            ) from error

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        """As PEFT's, but unloading alone gives back the base as it was, also where an adapter is merged."""
        for layer in self._layers() if not merge else ():
            if layer.merged:
                layer.unmerge()
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def _check_merge_allowed(self) -> None:
        """Also refuse, before any weight is written, what its method says is no change of weights."""
        super()._check_merge_allowed()
        for name, config in self.peft_config.items():
            method = of_config(config)
            if not method.mergeable:
                do = "keep the adapter beside the base"
                raise AdapterError(describe(f"adapter '{name}'", method.cannot_merge, "a change of weights", do))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As PEFT's: ``autocast_adapter_dtype=False`` is a wish for the base's dtype, which ours otherwise exceeds."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in self._layers():
            dtype = layer.weight.dtype
            # A quantised base has no such dtype to follow.
            for container in layer.adapter_layer_names if dtype in (torch.float16, torch.bfloat16) else ():
                entry = getattr(layer, container)
                if adapter_name in entry:
                    entry[adapter_name].to(dtype)

    def _linear_names(self) -> list[str]:
        return sorted({name.rpartition(".")[2] for name, module in self._linears()})

    def _linears(self) -> list[tuple[str, nn.Module]]:
        """All layers that could take an adapter, by their path in the unadapted model."""
        found = []
        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer):
                if self.adaptable(module.get_base_layer()):
                    found.append((name, module.get_base_layer()))
            elif self.adaptable(module) and not name.endswith("base_layer"):
                found.append((name, module))
        return found

    def _what_is_there(self) -> str:
        names = self._linear_names()
        return "the model's linear modules are " + ", ".join(names) if names else "the model has no linear module"

    def _template(self, config: Any, adapter_name: str) -> str | None:
        for name, other in self.peft_config.items():
            if name != adapter_name and other is config:
                return name
        return None

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        del parameter_name
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not self.adaptable(base):
            raise TargetError(
                describe(
                    current_key,
                    f"Target module {type(base).__name__} is not supported",
                    "torch.nn.Linear, transformers Conv1D, or a quantised linear",
                    self._what_is_there(),
                )
            )
        options = self.layer_options(peft_config, current_key)
        if options is None:
            return
        options = {**options, "template": self._template(peft_config, adapter_name)}
        layer_class = self.layer_class(base)
        if isinstance(target, layer_class):
            target.update_layer(adapter_name, peft_config, **options)
            return
        layer = layer_class(target, adapter_name, **get_quantization_kwargs(self))
        layer.update_layer(adapter_name, peft_config, **options)
        if adapter_name not in self.active_adapters:
            # An additional adapter is not trained until it is chosen.
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names`` (one name a row) to every adapter layer for the time of one forward."""
        del args
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in self._layers() for name in layer._get_available_adapters()}
        unknown = sorted({name for name in names if name != BASE_ROW} - known)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams") or 1
        # Beam search repeats each row; an encoder still sees it once.
        repeated = [name for name in names for _ in range(beams)]
        model_config = getattr(self.model, "config", None)
        encoder = self.model.get_encoder() if getattr(model_config, "is_encoder_decoder", False) else None
        in_encoder = set(encoder.modules()) if encoder is not None else set()
        handles = []
        for module in self.modules():
            if isinstance(module, (AdapterLayer, AuxiliaryTrainingWrapper)):
                own = names if module in in_encoder else repeated
                hook = partial(_pass_adapter_names, adapter_names=own)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _layers(self) -> list[AdapterLayer]:
        return [module for module in self.modules() if isinstance(module, AdapterLayer)]


def linear_features(module: nn.Module) -> tuple[int, int]:
    """``(in_features, out_features)`` of a linear layer, transposed (``Conv1D``) and quantised ones included.

    Raises:
        TargetError: the layer is of no kind that PEFT can measure.
    """
    width_in, out = _get_in_out_features(module)
    if width_in is None or out is None:
        raise TargetError(
            describe(type(module).__name__, "no known width", "a linear layer", "leave it out of target_modules")
        )
    return width_in, out


def is_adaptable(module: nn.Module) -> bool:
    """Whether it is linear: plain, transposed (``Conv1D``) or packed."""
    return isinstance(module, (nn.Linear, Conv1D)) or resolve_quantization_backend(module) is not None
