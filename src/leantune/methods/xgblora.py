r"""XGBLoRA: gradient boosting of small LoRAs. Pick blocks, train a booster for a few steps, keep it, repeat.

For a layer ``y = W x + b`` with ``W (out, in)``, after ``T`` rounds of which ``t in S`` chose its block::

    y = (W + sum over t in S of nu (alpha / r) B_t A_t) x + b        A_t (r, in), B_t (out, r), r = 1 by default

Only the booster of the round trains, with an optimizer that has forgotten the round before. Finished boosters are
float32 and stand side by side, so that the adapter is a LoRA of rank ``r |S|`` and any prefix of the rounds is a model.

Source: XGBLoRA, arXiv 2410.19694, of which only the appendix (the update ``W(t+1) = W(t) + A(t) B(t)^T`` and its
theorems) and the public reviews were at hand. The defaults below are therefore ours. ReLoRA (arXiv 2307.05695) and
Chain of LoRA (arXiv 2401.04151) are settings of the same: all blocks, a larger r.

Where we deviate, and why: the paper merges each booster into ``W``. In 16 bits a small update is lost by that, the
adapter is lost in any case, and a quantised base cannot take it. Here ``W`` is only read; where ``fold`` is set, layers
multiply by a working copy of it, rebuilt from ``W`` and the float32 sum of the boosters.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import get_peft_model

from leantune.core.errors import ConfigError, MethodError, describe, did_you_mean, raise_all
from leantune.methods._base import AdapterModel
from leantune.methods._block import SAMPLINGS, block_of
from leantune.methods._boosted_linear import XGBLoraLinear
from leantune.methods._boosting import Boosting
from leantune.methods._boosting_option import PRESETS, BoostingOptions
from leantune.methods._peft import add_peft_type, prefix_of, register_with_peft
from leantune.methods._registry import Method, register


@dataclass
class XGBLoraConfig(BoostingOptions):
    """Options of XGBLoRA; its defaults are ours, since the paper's main body is not public.

    Raises:
        ConfigError: a value out of range, or an unknown choice; all problems at once.
    """

    r: int = field(default=1, metadata={"help": "Rank of a booster."})
    alpha: float | None = field(
        default=None, metadata={"help": "A booster is scaled by alpha / r. Default (ours): 2 r, a scale of 2."}
    )
    blocks_per_round: int | None = field(
        default=None,
        metadata={"help": "Transformer blocks that train in a round; 0 means all. Default (ours): a third of them."},
    )
    steps_per_round: int = field(default=8, metadata={"help": "Optimizer steps that train a booster (default ours)."})
    num_boost_round: int | None = field(
        default=None,
        metadata={
            "help": "Rounds to train: they are the length of the run and its schedule, whatever epochs says, unless "
            "max_steps is less. Default: what the steps allow."
        },
    )
    block_sampling: str = field(
        default="uniform",
        metadata={
            "help": "How a round's blocks are drawn: 'uniform', 'balanced' (those used least so far), or 'gradient' "
            "(in proportion to the norm of their gradient in the round's first step, which reaches all blocks)."
        },
    )
    shrinkage: float = field(
        default=1.0,
        metadata={
            "help": "A finished booster is kept times this (XGBoost's eta). Default (ours): 1, as it was trained."
        },
    )
    warmup_steps: int = field(
        default=2,
        metadata={
            "help": "Steps at the start of each round in which the learning rate rises to that of the run; at most "
            "half of the round."
        },
    )
    fold: bool = field(
        default=False,
        metadata={
            "help": "Multiply by a working copy of the base weights that finished boosters are part of: a step's cost "
            "does not grow with the rounds, for the memory of one more copy of the targeted weights. A quantised "
            "layer is left as it is."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the blocks and of the boosters' start."})
    eval_rounds: int | None = field(
        default=None,
        metadata={"help": "Rounds between evaluations. Default: 1 with early_stopping_rounds, else none by rounds."},
    )
    early_stopping_rounds: int | None = field(
        default=None,
        metadata={
            "help": "End training when this many rounds brought no lower validation loss, and predict with the rounds "
            "up to the best (needs eval_data)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("xgblora")
        problems = [
            describe(f"XGBLoraConfig.{name}", repr(value), f"a count of at least {least}", f"try {least}")
            for name, least in _LEAST.items()
            for value in [getattr(self, name)]
            if value is not None and value < least
        ]
        for name in ("alpha", "shrinkage"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                problems.append(describe(f"XGBLoraConfig.{name}", repr(value), "a positive number", "try 1"))
        if self.block_sampling not in SAMPLINGS:
            near = did_you_mean(str(self.block_sampling), SAMPLINGS)
            wanted = "one of " + ", ".join(SAMPLINGS)
            problems.append(describe("XGBLoraConfig.block_sampling", repr(self.block_sampling), wanted, near))
        raise_all([*problems, *self.option_problems()], ConfigError)

    @property
    def scaling(self) -> float:
        """Of the booster in training: ``alpha / r``."""
        return 2.0 if self.alpha is None else self.alpha / self.r


_LEAST = {
    "r": 1,
    "blocks_per_round": 0,
    "steps_per_round": 1,
    "num_boost_round": 1,
    "warmup_steps": 0,
    "eval_rounds": 1,
    "early_stopping_rounds": 1,
}


_WITHOUT_ROUNDS = (
    "XGBLoRA trains without rounds, as a plain LoRA in all layers at once: give the trainer "
    "callbacks=leantune.callbacks(model), or train with leantune"
)


class XGBLoraModel(AdapterModel):
    """Injects the layers, and says which rounds count."""

    prefix = prefix_of("xgblora")
    tuner_layer_cls = XGBLoraLinear
    # Whether somebody runs the rounds, or has been told that nobody does.
    has_rounds = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own; training that nobody divides into rounds is told so, once."""
        if self.training and not self.has_rounds and torch.is_grad_enabled():
            self.has_rounds = True
            warnings.warn(_WITHOUT_ROUNDS, stacklevel=2)
        return super().forward(*args, **kwargs)

    def layer_options(self, config: XGBLoraConfig, path: str) -> dict[str, Any] | None:
        """The path, by which a booster's start is drawn."""
        del config
        return {"path": path}

    def default_targets(self) -> tuple[str, ...]:
        """All linear layers of the blocks (ours: the paper's choice is not public)."""
        return tuple(dict.fromkeys(path.rpartition(".")[2] for path, _ in self._linears() if block_of(path) != path))

    def boosters(self, adapter_name: str) -> dict[str, XGBLoraLinear]:
        """The layers with boosters of that adapter, by path, in the order of the model."""
        found = {path: layer for path, layer in self.model.named_modules() if isinstance(layer, XGBLoraLinear)}
        return {path: layer for path, layer in found.items() if layer.has(adapter_name)}

    def num_boosted_rounds(self, adapter_name: str | None = None) -> int:
        """How many rounds were trained (XGBoost's word)."""
        name = adapter_name or self.active_adapters[0]
        return max((layer.booster(name).next_round for layer in self.boosters(name).values()), default=0)

    def set_iteration_range(
        self, iteration_range: tuple[int, int] | None, adapter_name: str | None = None, *, drop: bool = False
    ) -> None:
        """Let only the rounds ``[first, end)`` count, exactly; with (0, n) it is the model as it was after n rounds.

        Example:
            ``model.set_iteration_range((0, 10))``

        Args:
            iteration_range: the rounds, from 0; None means all.
            adapter_name: of which adapter; default: the active one.
            drop: forget the other rounds for good, so that the saved file is smaller.

        Raises:
            MethodError: there are no such rounds, the adapter is merged, or it is in the middle of a round.
        """
        name = adapter_name or self.active_adapters[0]
        layers, rounds = self.boosters(name), self.num_boosted_rounds(name)
        where = f"set_iteration_range({iteration_range})"
        if iteration_range is not None and not 0 <= iteration_range[0] < iteration_range[1] <= rounds:
            got = f"adapter '{name}' has rounds 0 to {rounds - 1}" if rounds else f"adapter '{name}' has no round yet"
            raise MethodError(describe(where, got, "(first, end) within them", f"try (0, {rounds})"))
        if any(name in layer.merged_adapters for layer in layers.values()):
            raise MethodError(describe(where, "the adapter is merged", "one that is not", "call unmerge_adapter first"))
        span = None if iteration_range is None else (int(iteration_range[0]), int(iteration_range[1]))
        for layer in layers.values():
            own = layer.booster(name)
            own.count(span)
            if drop:
                own.drop()
            if own.working is not None:
                layer.fold(name)
        config = cast(XGBLoraConfig, self.peft_config[name])
        config.iteration_range = None if span is None or drop else list(span)
        if drop:
            config.num_boosted_rounds = self.num_boosted_rounds(name)
            if config.best_iteration is not None and config.best_iteration >= config.num_boosted_rounds:
                config.best_iteration = config.best_score = None


register_with_peft("xgblora", XGBLoraConfig, XGBLoraModel)
METHOD = register(
    Method(
        name="xgblora",
        title="Gradient boosting of small LoRAs",
        config=XGBLoraConfig,
        formula="W + sum_t (alpha / r) B_t A_t",
        paper="XGBLoRA, arXiv 2410.19694",
        trainable_parameters=lambda config, out_features, in_features: config.r * (out_features + in_features),
        apply=lambda model, config: get_peft_model(model, config),
        plan=lambda model: Boosting(model, cast(Any, model).active_adapters[0]).plan(),
        # After 40 steps of E2E NLG on the embedded model 2, 4, 8 and 16e-3 gave a validation loss of 1.90, 1.66, 1.55
        # and 1.50: this one is short of the best, for longer runs.
        default_learning_rate=8e-3,
        toy_options={"r": 2, "blocks_per_round": 1, "steps_per_round": 2},
    )
)
for _name, _preset in PRESETS.items():
    register(METHOD.preset(_name, **_preset))
