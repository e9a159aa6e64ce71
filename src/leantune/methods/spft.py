r"""SpFT, unstructured sparse fine-tuning: single entries of each weight train, wherever they stand.

    y = (W + D) x + b,      D (out, in), nonzero at K = p out in chosen entries alone

The values of ``D`` are float32, zero at start, and all that trains; ``W`` is written by merging alone, and then at the
chosen entries alone.

Source: the sparse fine-tuning that S2FT (NeurIPS 2024) compares in section 2 and appendix C: entries chosen at
random, a share p of 10%, 1% or 0.1% of all linear layers. There ``W`` itself is trained under a mask; here the values
stay beside it, so that gradients and optimizer state exist for the chosen entries alone, adapters share one base and
a quantised base works. What that costs in time is measured in ``docs/spft.md``: the reason why S2FT chooses whole
channels.

A change of single entries has no small LoRA form: K entries anywhere make a matrix of rank up to min(out, in).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from peft import get_peft_model
from torch import Tensor, nn

from leantune.core.errors import AdapterError, ConfigError, describe, did_you_mean, raise_all
from leantune.kernels.sparse_linear import add_entries, sparse_linear
from leantune.methods._base import AdapterConfig, AdapterLayer, AdapterModel
from leantune.methods._entries import EntryDelta, count_entries, random_entries, ranked_entries
from leantune.methods._peft import add_peft_type, prefix_of, register_with_peft
from leantune.methods._registry import Method, register

_CHOICES = {"selection": ("random", "weight"), "order": ("largest", "smallest")}


@dataclass
class SpFTConfig(AdapterConfig):
    """Options of SpFT. Give at most one of ``ratio`` and ``match_lora_rank``.

    Raises:
        ConfigError: two budgets, a value out of range, or an unknown choice; all problems at once.
    """

    ratio: float | None = field(
        default=None, metadata={"help": "Share of the entries of each targeted weight that trains (default 0.01)."}
    )
    match_lora_rank: int | None = field(
        default=None,
        metadata={"help": "Train as many parameters as LoRA of this rank would on the same modules, instead of ratio."},
    )
    selection: str = field(
        default="random", metadata={"help": "How entries are chosen: 'random', or 'weight' (by their magnitude)."}
    )
    order: str = field(
        default="largest", metadata={"help": "Which end of the ranking by weight is taken: 'largest' or 'smallest'."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random choice."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("spft")
        problems = [
            describe(f"SpFTConfig.{name}", repr(getattr(self, name)), "one of " + ", ".join(known), near)
            for name, known in _CHOICES.items()
            if getattr(self, name) not in known
            for near in [did_you_mean(str(getattr(self, name)), known)]
        ]
        if self.ratio is not None and self.match_lora_rank is not None:
            got = "ratio and match_lora_rank"
            problems.append(describe("SpFTConfig", got, "one way to set the budget", "remove one of the two"))
        if self.ratio is not None and not 0 < self.ratio <= 1:
            problems.append(describe("SpFTConfig.ratio", repr(self.ratio), "a share in (0, 1]", "try 0.01"))
        if self.match_lora_rank is not None and self.match_lora_rank < 1:
            got = repr(self.match_lora_rank)
            problems.append(describe("SpFTConfig.match_lora_rank", got, "a rank from 1", "try 8"))
        raise_all(problems, ConfigError)

    def count(self, out: int, width: int) -> int:
        """How many entries of an ``(out, width)`` weight train."""
        return count_entries(out, width, 0.01 if self.ratio is None else self.ratio, self.match_lora_rank)


class SpFTLinear(AdapterLayer):
    """A linear layer with trained entries beside it, a set an adapter.

    PEFT finds it by the "Linear" in its name when a further adapter targets "all-linear".
    """

    adapter_layer_names = ("spft_entries",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.spft_entries = nn.ModuleDict()

    def _own(self, adapter: str) -> EntryDelta:
        return cast(EntryDelta, self.spft_entries[adapter])

    def update_layer(self, adapter_name: str, config: SpFTConfig, template: str | None, **kwargs: Any) -> None:
        """Choose the entries, with zeros at them (noise when ``init_weights`` is False)."""
        if template is not None and template in self.spft_entries:
            entries = self._own(template).index.clone()
        else:
            entries = self._choose(config, kwargs["path"])
        own = EntryDelta(entries, self.out_features, self.in_features)
        if not config.init_weights:
            nn.init.normal_(own.weight, std=0.5)
        self.spft_entries[adapter_name] = own
        self.place(adapter_name, inference_mode=config.inference_mode)

    def _choose(self, config: SpFTConfig, path: str) -> Tensor:
        count = config.count(self.out_features, self.in_features)
        if config.selection == "random":
            return random_entries(self.out_features * self.in_features, count, config.seed, path)
        return ranked_entries(self.dense_weight().detach(), count, config.order == "largest")

    def add_share(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        """``result + D x``."""
        own = self._own(adapter)
        return add_entries(result, x, own.weight, own.index)

    def fused(self, adapter: str, x: Tensor) -> Tensor | None:
        """One kernel for base and entries where the base is a dense frozen matrix."""
        if not self.is_plain(x):
            return None
        own, base = self._own(adapter), cast(nn.Linear, self.base_layer)
        weight = base.weight.t() if self.transposed else base.weight
        return sparse_linear(x, weight, base.bias, own.weight, own.index)

    def delta_region(self, adapter: str) -> tuple[Tensor, int | None, Tensor | None]:
        """The values, and their flat positions in ``W``."""
        own = self._own(adapter)
        return own.weight.detach(), None, own.index

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """There are none of a small rank.

        Raises:
            AdapterError: always.
        """
        rank = min(self.out_features, self.in_features)
        got = f"single entries of a ({self.out_features}, {self.in_features}) weight, a change of rank up to {rank}"
        do = "merge the adapter into the base instead (leantune merge)"
        raise AdapterError(describe(f"adapter '{adapter}'", got, "a change of small rank, which LoRA can hold", do))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's own converter would cut it down to a small rank, which leaves little of it."""
        del adapter_name
        return False


class SpFTModel(AdapterModel):
    """Injects the layers."""

    prefix = prefix_of("spft")
    tuner_layer_cls = SpFTLinear

    def layer_options(self, config: Any, path: str) -> dict[str, Any] | None:
        """The path, by which layers of one shape draw different entries."""
        del config
        return {"path": path}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            # As in the paper, of any model: PEFT leaves the output head out.
            peft_config.target_modules = "all-linear"
        return super()._prepare_adapter_config(peft_config, model_config)


def _trainable_parameters(config: SpFTConfig, out_features: int, in_features: int) -> int:
    return config.count(out_features, in_features)


def _apply(model: nn.Module, config: SpFTConfig) -> nn.Module:
    return get_peft_model(model, config)


register_with_peft("spft", SpFTConfig, SpFTModel)
register(
    Method(
        name="spft",
        title="Unstructured sparse fine-tuning",
        config=SpFTConfig,
        formula="W + D, D zero but at K entries",
        paper="SpFT as in S2FT, NeurIPS 2024, section 2",
        trainable_parameters=_trainable_parameters,
        apply=_apply,
        lora_form=False,
        default_learning_rate=1e-3,
        toy_options={"ratio": 0.2},
    )
)
