r"""LISA: a few blocks at a time are fine-tuned whole, drawn anew every few steps; all others stand still.

    W_l <- W_l - step   for l in S_t,   W_l fixed otherwise,   S_t drawn from the L blocks every ``period`` steps

Embeddings and head train throughout, as in the paper, or never (``embeddings=False``: the backward pass then stops at
the lowest drawn block). Pan et al., arXiv 2403.17919, algorithm 1.

The optimizer holds all parameters from the start (built over the first draw alone, as LMFlow once did, it would
never step another block). A parameter that stands still has no gradient and no moments: those of a block that leaves
are dropped, so that memory does not grow with the number of blocks seen, and a block that comes back begins anew.
Which blocks train is a function of the seed and the step alone, and so the same after a resume.

Where we deviate: the paper draws each block by a probability, ``active_blocks`` of them on average; the code that its
authors published draws that many, as here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from leantune.core.errors import ConfigError, MethodError, describe, raise_all
from leantune.methods._plan import TrainingPlan
from leantune.methods._registry import METHOD_CONFIG, Method, register


@dataclass
class LISAConfig:
    """Options of LISA."""

    active_blocks: int = field(default=2, metadata={"help": "How many blocks train at a time."})
    period: int = field(default=20, metadata={"help": "Optimizer steps until other blocks are drawn."})
    embeddings: bool = field(
        default=True,
        metadata={"help": "Train what stands outside the blocks (embeddings, last norm, head) throughout."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the draw."})

    def __post_init__(self) -> None:
        problems = [
            describe(f"LISAConfig.{name}", repr(getattr(self, name)), "at least 1", "try the default")
            for name in ("active_blocks", "period")
            if getattr(self, name) < 1
        ]
        raise_all(problems, ConfigError)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model: its list of modules with the most parameters, else the modules that it is made of."""
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList)]
    lists = [each for each in lists if any(True for _ in each.parameters())]
    found = max(lists, key=_size) if lists else list(model.children())
    return [each for each in found if any(True for _ in each.parameters())]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class BlockSampler(TrainerCallback):
    """Draws the blocks that train, and lets go of what the others leave behind.

    Args:
        model: the model, whose own parameters train.
        config: how many blocks, how often, by which seed.
    """

    def __init__(self, model: nn.Module, config: LISAConfig) -> None:
        self.model, self.config = model, config
        self.blocks = blocks_of(model)
        self.drawn: frozenset[int] | None = None

    def groups(self, model: nn.Module, rate: float, decay: float) -> list[dict[str, Any]]:
        """What ever trains, whether it does now or not; norms and biases are not decayed."""
        del rate
        inside = {id(each) for block in self.blocks for each in block.parameters()}
        parameters = [each for each in model.parameters() if self.config.embeddings or id(each) in inside]
        matrices = [each for each in parameters if each.dim() > 1]
        vectors = [each for each in parameters if each.dim() <= 1]
        found = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        return [group for group in found if group["params"]]

    def choice(self, step: int) -> frozenset[int]:
        """The blocks that train in the optimizer step that follows ``step`` others."""
        # A stream for each period, so that none need be read up to where a run goes on.
        number = self.config.seed * 1_000_003 + step // self.config.period
        order = torch.randperm(len(self.blocks), generator=torch.Generator().manual_seed(number))
        return frozenset(order[: self.config.active_blocks].tolist())

    def draw(self, step: int, optimizer: Any = None) -> None:
        """Have the blocks of that step train and no others; the others' gradients and moments go."""
        drawn = self.choice(step)
        if drawn == self.drawn:
            return
        self.drawn = drawn
        inside = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        trains = {id(parameter) for number in drawn for parameter in self.blocks[number].parameters()}
        state = getattr(getattr(optimizer, "optimizer", optimizer), "state", {})
        for parameter, moments in state.items():
            # Names from a file are other objects than those of moments to come, which a file written later would show.
            state[parameter] = {sys.intern(name): value for name, value in moments.items()}
        for parameter in self.model.parameters():
            active = id(parameter) in trains or (self.config.embeddings and id(parameter) not in inside)
            parameter.requires_grad_(active)
            if not active:
                parameter.grad = None
                state.pop(parameter, None)

    @override
    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Refuse several processes: each would wait for gradients of parameters that stand still."""
        if args.world_size > 1:
            got = f"{args.world_size} processes, whose gradients are joined by a list made once"
            raise MethodError(describe("method lisa", got, "one process", "train in one, or choose an adapter method"))

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Refuse an optimizer made of the first draw alone: it would never step another block."""
        optimizer = keywords.get("optimizer")
        held = {id(each) for group in getattr(optimizer, "param_groups", []) for each in group["params"]}
        missing = [each for group in self.groups(self.model, 0.0, 0.0) for each in group["params"]]
        missing = [each for each in missing if id(each) not in held]
        if optimizer is not None and missing:
            got = f"an optimizer without {len(missing)} of the parameters that are to train"
            do = "train by leantune, or make it from the parameter groups of the method's plan"
            raise MethodError(describe("method lisa", got, "one with all of them", do))

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Draw when a period begins, and after a resume."""
        self.draw(state.global_step, keywords.get("optimizer"))


def _trainable_parameters(config: LISAConfig, out_features: int, in_features: int) -> int:
    del config
    return out_features * in_features


def _apply(model: nn.Module, config: LISAConfig) -> nn.Module:
    blocks = blocks_of(model)
    if not blocks:
        raise MethodError(
            describe("method lisa", "a model without blocks", "a list of blocks", "choose another method")
        )
    if config.active_blocks > len(blocks):
        got, wanted = f"{config.active_blocks} of {len(blocks)} blocks", f"at most {len(blocks)}"
        raise MethodError(describe("LISAConfig.active_blocks", got, wanted, "lower it, or train by full"))
    setattr(model, METHOD_CONFIG, config)
    BlockSampler(model, config).draw(0)
    return model


def _plan(model: nn.Module) -> TrainingPlan:
    sampler = BlockSampler(model, getattr(model, METHOD_CONFIG))
    return TrainingPlan(callbacks=[sampler], parameter_groups=sampler.groups)


register(
    Method(
        name="lisa",
        title="Layerwise importance sampled AdamW",
        config=LISAConfig,
        formula="W + dW in a few blocks at a time",
        paper="LISA, arXiv 2403.17919",
        trainable_parameters=_trainable_parameters,
        apply=_apply,
        is_adapter=False,
        mergeable=False,
        lora_form=False,
        default_learning_rate=1e-4,
        plan=_plan,
        toy_options={"active_blocks": 1},
    )
)
