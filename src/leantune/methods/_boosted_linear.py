"""A linear layer with boosters beside it, and a working weight that finished ones can be folded into."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from leantune.methods._base import AdapterLayer
from leantune.methods._booster import Booster


class XGBLoraLinear(AdapterLayer):
    """A linear layer with boosters beside it. (PEFT looks for "Linear" in the name: all-linear.)"""

    adapter_layer_names = ("xgblora_booster",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.xgblora_booster = nn.ModuleDict()

    def booster(self, adapter: str) -> Booster:
        """The adapter's boosters here."""
        return cast(Booster, self.xgblora_booster[adapter])

    def update_layer(self, adapter_name: str, config: Any, template: str | None, **kwargs: Any) -> None:
        """Create a fresh booster (noise in B when ``init_weights`` is False), and none that is finished."""
        own = Booster(self.out_features, self.in_features, config.r, config.scaling)
        own.aligns = config.start == "gradient"
        own.start(config.seed, kwargs["path"], 0)
        if not config.init_weights:
            nn.init.normal_(own.B, std=0.02)
        self.xgblora_booster[adapter_name] = own
        self.place(adapter_name, inference_mode=config.inference_mode)
        if template is not None and template in self.xgblora_booster:
            own.copy_kept(self.booster(template))
        own.count(None if config.iteration_range is None else (config.iteration_range[0], config.iteration_range[1]))

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        """PEFT's word for "set what trains" comes also in the middle of a round (``disable_adapter`` ends with it)."""
        del adapter_names
        for own in self.xgblora_booster.values():
            if cast(Booster, own).resting:
                own.requires_grad_(False)

    @property
    def foldable(self) -> bool:
        """Whether a working weight can stand in for the base: a dense matrix in memory."""
        weight = getattr(self.base_layer, "weight", None)
        return type(self.base_layer) in (nn.Linear, Conv1D) and type(weight) is nn.Parameter and not weight.is_meta

    def fold(self, adapter: str) -> None:
        """Build the working weight of an adapter; the base weight is only read."""
        if self.foldable:
            self.booster(adapter).fold(self.dense_weight().detach())

    def fused(self, adapter: str, x: Tensor) -> Tensor | None:
        """The working weight and the booster in training, where boosters are folded."""
        own, base = self.booster(adapter), cast(nn.Linear, self.base_layer)
        if own.working is None or base._forward_hooks or base._forward_pre_hooks:
            return None
        result = nn.functional.linear(x, own.working, base.bias)
        share = own.share(x, folded=True)
        return result if share is None else result + share.to(result.dtype)

    def add_share(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        """``result`` plus what the boosters add, each as ``B (A x)``."""
        share = self.booster(adapter).share(x)
        return result if share is None else result + share.to(result.dtype)

    def delta_region(self, adapter: str) -> tuple[Tensor, int | None, Tensor | None]:
        """The sum of the boosters that count; it is of the whole weight."""
        own = self.booster(adapter)
        B, A = own.used()
        delta = B @ A
        if own.current_counts:
            delta = delta + own.scaling * (own.B.detach() @ own.A.detach())
        return delta, None, None

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The boosters that count, side by side: exact."""
        return self.booster(adapter).factors()
