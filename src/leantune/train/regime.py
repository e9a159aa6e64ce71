"""How a run computes and steps: the optimizer by transformers' name, and settings that do not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leantune.core.errors import ConfigError, MethodError, describe, did_you_mean, raise_all

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from transformers import Trainer

    from leantune.methods import TrainingPlan
    from leantune.train.config import RunConfig

DEFAULT_OPTIMIZER = "adamw_torch"
# Both are torch's AdamW; whether its fused kernel may be used is decided by the parameters.
ADAMW = (DEFAULT_OPTIMIZER, "adamw_torch_fused")
# Keywords by which transformers hands over what an optimizer steps, instead of parameter groups.
_OWN_PARAMETERS = ("params", "model", "optimizer_dict")


def optimizer_names() -> list[str]:
    """The names that transformers knows optimizers by; some need a package of their own."""
    from transformers.training_args import OptimizerNames

    return [each.value for each in OptimizerNames]


def contradictions(config: RunConfig) -> list[str]:
    """Settings of batches, precision and optimizer that do not go together."""
    problems = []
    if config.packing and config.task != "causal-lm":
        problems.append(
            describe("packing", f"task {config.task}, whose head reads one sequence a row", "causal-lm", "drop packing")
        )
    if config.group_by_length and (config.packing or config.streaming):
        other, why = ("packing", "packs are equally long") if config.packing else ("streaming", "rows are yet to come")
        problems.append(describe("group_by_length", f"together with {other}: {why}", "one of them", "drop one"))
    if config.streaming and config.max_steps is None:
        problems.append(
            describe(
                "streaming", "no max_steps", "the number of steps, since the rows are not counted", "set max_steps"
            )
        )
    if config.streaming and config.task not in ("causal-lm", "regression"):
        why = "tokens are hidden by row" if config.task == "masked-lm" else "classes are known when all rows are read"
        got = f"task {config.task}, whose {why}"
        problems.append(describe("streaming", got, "causal-lm or regression", "drop streaming"))
    if config.precision == "bf16" and config.dtype in ("float16", "float64"):
        got = f"bf16 over {config.dtype} weights"
        problems.append(describe("precision", got, "float32 or bfloat16 weights", "set dtype, or drop precision"))
    names = optimizer_names()
    if config.optimizer not in names:
        got = f"'{config.optimizer}', which transformers does not know"
        near = [name for name in names if name.startswith(config.optimizer)]
        wanted = "one of " + ", ".join(near) if near else did_you_mean(config.optimizer, names)
        problems.append(describe("optimizer", got, wanted, "mend the name"))
    return problems


def check_plan(config: RunConfig, plan: TrainingPlan) -> None:
    """Refuse settings that a method decides itself.

    Raises:
        MethodError: the method orders the rows, but they are packed, grouped or streamed; or it brings its own
            optimizer, but another one is named; or it needs rows to evaluate on, and there are none.
    """
    problems = []
    for name in ("packing", "streaming", "group_by_length"):
        if plan.sampler is not None and getattr(config, name):
            got = "the method chooses the rows of each step itself"
            problems.append(describe(f"{name} with {config.method}", got, "another order by none", f"drop {name}"))
    if plan.optimizer is not None and config.optimizer != DEFAULT_OPTIMIZER:
        got = f"{config.optimizer}, but the method brings its own optimizer"
        problems.append(describe(f"optimizer with {config.method}", got, "the default", "drop optimizer"))
    if plan.needs_evaluation and config.eval_data is None and config.eval_share is None:
        do = "set eval_data or eval_share"
        problems.append(describe(f"method {config.method}", plan.needs_evaluation, "rows to evaluate on", do))
    raise_all(problems, MethodError)


def check_prompt(config: RunConfig, model: Any) -> None:
    """Refuse what a trained prompt, which stands in the cache of keys and values, does not go with.

    Raises:
        MethodError: layers are to be checkpointed, or rows packed.
    """
    if not getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return
    reasons = {
        "gradient_checkpointing": "a checkpointed layer takes no cache, which is where the prompt stands",
        "packing": "the prompt stands before a sequence once, and not before each row in it",
    }
    problems = [
        describe(f"{name} with {config.method}", why, "the other way", f"drop {name}")
        for name, why in reasons.items()
        if getattr(config, name)
    ]
    raise_all(problems, MethodError)


def make_optimizer(trainer: Trainer, model: nn.Module, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer that the trainer's arguments name.

    Args:
        trainer: its arguments name the optimizer and its rate.
        model: for optimizers that find their parameters themselves (GaLore, APOLLO, LOMO).
        groups: the parameter groups for all others.

    Raises:
        ConfigError: it needs a package that is not installed, or settings that a run does not have.
    """
    name = getattr(trainer.args.optim, "value", trainer.args.optim)
    try:
        kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)  # type: ignore[arg-type]
        for own in _OWN_PARAMETERS:
            if own in options:
                groups = options.pop(own)
        made: Optimizer = kind(groups, **options)
    except (ImportError, ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(
            describe(f"optimizer {name}", text, "an optimizer that runs here", "install what it needs, or name another")
        ) from error
    return made
