"""The layer of LoRA-XS and LoRA-SB: a linear layer with ``s B R A`` beside it, one for each adapter."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from leantune.methods import _low_rank_start as starting
from leantune.methods._base import AdapterLayer
from leantune.methods._core_factor import CoreFactors
from leantune.methods._initialization import expects_file


class LoraXSLinear(AdapterLayer):
    """A linear layer with ``s B R A`` beside it, one an adapter."""

    adapter_layer_names = ("loraxs_core",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.loraxs_core = nn.ModuleDict()

    def own(self, adapter: str) -> CoreFactors:
        """The adapter's factors and core."""
        return cast(CoreFactors, self.loraxs_core[adapter])

    def update_layer(self, adapter_name: str, config: Any, template: str | None, **kwargs: Any) -> None:
        """Create an adapter of rank ``kwargs["rank"]``, and its start where no data is needed for it."""
        shape = (self.out_features, self.in_features)
        own = CoreFactors(shape, kwargs["rank"], config.alpha, config.dropout, precondition=config.precondition)
        self.loraxs_core[adapter_name] = own
        self.place(adapter_name, inference_mode=config.inference_mode)
        if template is not None and template in self.loraxs_core:
            own.copy_start(self.own(template))
            self._refresh_core(own, config)
        # What is made to be read from a file (PEFT says so by two of these) needs no decomposition.
        elif config.start != "update_svd" and not (config.inference_mode or expects_file() or own.weight.is_meta):
            self.start_without_data(adapter_name, config, kwargs["path"])

    def start_without_data(self, adapter: str, config: Any, path: str) -> None:
        """Start from the weight itself, from a fresh random one, or from noise."""
        own = self.own(adapter)
        if config.start == "weight_svd":
            # In float64: a file without the factors must find the same again, whatever library decomposes.
            start = starting.decompose(self.dense_weight().double(), own.rank, config.seed, path)
        else:
            drawn = starting.kaiming(self.out_features, self.in_features, own.B, config.seed, path)
            start = starting.decompose(drawn, own.rank, config.seed, path)
        self.start(adapter, config, start, keep_function=config.start == "weight_svd")
        self._refresh_core(own, config)

    @staticmethod
    def _refresh_core(own: CoreFactors, config: Any) -> None:
        """A core that is no part of the factors' start, whatever the adapter they were copied from has learnt."""
        if config.start == "weight_svd":
            nn.init.zeros_(own.weight)
        elif config.start is None:
            nn.init.normal_(own.weight, std=starting.NOISE)

    def start(self, adapter: str, config: Any, start: starting.Start, *, keep_function: bool) -> None:
        """Take the factors of a decomposed matrix, as the config splits them."""
        scaling = config.scaling(len(start.S))
        self.own(adapter).start(*start.factors(config.chosen_split, scaling, keep_function=keep_function))

    def spectrum(self, count: int, seed: int, path: str) -> Tensor:
        """The first ``count`` singular values of the base weight, on the CPU."""
        return starting.decompose(self.dense_weight().to(self.trained_dtype()), count, seed, path).S.cpu()

    def waits_for_data(self, adapter: str) -> bool:
        """Whether the factors are still to be computed, or read from a file."""
        return adapter in self.loraxs_core and self.own(adapter).waits

    def add_share(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        """``result + s x A^T R^T B^T``, added in the factors' dtype and rounded once."""
        return (result + self.own(adapter)(x)).to(result.dtype)

    def delta_region(self, adapter: str) -> tuple[Tensor, int | None, Tensor | None]:
        """``s B R A``, all of ``W``."""
        return self.own(adapter).delta(), None, None

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """``(s B R, A)``, of rank ``r``."""
        own = self.own(adapter)
        return own.left(), own.A
