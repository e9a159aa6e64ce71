"""GaLore: full fine-tuning whose optimizer remembers each matrix in a low-rank subspace of its gradient.

``W <- W - eta scale P Adam(P^T G)`` with ``P`` the leading singular vectors of the gradient ``G``, drawn anew every
``update_proj_gap`` steps. Zhao et al., arXiv 2403.03507, algorithm 2. Every parameter trains; moments take
``2 m r + n r`` numbers of a ``m x n`` matrix (``m >= n``) in place of ``2 m n``.

The optimizer is ours (``_projection``): transformers' ``galore_adamw`` needs the package galore-torch (1.0, of 2024),
which imports bitsandbytes even where nothing is quantised, keeps an object of its own in the optimizer's state, so
that no checkpoint of it can be read without running a pickle, and takes rank and targets from settings that a run does
not have. Its layer-wise form steps in every backward pass, whatever the accumulation, and has no gradient norm to clip.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from leantune.core.errors import ConfigError, MethodError, TargetError, describe, raise_all
from leantune.methods._plan import TrainingPlan
from leantune.methods._projection import ProjectedAdamW, ProjectionType
from leantune.methods._registry import METHOD_CONFIG, Method, register


@dataclass
class GaLoreConfig:
    """Options of GaLore; the defaults are those of its authors' code."""

    rank: int = field(default=128, metadata={"help": "Rank of the subspace; a smaller layer's own where it has less."})
    update_proj_gap: int = field(default=200, metadata={"help": "Optimizer steps until the subspace is computed anew."})
    scale: float = field(default=0.25, metadata={"help": "Factor of the step of projected matrices."})
    proj_type: ProjectionType = field(
        default="std",
        metadata={"help": "Side that is projected: std (the smaller), reverse_std (the larger), right or left."},
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Endings of the linear modules to project. Default: all but the output head."},
    )

    def __post_init__(self) -> None:
        problems = [
            describe(f"GaLoreConfig.{name}", repr(getattr(self, name)), "above 0", "try the default")
            for name in ("rank", "update_proj_gap", "scale")
            if not getattr(self, name) > 0
        ]
        if self.proj_type not in ("std", "reverse_std", "right", "left"):
            problems.append(describe("GaLoreConfig.proj_type", repr(self.proj_type), "std or another", "try std"))
        raise_all(problems, ConfigError)


def projected(model: nn.Module, config: GaLoreConfig) -> dict[str, nn.Parameter]:
    """The weights that are projected, by their path.

    Raises:
        TargetError: the config names modules that are not there.
    """
    named = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear | Conv1D)}
    if config.target_modules is None:
        find: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = find()
        found = {name: each for name, each in named.items() if each is not head and not _is_head(name)}
    else:
        endings = tuple(config.target_modules)
        found = {name: each for name, each in named.items() if name in endings or name.rpartition(".")[2] in endings}
    if not found:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in named})) or "none"
        wanted = f"endings of its linear modules ({there})"
        raise TargetError(describe("target_modules", str(config.target_modules), wanted, "mend the names"))
    return {f"{name}.weight": cast(nn.Parameter, each.weight) for name, each in found.items()}


def _is_head(name: str) -> bool:
    return name.split(".")[0] in ("classifier", "score", "lm_head", "qa_outputs")


def _plan(model: nn.Module) -> TrainingPlan:
    config: GaLoreConfig = getattr(model, METHOD_CONFIG)

    def groups(model: nn.Module, rate: float, decay: float) -> list[dict[str, Any]]:
        del rate
        matrices = projected(model, config)
        own = {id(each) for each in matrices.values()}
        others = [each for each in model.parameters() if each.requires_grad and id(each) not in own]
        options = {name: getattr(config, name) for name in ("rank", "update_proj_gap", "scale", "proj_type")}
        found: list[dict[str, Any]] = [
            {"params": list(matrices.values()), "weight_decay": decay, **options},
            {"params": [each for each in others if each.dim() > 1], "weight_decay": decay},
            {"params": [each for each in others if each.dim() <= 1], "weight_decay": 0.0},
        ]
        return [group for group in found if group["params"]]

    def optimizer(groups: list[dict[str, Any]], rate: float, arguments: Any) -> ProjectedAdamW:
        if getattr(arguments, "fsdp", None) or getattr(arguments, "deepspeed", None):
            got = "a model sharded over processes, of whose gradients none is whole"
            raise MethodError(describe("method galore", got, "one process, or DDP", "drop the sharding"))
        betas = (arguments.adam_beta1, arguments.adam_beta2)
        return ProjectedAdamW(groups, lr=rate, betas=betas, eps=arguments.adam_epsilon)

    return TrainingPlan(parameter_groups=groups, optimizer=optimizer)


def _trainable_parameters(config: GaLoreConfig, out_features: int, in_features: int) -> int:
    del config
    return out_features * in_features


def _apply(model: nn.Module, config: GaLoreConfig) -> nn.Module:
    model.requires_grad_(True)
    projected(model, config)
    setattr(model, METHOD_CONFIG, config)
    return model


register(
    Method(
        name="galore",
        title="Gradient low-rank projection",
        config=GaLoreConfig,
        formula="W - eta scale P Adam(P^T G)",
        paper="GaLore, arXiv 2403.03507",
        trainable_parameters=_trainable_parameters,
        apply=_apply,
        is_adapter=False,
        mergeable=False,
        lora_form=False,
        default_learning_rate=2e-4,
        plan=_plan,
        toy_options={"rank": 4, "update_proj_gap": 2},
    )
)
