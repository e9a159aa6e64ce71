r"""LoRA-XS and LoRA-SB: ``W + s B R A`` with two frozen factors; only the r x r core ``R`` between them trains.

For ``y = W x + b``, ``W (out, in)``, ``B (out, r)``, ``R (r, r)``, ``A (r, in)``, ``s = alpha / r``::

    LoRA-XS ("weight_svd")   W = U S V^T:      B = U_r S_r, A = V_r^T, R = 0
    LoRA-SB ("update_svd")   dW = U S V^T:     B = U_r, A = V_r^T, R = S_r, s = 1

``dW`` is the first step that the run's optimizer would take on all of ``W`` (``-eta sign(sum grad)`` for AdamW), by the
gradient over about a thousandth of the training rows. So LoRA-SB starts from the best rank-r approximation of that
step, and its orthonormal factors make the plain gradient of ``R`` the best one (Theorem 2); with LoRA-XS's factors,
which are not, ``precondition`` gives that gradient. One r-wide product is kept for the backward.

Sources: LoRA-XS, arXiv 2405.17604; LoRA-SB, arXiv 2411.19557: start eqs. 1, 2, 6, 7, preconditioned gradient eq. 4,
ablations appendix D.

Where we deviate, and why. ``R`` starts at exactly 0 and not at N(0, 1e-5), so that a fresh LoRA-XS is the base bit for
bit. Factors and core are float32 (float64 over float64) whatever the base's dtype: rounded to 16 bits, as in the
authors' code, factors are not orthonormal. ``eta`` is the run's own, dropout is off, the random state is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

from peft import get_peft_model
from peft.utils import get_quantization_kwargs
from torch import nn

from leantune.core.errors import ConfigError, describe, did_you_mean, raise_all
from leantune.methods import _low_rank_start as starting
from leantune.methods import _rank_budget as budgeting
from leantune.methods._base import linear_features
from leantune.methods._calibration import Calibration
from leantune.methods._core_linear import LoraXSLinear
from leantune.methods._factor_file import FactorConfig, FactorModel
from leantune.methods._family import places
from leantune.methods._first_update import estimate
from leantune.methods._peft import add_peft_type, prefix_of, register_with_peft
from leantune.methods._registry import Method, register

_STARTS = (True, False, "weight_svd", "update_svd", "kaiming_svd")


@dataclass
class LoraXSConfig(FactorConfig):
    """Options of LoRA-XS and LoRA-SB.

    Raises:
        ConfigError: a value out of range or an unknown choice; all problems at once.
    """

    r: int | Literal["auto"] = field(
        default=32,
        metadata={
            "help": "Rank: r x r parameters train in each module; where a module is smaller, its smaller side. 'auto': "
            "ranks by module, from the spectrum of what the start approximates, under the budget of rank_budget."
        },
    )
    rank_budget: int = field(
        default=32,
        metadata={"help": "With r='auto': as many parameters train as at this rank everywhere; at most twice it."},
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Scaling: the product is multiplied by alpha / r. Default: r, which is 1."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the adapter, while training."})
    init_weights: bool | Literal["weight_svd", "update_svd", "kaiming_svd"] = field(  # type: ignore[assignment]
        default=True,
        metadata={
            "help": "Where the factors come from. 'weight_svd' (or True): the SVD of the weight, from the base's "
            "function (LoRA-XS). 'update_svd': of the optimizer's first step, by leantune.initialize (LoRA-SB). "
            "'kaiming_svd': of a fresh random weight (the paper's ablation D.1). False: noise (for tests)."
        },
    )
    split: Literal["core", "left", "right"] | None = field(
        default=None,
        metadata={
            "help": "Which factor takes the singular values: 'core' (B = U, R = S, A = V^T), 'left' (U S, I, V^T: the "
            "paper's ablation D.2), 'right' (U, I, S V^T). Default: left for weight_svd, else core."
        },
    )
    precondition: bool = field(
        default=False,
        metadata={
            "help": "Train R by (B^T B)^-1 g (A A^T)^-1 / s^2, the best approximation of the full gradient where the "
            "factors are not orthonormal (Theorem 2). It is the plain gradient where they are."
        },
    )
    noise: float = field(
        default=0.0,
        metadata={
            "help": "Standard deviation of Gaussian noise added to the first step before its SVD (the paper's ablation "
            "D.1)."
        },
    )
    sketch: int | None = field(
        default=None,
        metadata={
            "help": "update_svd: keep sketches of this width in place of larger gradients, for fewer passes over the "
            "rows (approximate; the start then tells how far its subspaces agree with the exact ones)."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of random factors, noise and randomized decompositions."})
    ranks: dict[str, int] | None = field(
        default=None,
        metadata={"help": "Set by Leantune: the rank of each module, with r='auto'.", "is_result": True},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("loraxs")
        problems = []
        if self.r != "auto" and (not isinstance(self.r, int) or self.r < 1):
            problems.append(describe("LoraXSConfig.r", repr(self.r), "a positive rank or 'auto'", "try 32"))
        if self.rank_budget < 1:
            problems.append(describe("LoraXSConfig.rank_budget", repr(self.rank_budget), "a positive rank", "try 32"))
        if self.alpha is not None and not self.alpha > 0:
            problems.append(describe("LoraXSConfig.alpha", repr(self.alpha), "a positive number", "leave it out"))
        if not 0 <= self.dropout < 1:
            problems.append(describe("LoraXSConfig.dropout", repr(self.dropout), "a share in [0, 1)", "try 0.05"))
        for name, known in (("init_weights", _STARTS), ("split", (None, *starting.SPLITS))):
            given, names = getattr(self, name), [each for each in known if isinstance(each, str)]
            if given not in known:
                near = did_you_mean(str(given), names)
                problems.append(describe(f"LoraXSConfig.{name}", repr(given), "one of " + ", ".join(names), near))
        if self.noise < 0:
            problems.append(describe("LoraXSConfig.noise", repr(self.noise), "no negative number", "try 1e-4"))
        for name in ("noise", "sketch"):
            if getattr(self, name) and self.start != "update_svd":
                got = f"{getattr(self, name):g} with init_weights={self.init_weights!r}"
                problems.append(describe(f"LoraXSConfig.{name}", got, "init_weights='update_svd'", "leave one out"))
        if self.rank_budget != LoraXSConfig.rank_budget and self.r != "auto":
            got = f"{self.rank_budget} with r={self.r}"
            problems.append(describe("LoraXSConfig.rank_budget", got, "r='auto'", "set r alone, or r to 'auto'"))
        widest = budgeting.WIDEST * self.rank_budget if self.r == "auto" else self.r
        if self.sketch is not None and isinstance(widest, int) and self.sketch < widest:
            wanted = f"a width of at least {widest}, the largest rank"
            problems.append(describe("LoraXSConfig.sketch", repr(self.sketch), wanted, "try four times r"))
        raise_all(problems, ConfigError)

    @property
    def start(self) -> str | None:
        """Where the factors come from, by name; None for noise."""
        return "weight_svd" if self.init_weights is True else self.init_weights or None

    @property
    def chosen_split(self) -> starting.Split:
        """Which factor takes the singular values."""
        return self.split or ("left" if self.start == "weight_svd" else "core")

    def scaling(self, rank: int) -> float:
        """``s`` of a layer of that rank."""
        return 1.0 if self.alpha is None else self.alpha / rank


class LoraXSModel(FactorModel):
    """Decides the ranks of all targeted modules, and computes the starts that come from data."""

    prefix = prefix_of("loraxs")
    tuner_layer_cls = LoraXSLinear

    def default_targets(self) -> tuple[str, ...]:
        """All linear layers of every attention and feed-forward block, as in the paper."""
        return tuple(sorted({path.rpartition(".")[2] for path in places(path for path, _ in self._linears())}))

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        # The first module of this injection decides for all.
        self._ranks: dict[str, int] | None = None

    def layer_options(self, config: LoraXSConfig, path: str) -> dict[str, Any]:
        """The rank of the module at ``path``."""
        self._ranks = self._ranks or self._decide(config)
        return {"rank": self._ranks[path], "path": path}

    def _targets(self, config: LoraXSConfig) -> dict[str, nn.Module]:
        found = dict(self._linears())
        return {path: found[path] for path in found if self._check_target_module_exists(config, path)}

    def _decide(self, config: LoraXSConfig) -> dict[str, int]:
        layers = self._targets(config)
        shapes = {path: linear_features(layer)[::-1] for path, layer in layers.items()}
        if config.r != "auto":
            return budgeting.clamped_ranks(shapes, config.r)
        if config.ranks is not None and set(config.ranks) >= set(shapes):
            return {path: config.ranks[path] for path in shapes}
        ranks = budgeting.uniform_ranks(shapes, config.rank_budget)
        if config.start == "weight_svd" and not config.inference_mode:
            widest = budgeting.uniform_ranks(shapes, budgeting.WIDEST * config.rank_budget)
            options = get_quantization_kwargs(self)
            spectra = {
                path: LoraXSLinear(layer, "probe", **options).spectrum(widest[path], config.seed, path)
                for path, layer in layers.items()
            }
            config.ranks = ranks = budgeting.allot(spectra, ranks)
        return ranks

    def start_from_data(self, adapters: list[str], data: Calibration) -> None:
        """Start waiting adapters from the optimizer's first step; others, made to be read from a file, anew."""
        config = cast(LoraXSConfig, self.peft_config[adapters[0]])
        found = {path: self.model.get_submodule(path) for path in self._targets(config)}
        layers = {path: each for path, each in found.items() if isinstance(each, LoraXSLinear)}
        if config.start != "update_svd":
            for path, layer in layers.items():
                for adapter in adapters:
                    layer.start_without_data(adapter, config, path)
            return
        bases = {path: layer.get_base_layer() for path, layer in layers.items()}
        ranks, starts = estimate(config, bases, data)
        for path, start in starts:
            for adapter in adapters:
                layers[path].start(adapter, config, start, keep_function=False)
        config.ranks = ranks


