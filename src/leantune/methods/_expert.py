r"""S2FT on experts whose weights are 3-D parameters: a slice of channels in each expert, the router untouched.

Expert ``e`` is a feed-forward network of ``I`` channels; a token ``x (H,)`` routed to it with weight ``w`` gets

    z = U_e x (+ b);  a = gate(z) (I,);  y = w V_e a          U_e (r I, H), V_e (H, I)

with ``r = 2`` rows a channel (gate and up) or one. Channel ``c`` is those rows of ``U_e`` and column ``c`` of ``V_e``.
With trained deltas ``G (r s, H)`` on the rows and ``D (H, s)`` on the columns of the chosen channels ``S``, the output
changes by

    y' - y = w (V_e[:, S] (a'_S - a_S) + D a'_S),    a'_S = gate(z_S + G x)

which needs the ``s`` chosen channels alone: the base's own experts run as they are, with whatever kernel transformers
has for them, and no weight-sized gradient or copy is ever formed. An expert that no token reaches gets a zero gradient.

All weights are handled as rows of width ``H``: ``U_e`` as it is, ``V_e`` transposed.

Source: S2FT (NeurIPS 2024), section 3.2, for one feed-forward network; that each expert gets slices of its own is ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leantune.core.errors import AdapterError, TargetError, describe
from leantune.methods._base import BASE_ROW, AdapterLayer

DOWN = "down_proj"
UP = ("gate_up_proj", "up_proj")


class Experts:
    """The weights of an experts module of transformers, each seen as rows ``(E, rows, H)``.

    Args:
        module: a module whose class transformers marks with ``use_experts_implementation``.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.up: str = UP[0] if module.has_gate else UP[1]
        self.interleaved = module.has_gate and not module.is_concatenated
        # Rows of a channel in each weight.
        self.per_channel = {self.up: 2 if module.has_gate else 1, DOWN: 1}
        self.experts, self.channels, self.width = self.rows(DOWN).shape

    @property
    def names(self) -> tuple[str, str]:
        """The weights, those that feed the activation first."""
        return self.up, DOWN

    def rows(self, name: str) -> Tensor:
        """A view of a weight as ``(E, rows, H)``: ``rows`` is ``r I`` or ``I``."""
        weight: Tensor = getattr(self.module, name)
        return weight if (name == DOWN) == self.module.is_transposed else weight.transpose(1, 2)

    def rows_of(self, name: str, channels: Tensor, total: int | None = None) -> Tensor:
        """The rows ``(..., r s)`` of channels ``(..., s)`` out of ``total``, in the order that the gate takes them."""
        if self.per_channel[name] == 1:
            return channels
        if self.interleaved:
            return torch.stack([2 * channels, 2 * channels + 1], -1).flatten(-2)
        return torch.cat([channels, (self.channels if total is None else total) + channels], -1)

    def by_channel(self, name: str, values: Tensor) -> Tensor:
        """Values of rows ``(..., rows)`` summed over the rows of each channel, ``(..., I)``."""
        if self.per_channel[name] == 1:
            return values
        shape = (*values.shape[:-1], self.channels, 2) if self.interleaved else (*values.shape[:-1], 2, self.channels)
        return values.view(shape).sum(-1 if self.interleaved else -2)

    def inner(self, expert: int, x: Tensor, rows: Tensor | slice) -> Tensor:
        """``z`` of tokens ``x (n, H)`` at some rows, ``(n, r s)``, in the base's dtype."""
        weight = self.rows(self.up)[expert][rows]
        bias = getattr(self.module, f"{self.up}_bias", None) if self.module.has_bias else None
        return F.linear(x.to(weight.dtype), weight, None if bias is None else bias[expert][rows])

    def gate(self, z: Tensor) -> Tensor:
        """``a (n, s)`` of ``z (n, r s)``: each channel by itself."""
        result: Tensor = self.module._apply_gate(z) if self.module.has_gate else self.module.act_fn(z)
        return result


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts as 3-D parameters in transformers' way."""
    return hasattr(module, "is_transposed") and isinstance(getattr(module, DOWN, None), nn.Parameter)


