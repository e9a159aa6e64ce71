r"""S2FT on a convolution: a trained slice of whole input or output channels.

With ``W (out, in, kh, kw)`` unfolded to ``(out, in kh kw)``, a convolution is a linear layer over patches, and an input
channel is ``kh kw`` columns side by side. So the slice is that of a linear layer::

    input channels S:     y = conv(x, W) + conv(x[S], D)         D (out, s kh kw), read as (out, s, kh, kw)
    output channels S:    y = conv(x, W);  y[S] += conv(x, D)    D (s, in kh kw), read as (s, in, kh, kw)

and so is its form as LoRA: ``D E`` over patches, which PEFT stores as a convolution and one of 1 x 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from leantune.core.errors import TargetError, describe
from leantune.methods._base import linear_features
from leantune.methods._selection import CALIBRATED


def is_whole_convolution(module: nn.Module) -> bool:
    """Whether it is a 2-D convolution in which every output channel reads every input channel."""
    return isinstance(module, nn.Conv2d) and module.groups == 1


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a layer's weight; a convolution's kernel counts as ``in``."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.weight[0].numel()
    width_in, out = linear_features(layer)
    return out, width_in


def refuse_calibration(selection: str, layers: Mapping[str, nn.Module]) -> None:
    """Raise TargetError where channels of a convolution would be ranked by batches, which measures entries of lines."""
    found = [path for path, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    if selection in CALIBRATED and found:
        got = f"selection='{selection}' of a convolution ({found[0]})"
        raise TargetError(describe("S2FTConfig", got, "a linear layer", "use selection='weight' or 'random'"))


class ConvolutionSlice:
    """What differs from a slice of a linear layer; stands before that class in the bases."""

    base_layer: nn.Module
    in_features: int

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)  # type: ignore[call-arg]
        self.in_features = weight_shape(self._convolution)[1]

    @property
    def _convolution(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.get_base_layer())  # type: ignore[attr-defined]

    def _kernel(self, delta: Tensor) -> Tensor:
        """The delta as the weight of a convolution."""
        return delta.view(len(delta), -1, *self._convolution.weight.shape[2:])

    def _input_channels(self, columns: Tensor) -> Tensor:
        places = self._convolution.weight[0, 0].numel()
        return columns[::places] // places

    def dense_weight(self) -> Tensor:
        """The base weight unfolded, ``(out, in kh kw)``."""
        return self._convolution.weight.flatten(1)

    def fused(self, adapter: str, x: Tensor) -> Tensor | None:
        """There is no kernel for convolutions."""
        del adapter, x
        return None

    def add_share(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        """``result + conv(x[S], D)``, or ``result[S] += conv(x, D)``."""
        own = self.s2ft_slice[adapter]  # type: ignore[attr-defined]
        x = x.to(own.weight.dtype)
        if own.axis == "in":
            x = x.index_select(-3, self._input_channels(own.index))
        share = self._convolution._conv_forward(x, self._kernel(own.weight), None).to(result.dtype)
        return result + share if own.axis == "in" else result.index_add(-3, own.index, share)

    def delta_region(self, adapter: str) -> tuple[Tensor, int | None, Tensor | None]:
        """The slice as a kernel, and its input or output channels."""
        own = self.s2ft_slice[adapter]  # type: ignore[attr-defined]
        delta = self._kernel(own.weight.detach())
        return (delta, 1, self._input_channels(own.index)) if own.axis == "in" else (delta, 0, own.index)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's change of the weight, ``(out, in, kh, kw)``."""
        delta, dim, index = self.delta_region(adapter)
        assert dim is not None
        assert index is not None
        dense = delta.new_zeros(self._convolution.weight.shape)
        return dense.index_copy(dim, index, delta)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's own converter is for linear layers; ours is exact: ``leantune.convert_to_lora``."""
        del adapter_name
        return False