def _trainable_parameters(config: LoraXSConfig, out_features: int, in_features: int) -> int:
    rank = config.rank_budget if config.r == "auto" else config.r
    return int(min(rank, out_features, in_features) ** 2)


# Not "lora_xs": some of TRL's code takes whatever has "lora_" in its name for stock LoRA.
register_with_peft("loraxs", LoraXSConfig, LoraXSModel)
METHOD = register(
    Method(
        name="lora-xs",
        title="LoRA with a trained core between frozen factors of the weight",
        config=LoraXSConfig,
        formula="W + s B R A, B and A frozen at the SVD of W",
        paper="LoRA-XS, arXiv 2405.17604",
        trainable_parameters=_trainable_parameters,
        apply=lambda model, config: get_peft_model(model, config),
        default_learning_rate=4e-3,
        needs_batches=lambda config: config.start == "update_svd",
        toy_options={"r": 3},
    )
)
register(
    METHOD.preset(
        "lora-sb",
        {"init_weights": "update_svd"},
        title="LoRA-XS from the first step of full fine-tuning",
        formula="W + B R A, B and A frozen at the SVD of the first step on W",
        paper="LoRA-SB, arXiv 2411.19557",
        identity_at_init=False,
        calibration_share=0.001,
        default_learning_rate=1e-3,
    )
)