def require_known_experts(path: str, module: Any) -> None:
    """Raise TargetError for experts that compute something else than the formula above."""
    weights = [getattr(module, name, None) for name in (DOWN, UP[0] if module.has_gate else UP[1])]
    why = None
    if not all(isinstance(each, nn.Parameter) and each.dim() == 3 and each.is_floating_point() for each in weights):
        why = "weights that are no dense 3-D parameters"
    elif getattr(module, "has_post_expert_norm", False):
        why = "a norm behind each expert"
    elif getattr(module, "_is_expert_parallel", False):
        why = "experts spread over processes"
    if why:
        wanted = "dense experts of gate, up and down projections"
        raise TargetError(describe(path, f"{type(module).__name__} has {why}", wanted, "leave it out"))


class ExpertSlice(nn.Module):
    """One adapter's delta on one weight of all experts: ``weight (E, r s, H)`` for the channels ``index (E, s)``."""

    index: Tensor

    def __init__(self, channels: Tensor, per_channel: int, width: int, waits: bool) -> None:
        super().__init__()
        self.per_channel = per_channel
        self.weight = nn.Parameter(torch.zeros(len(channels), per_channel * channels.shape[1], width))
        self.register_buffer("index", channels.clone())
        self.waits = waits

    def place(self, channels: Tensor) -> None:
        """Stand for these channels, as many as before, which data has chosen."""
        self.index = channels.to(self.index.device, copy=True)
        self.waits = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        stored = state_dict.get(prefix + "index")
        if stored is not None:
            self.waits = False
            if stored.shape != self.index.shape and len(stored) == len(self.index):
                shape = (len(stored), self.per_channel * stored.shape[1], self.weight.shape[2])
                self.weight = nn.Parameter(self.weight.new_zeros(shape), requires_grad=self.weight.requires_grad)
                self.index = self.index.new_zeros(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class ExpertLayer(AdapterLayer):
    """Experts with trained slices beside them, one :class:`ExpertSlice` for each targeted weight of an adapter.

    To code that thinks in matrices it is one of ``out_features`` rows and ``in_features = H`` columns: the rows of all
    targeted weights and experts, one after the other.
    """

    # One container a weight: PEFT takes an adapter's name out of keys that end in it and one more word.
    adapter_layer_names = tuple(f"s2ft_{name}" for name in (*UP, DOWN))

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        del kwargs
        # Not the linear layer's, which measures a matrix.
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.view = Experts(base_layer)
        self.quantization_backend = None
        self.transposed = False
        self.in_features, self.out_features = self.view.width, 0
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self._overwritten = []
        self.targeted: tuple[str, ...] = ()
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())
        self._together: dict[str, tuple[object, bool]] = {}

    @property
    def weight(self) -> Tensor:
        """The down projections: what stands for the base's device and dtype."""
        weight: Tensor = getattr(self.base_layer, DOWN)
        return weight

    def slices(self, adapter: str) -> dict[str, ExpertSlice]:
        """Weight name -> slice of one adapter."""
        containers = {name: cast(nn.ModuleDict, getattr(self, f"s2ft_{name}")) for name in self.view.names}
        return {name: cast(ExpertSlice, of[adapter]) for name, of in containers.items() if adapter in of}

    def update_layer(self, adapter_name: str, config: Any, template: str | None, **kwargs: Any) -> None:
        """Create zero slices (noise when ``init_weights`` is False) for ``kwargs["chosen"]``.

        That is weight name -> channels ``(E, s)``; ``kwargs["waits"]`` says that data is to choose others.
        """
        chosen: dict[str, Tensor] = kwargs["chosen"]
        waits: bool = kwargs["waits"]
        twins = self.slices(template) if template is not None else {}
        if twins:
            chosen = {name: twin.index for name, twin in twins.items()}
            waits = any(twin.waits for twin in twins.values())
        for name, channels in chosen.items():
            own = ExpertSlice(channels, self.view.per_channel[name], self.view.width, waits)
            if not config.init_weights:
                nn.init.normal_(own.weight, std=0.02)
            own.index = own.index.to(self.weight.device)
            # Made without storage when a file is about to fill it.
            is_empty = own.weight.is_meta
            getattr(self, f"s2ft_{name}")[adapter_name] = own if is_empty else own.to(self.weight.device)
        self.targeted = tuple(name for name in self.view.names if name in {*self.targeted, *chosen})
        self.out_features = sum(self.view.rows(name).shape[:2].numel() for name in self.targeted)
        self.place(adapter_name, inference_mode=config.inference_mode)

    def waits_for_data(self, adapter: str) -> bool:
        """Whether the channels are still to be chosen."""
        return any(each.waits for each in self.slices(adapter).values())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's experts plus the share of each active adapter, or of each row's own (``adapter_names``).

        Args:
            x: tokens ``(n, H)``.
            args: their experts ``(n, k)`` and the weights of these ``(n, k)``, as the router gives them.
            kwargs: ``adapter_names``.
        """
        names = kwargs.pop("adapter_names", None)
        experts, weights = [*args, *kwargs.values()]
        if names is not None and self.merged:
            self._check_mixed(x[: len(names)], names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, experts, weights)
        if self.disable_adapters or self.merged:
            return result
        if names is not None:
            return self._mixed(x, experts, weights, result, names)
        active = [name for name in self.active_adapters if self.has(name)]
        if self.training:
            self.require_start(active)
        return result + self._share(active, x, experts, weights).to(result.dtype) if active else result

    def _mixed(self, x: Tensor, experts: Tensor, weights: Tensor, result: Tensor, names: list[str]) -> Tensor:
        if len(x) % len(names):
            raise ValueError(f"{len(x)} tokens are no whole rows of {len(names)} `adapter_names`.")
        length = len(x) // len(names)
        for name in dict.fromkeys(names):
            if name == BASE_ROW or not self.has(name):
                continue
            of_name = torch.tensor([own == name for own in names], device=x.device).repeat_interleave(length)
            tokens = of_name.nonzero().squeeze(1)
            share = self._share([name], x[tokens], experts[tokens], weights[tokens])
            result = result.index_add(0, tokens, share.to(result.dtype))
        return result

    def add_share(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        """Not for experts, which need to know who is routed where."""
        raise NotImplementedError("ExpertLayer.forward")

    def _share(self, adapters: list[str], x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """``y' - y`` of each token over its experts by all adapters at once, ``(n, H)``, in the dtype of the slices."""
        slices = [(name, each) for adapter in adapters for name, each in self.slices(adapter).items()]
        dtype = slices[0][1].weight.dtype
        # Unbound once: the backward of each expert alone would fill a zero for all the others.
        deltas = [each.weight.unbind(0) for _, each in slices]
        together = len(adapters) == 1 and self._is_together(adapters[0], dict(slices))
        tokens, shares = [], []
        for expert, token, slot in routes(experts, self.view.experts):
            pieces: dict[str, list[tuple[Tensor, Tensor]]] = {}
            for (name, each), delta in zip(slices, deltas, strict=True):
                pieces.setdefault(name, []).append((each.index[expert], delta[expert]))
            own = {name: self._summed(name, of_name) for name, of_name in pieces.items()}
            share = self._expert_share(expert, x[token], own, together)
            tokens.append(token)
            shares.append(share * weights[token, slot, None].to(dtype))
        total = torch.zeros(x.shape, dtype=dtype, device=x.device)
        if not shares:
            # No token at all: the slices still take part, with gradients of zero.
            return total + sum(each.weight.sum() for _, each in slices) * 0
        return total.index_add(0, torch.cat(tokens), torch.cat(shares))

    def _summed(self, name: str, pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Channels and delta of several adapters as one: an expert is not linear, so they act on it together."""
        if len(pieces) == 1:
            return pieces[0]
        sizes = [channels.numel() for channels, _ in pieces]
        channels, places = torch.cat([channels for channels, _ in pieces]).unique(return_inverse=True)
        rows = torch.cat([self.view.rows_of(name, each, channels.numel()) for each in places.split(sizes)])
        delta = torch.cat([delta for _, delta in pieces])
        total = delta.new_zeros(self.view.per_channel[name] * channels.numel(), self.view.width)
        return channels, total.index_add(0, rows, delta)

    def _expert_share(self, expert: int, x: Tensor, own: dict[str, tuple[Tensor, Tensor]], together: bool) -> Tensor:
        """``V[:, U] (a'_U - a_U) + D a'_S`` for tokens of one expert, ``U`` its changed rows, ``S`` its columns."""
        view = self.view
        rows, delta = own.get(view.up, (None, None))
        share: Tensor | None = None
        moved = changed = None
        if rows is not None and delta is not None:
            moved = F.linear(x.to(delta.dtype), delta)
            plain = view.inner(expert, x, view.rows_of(view.up, rows)).to(delta.dtype)
            changed = view.gate(plain + moved)
            columns = view.rows(DOWN)[expert][rows].to(delta.dtype)
            share = (changed - view.gate(plain)) @ columns
        if DOWN in own:
            channels, delta = own[DOWN]
            if not (together and changed is not None):
                z_rows = view.rows_of(view.up, channels)
                z = view.inner(expert, x, z_rows).to(delta.dtype)
                if moved is not None and rows is not None:
                    same = z_rows[:, None] == view.rows_of(view.up, rows)[None, :]
                    z = z + moved @ same.t().to(delta.dtype)
                changed = view.gate(z)
            assert changed is not None, "ExpertLayer: nothing was gated"
            share = changed @ delta if share is None else share + changed @ delta
        assert share is not None, "ExpertLayer: an adapter without a slice"
        return share

    def _is_together(self, adapter: str, slices: dict[str, ExpertSlice]) -> bool:
        """Whether both sides of an adapter stand for the same channels; looked up again when these have changed."""
        state = [(id(each.index), each.index._version) for each in slices.values()]
        known = self._together.get(adapter)
        if known is None or known[0] != state:
            index = [each.index for each in slices.values()]
            known = (state, len(index) == 2 and torch.equal(*index))
            self._together[adapter] = known
        return known[1]

    def _regions(self, adapter: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Weight name, its rows ``(E, r s)`` that change, and by what ``(E, r s, H)``."""
        for name, own in self.slices(adapter).items():
            yield name, self.view.rows_of(name, own.index), own.weight.detach()

    def delta_region(self, adapter: str) -> tuple[Tensor, int | None, Tensor | None]:
        """The slices as rows of the one matrix that the class describes, and which rows these are."""
        starts, start = {}, 0
        for name in self.targeted:
            starts[name] = start
            start += self.view.rows(name).shape[:2].numel()
        deltas, places = [], []
        for name, rows, delta in self._regions(adapter):
            length = self.view.rows(name).shape[1]
            first = torch.arange(self.view.experts, device=rows.device)[:, None] * length
            deltas.append(delta.flatten(0, 1))
            # A row that an expert does not have must not pass for one of the next.
            places.append(torch.where((rows >= 0) & (rows < length), starts[name] + first + rows, -1).flatten())
        return torch.cat(deltas), 0, torch.cat(places)

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Refused: no LoRA file for experts is read alike everywhere."""
        raise AdapterError(
            describe(
                f"adapter '{adapter}'",
                "slices in experts have no LoRA form that PEFT, vLLM and others read alike",
                "linear layers, for a LoRA export",
                "merge the adapter into the base instead (leantune merge)",
            )
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: see :meth:`lora_factors`."""
        del adapter_name
        return False

    def _merge_one(self, name: str, safe_merge: bool) -> None:
        written = []
        for weight, rows, delta in self._regions(name):
            where = rows[:, :, None].expand(-1, -1, self.view.width)
            original = self.view.rows(weight).gather(1, where)
            updated = (original.to(delta.dtype) + delta).to(original.dtype)
            if safe_merge and not torch.isfinite(updated).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            written.append((weight, where, rows, original, updated))
        for weight, where, rows, original, updated in written:
            slot = f"_original_{len(self._overwritten)}"
            self.register_buffer(slot, original, persistent=False)
            self._overwritten.append(((slot, weight), 1, rows))
            self.view.rows(weight).scatter_(1, where, updated)

    def unmerge(self) -> None:
        """Put back, bit for bit, what merging overwrote: all adapters, newest first."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        with torch.no_grad():
            while self._overwritten:
                (slot, name), _, rows = self._overwritten.pop()
                original = cast(Tensor, getattr(self, slot))
                where = cast(Tensor, rows).to(original.device)[:, :, None].expand(-1, -1, self.view.width)
                self.view.rows(name).scatter_(1, where, original)
                delattr(self, slot)
        self.merged_adapters.clear()


def routes(experts: Tensor, number: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that tokens are routed to, with these tokens and the slots of ``experts (n, k)`` that say so."""
    chosen = experts.flatten()
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=number)[:number].tolist()
    first = 0
    for expert, count in enumerate(counts):
        if count:
            places = order[first : first + count]
            yield expert, places // experts.shape[1], places % experts.shape[1]
        first += count
