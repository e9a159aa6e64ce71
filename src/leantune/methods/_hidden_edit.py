"""LoReFT's edit of hidden states, and the layers that do it: on a linear layer, on a block of a transformer."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leantune.core import packed_weight
from leantune.core.errors import TargetError, describe
from leantune.methods._base import BASE_ROW, AdapterLayer, is_adaptable, linear_features
from leantune.methods._position import Positions, parse
from leantune.methods._region import NoRegion

CANNOT_MERGE = "an edit of hidden states at some positions is no change of weights"


def orthonormal_rows(free: Tensor) -> Tensor:
    """``R`` with the row space of ``free (r, d)``: rows of Q in ``free^T = Q T``, ``T`` with a positive diagonal."""
    wide = free if free.dtype == torch.float64 else free.float()
    q, t = torch.linalg.qr(wide.mT)
    diagonal = t.diagonal().detach()
    return (q * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype)).mT


class Edit(nn.Module):
    """One adapter's edit: the free matrix behind ``R``, ``W``, ``b``."""

    def __init__(self, rank: int, width: int) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.empty(rank, width))
        self.source = nn.Parameter(torch.empty(rank, width))
        self.offset = nn.Parameter(torch.zeros(rank))
        nn.init.orthogonal_(self.free)
        nn.init.kaiming_uniform_(self.source, a=5**0.5)

    def rotation(self) -> Tensor:
        """``R``, orthonormal rows."""
        return orthonormal_rows(self.free)

    def do_nothing(self) -> None:
        """``W = R`` to the bit, in the dtype that it has by now."""
        with torch.no_grad():
            self.source.copy_(self.rotation())

    def forward(self, hidden: Tensor) -> Tensor:
        """``R^T ((W - R) h + b)`` for ``h (..., d)``, in the dtype of ``h``."""
        with torch.autocast(hidden.device.type, enabled=False):
            R = self.rotation()
            inner = F.linear(hidden.to(R.dtype), self.source.to(R.dtype) - R, self.offset.to(R.dtype))
            return F.linear(inner, R.mT).to(hidden.dtype)


class LoReFTLinear(NoRegion, AdapterLayer):
    """A module whose output is edited, here a linear layer. PEFT looks for "Linear" in the name (all-linear).

    The edit is done by a forward hook of the module itself, which comes before any other: who reads the module's
    output by a hook (``output_hidden_states`` of transformers) reads what the next block is given.
    """

    adapter_layer_names = ("lore_ft_edit", "lore_ft_last")
    other_param_names = ("places",)
    cannot_merge = CANNOT_MERGE

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.lore_ft_edit, self.lore_ft_last = nn.ModuleDict(), nn.ModuleDict()
        self.places: dict[str, tuple[int, int]] = {}
        self.positions: Positions | None = None
        self._row_names: list[str] | None = None
        self._over_packed = any(map(packed_weight.is_packed, base_layer.modules()))
        base_layer.register_forward_hook(self._edit_output, prepend=True)

    def release(self) -> None:
        """Take the hook off the module, which then is as it was."""
        hooks = self.base_layer._forward_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
            del hooks[key]

    def update_layer(self, adapter_name: str, config: Any, template: str | None, **kwargs: Any) -> None:
        """Create the edit, or one for each end."""
        del template
        self.positions = kwargs["positions"]
        if self.positions is None and not config.share_weights:
            got = "share_weights=False on a model that is none of transformers'"
            raise TargetError(describe("LoReFTConfig", got, "one whose positions are known", "set share_weights=True"))
        width = self.out_features
        self.places[adapter_name] = parse(config.positions)
        containers = [self.lore_ft_edit] if config.share_weights else [self.lore_ft_edit, self.lore_ft_last]
        for container in containers:
            container[adapter_name] = Edit(min(config.r, width), width)
        self.place(adapter_name, inference_mode=config.inference_mode)
        for container in containers if config.init_weights else ():
            cast(Edit, container[adapter_name]).do_nothing()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module, whose hook edits what comes out."""
        self._row_names = kwargs.pop("adapter_names", None)
        if self.training and self._over_packed:
            # Some hosts cast what trains beside a quantised base to 16 bits, after the adapter was made.
            self._widen([name for name in self.active_adapters if self.has(name)])
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            self._row_names = None

    def add_share(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        """``result`` with the adapter's edit at its positions."""
        del x
        return self._edited(adapter, result, None)

    def _edit_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        if self.disable_adapters or (self.positions is not None and self.positions.behind_prefix):
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        names = self._row_names
        if names is None:
            for name in self.active_adapters:
                if self.has(name):
                    hidden = self._edited(name, hidden, None)
        else:
            self._check_mixed(hidden, names)
            for name in dict.fromkeys(names):
                if name != BASE_ROW and self.has(name):
                    rows = torch.tensor([own == name for own in names], device=hidden.device)
                    hidden = self._edited(name, hidden, rows)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _edited(self, adapter: str, hidden: Tensor, rows: Tensor | None) -> Tensor:
        """``hidden (rows, ..., d)`` with the edit of one adapter, in these rows alone."""
        edit = cast(Edit, self.lore_ft_edit[adapter])
        if self.positions is None:
            return hidden + edit(hidden) if rows is None else _at(hidden, rows.nonzero()[:, 0], edit)
        first, last = self.positions.find(*self.places[adapter], hidden)
        if rows is not None:
            first, last = first & rows[:, None], last & rows[:, None]
        flat = hidden.flatten(0, 1)
        if adapter not in self.lore_ft_last:
            flat = _at(flat, (first | last).flatten().nonzero()[:, 0], edit)
        else:
            flat = _at(flat, first.flatten().nonzero()[:, 0], edit)
            flat = _at(flat, last.flatten().nonzero()[:, 0], cast(Edit, self.lore_ft_last[adapter]))
        return flat.view(hidden.shape)


def _at(flat: Tensor, index: Tensor, edit: Edit) -> Tensor:
    return flat.index_add(0, index, edit(flat[index]))


class LoReFTBlock(LoReFTLinear):
    """A block of a transformer: all that is asked of it beyond its output is the block's own answer."""

    def features(self) -> tuple[int, int]:
        """The width of the residual stream: the commonest one among the block's linear layers."""
        widths: Counter[int] = Counter()
        for module in self.get_base_layer().modules():
            if is_adaptable(module):
                widths.update(linear_features(module))
        (width, _), *_ = widths.most_common(1)
        return width, width

    @property
    def weight(self) -> Tensor:
        """One that tells device and dtype: the first parameter of the block that is a number with a point."""
        parameters = list(self.get_base_layer().parameters())
        return next((each for each in parameters if each.is_floating_point()), parameters[0])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["base_layer"], name)
