"""The part of a weight that an adapter changes: read, written, put back; and what layers say that change none."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from leantune.core.errors import AdapterError, describe


def read_region(weight: Tensor, dim: int | None, index: Tensor | None) -> Tensor:
    """A copy of the part of a weight that :meth:`AdapterLayer.delta_region` names."""
    if index is None:
        return weight.clone()
    index = index.to(weight.device)
    # Flat positions are those of (out, in), whatever the strides.
    return weight.take(index.long()) if dim is None else weight.index_select(dim, index)


def write_region(weight: Tensor, dim: int | None, index: Tensor | None, values: Tensor) -> Tensor:
    """Write that part in place; the weight itself."""
    if index is None:
        return weight.copy_(values)
    index = index.to(weight.device)
    return weight.put_(index.long(), values) if dim is None else weight.index_copy_(dim, index, values)


class NoRegion:
    """A layer whose share is no change of its base's weight; stands before ``AdapterLayer`` in the bases.

    Attributes:
        cannot_merge: why, as ``Method.cannot_merge`` says it.
    """

    cannot_merge = ""

    def _refuse(self, adapter: str) -> NoReturn:
        do = "keep the adapter beside the base"
        raise AdapterError(describe(f"adapter '{adapter}'", self.cannot_merge, "a change of weights", do))

    def delta_region(self, adapter: str) -> NoReturn:
        """There is none."""
        self._refuse(adapter)

    def lora_factors(self, adapter: str) -> NoReturn:
        """There are none."""
        self._refuse(adapter)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's own converter must not take it for a matrix either."""
        del adapter_name
        return False
