"""The rounds of boosting, as a callback that any Trainer runs: choose blocks, train a booster, keep it, repeat.

Everything a round decides is a function of the seed and the global step, or stands in the adapter itself (which
booster is in training, and in which round), so that a resumed run goes on in the middle of a round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from leantune.core.errors import MethodError, describe
from leantune.methods._block import BlockSampler, block_of
from leantune.methods._booster import NO_ROUND, Booster
from leantune.methods._line_search import search_boosters
from leantune.methods._plan import TrainingPlan


class Boosting(TrainerCallback):
    """Runs the rounds of one adapter.

    Between rounds no booster trains: a finished one is kept at the end of the step that finishes its round, before
    that step is evaluated or saved, and the next one begins with the next step.

    Args:
        model: a ``PeftModel`` with XGBLoRA layers.
        adapter: which of its adapters.
    """

    def __init__(self, model: Any, adapter: str) -> None:
        self.tuner = model.base_model
        self.adapter = adapter
        self.config = model.peft_config[adapter]
        self.layers: dict[str, Any] = self.tuner.boosters(adapter)
        named = self.config.layers_pattern or ()
        patterns = [named] if isinstance(named, str) else named
        self.blocks: dict[str, list[str]] = {}
        for path in self.layers:
            self.blocks.setdefault(block_of(path, patterns), []).append(path)
        count, size = len(self.blocks), self.config.blocks_per_round
        size = math.ceil(count / 3) if size is None else size or count
        self.sampler = BlockSampler(self.config.block_sampling, count, size, self.config.seed)
        self.settled = True
        self._offset = 0
        self._has_begun = False
        self._undecided = False
        self._rates: list[Any] = []
        self._factor = 1.0
        self._told: dict[str, Any] = {}
        self._step_loss: Callable[[], float] | None = None

    def plan(self) -> TrainingPlan:
        """What it asks of the training loop."""
        return TrainingPlan(
            callbacks=[self],
            needs_evaluation="early_stopping_rounds needs a validation loss"
            if self.config.early_stopping_rounds
            else "",
            is_settled=lambda: self.settled,
            is_over=self.is_over,
            trained_at_once=self._trained_at_once(),
            take_step_loss=self.take_step_loss if self.config.line_search else None,
        )

    def _trained_at_once(self) -> int:
        """With the largest blocks drawn; heads that train whole train in every round."""
        sizes = [sum(self._size(path) for path in paths) for paths in self.blocks.values()]
        resting = sum(sorted(sizes)[: len(sizes) - self.sampler.size])
        return sum(each.numel() for each in self.tuner.parameters() if each.requires_grad) - resting

    def _size(self, path: str) -> int:
        own = self.booster(path)
        return own.A.numel() + own.B.numel()

    def booster(self, path: str) -> Booster:
        """The boosters of a layer."""
        found: Booster = self.layers[path].booster(self.adapter)
        return found

    def boosters(self) -> Iterator[tuple[str, Booster]]:
        """Path and boosters of every layer."""
        return ((path, self.booster(path)) for path in self.layers)

    @override
    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Refuse what cannot be before anything is written; as many steps as rounds were asked for."""
        self._require_steady(args)
        if self.config.num_boost_round is not None:
            steps = self.config.num_boost_round * self.config.steps_per_round
            args.max_steps = min(steps, args.max_steps) if args.max_steps > 0 else steps

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Take up the rounds where the adapter and the step say they are."""
        self._require_steady(args)
        self._require_all(keywords.get("optimizer"))
        if self.config.line_search and self._step_loss is None:
            got = "line_search in a Trainer that does not give the loss of a step's batches"
            raise MethodError(describe("XGBLoRA", got, "leantune's own trainer", "use leantune train, or leave it out"))
        done, within = divmod(state.global_step, self.config.steps_per_round)
        if state.global_step == 0:
            self._settle_before()
        self.tuner.set_iteration_range(None, self.adapter)
        self._has_begun = self.tuner.has_rounds = True
        self._offset = self.tuner.num_boosted_rounds(self.adapter) - done
        number = self._offset + done
        training = [path for path, own in self.boosters() if within and int(own.round) == number]
        if self._offset < 0 or (within and not training):
            got = f"the adapter does not hold the {done} rounds of {state.global_step} steps"
            raise MethodError(describe("XGBLoRA", got, "the adapter of this checkpoint", "resume with its own files"))
        for path, own in self.boosters():
            if path in training:
                own.train_in(number)
            else:
                own.rest()
            self._fold(path)
        self._tell(number, training)

    def _settle_before(self) -> None:
        """Training begins on what counts; what was trained outside of rounds becomes a round of its own."""
        if self.config.iteration_range is not None:
            self.tuner.set_iteration_range(self.config.iteration_range, self.adapter, drop=True)
        number = self.tuner.num_boosted_rounds(self.adapter)
        for _, own in self.boosters():
            if own.B.any():
                own.keep(number, 1.0)

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """The first step of a round begins it."""
        done, within = divmod(state.global_step, self.config.steps_per_round)
        if within == 0:
            self._begin(self._offset + done, keywords.get("optimizer"))

    def _begin(self, number: int, optimizer: Any) -> None:
        self._undecided = self.config.block_sampling == "gradient"
        chosen = list(range(len(self.blocks))) if self._undecided else self.sampler.choose(number)
        names = list(self.blocks)
        training = [path for block in chosen for path in self.blocks[names[block]]]
        for path in training:
            self.booster(path).start(self.config.seed, path, number)
            self.booster(path).train_in(number)
        self._forget(optimizer)
        self._tell(number, training)

    @override
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Gradients are there: choose by them where that was asked for, and set the rate of the round's warm-up."""
        done, within = divmod(state.global_step, self.config.steps_per_round)
        if self._undecided:
            self._decide(self._offset + done)
        for _, own in self.boosters():
            if own.resting:
                own.A.grad = own.B.grad = None
        # A warm-up longer than that would keep a short round from ever reaching the rate of the run.
        warmup = min(self.config.warmup_steps, self.config.steps_per_round // 2)
        self._factor = min(1.0, (within + 1) / (warmup + 1))
        groups = _inner(keywords.get("optimizer")).param_groups
        self._rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * self._factor

    def _decide(self, number: int) -> None:
        """Draw the blocks by the norm of their gradient.

        ``B`` being zero, ``dL/dB = s G A^T`` with ``G`` the weight's gradient and ``A`` random, so that
        ``|dL/dB|^2 in / (s |A|)^2`` is ``|G|^2`` in expectation. It costs nothing but a backward through all blocks.
        """
        norms = [math.sqrt(sum(self._square(path) for path in paths)) for paths in self.blocks.values()]
        chosen = self.sampler.choose(number, norms)
        training = [path for block, paths in enumerate(self.blocks.values()) if block in chosen for path in paths]
        for path, own in self.boosters():
            if path not in training:
                own.rest()
        self._undecided = False
        self._tell(number, training)

    def _square(self, path: str) -> float:
        own = self.booster(path)
        if own.B.grad is None:
            return 0.0
        A = own.A.detach().double()
        return float(own.B.grad.double().square().sum() * A.shape[1] / (A.square().sum() * own.scaling**2))

    @override
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """The step is taken: the schedule goes on from its own rates."""
        for group, rate in zip(_inner(keywords.get("optimizer")).param_groups, self._rates, strict=True):
            group["lr"] = rate

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> TrainerControl:
        """The last step of a round keeps its booster, before anyone evaluates or saves."""
        done, within = divmod(state.global_step, self.config.steps_per_round)
        if within:
            return control
        self._keep(self._scale())
        self._forget(keywords.get("optimizer"))
        if self.config.eval_rounds or self.config.early_stopping_rounds:
            control.should_evaluate |= done % (self.config.eval_rounds or 1) == 0
        control.should_training_stop |= self.is_over(state)
        return control

    def is_over(self, state: TrainerState) -> bool:
        """Whether there are to be no more rounds: as many as were asked for, or enough without a lower loss."""
        done, within = divmod(state.global_step, self.config.steps_per_round)
        if within:
            return False
        if self.config.num_boost_round is not None and done >= self.config.num_boost_round:
            return True
        patience, scores = self.config.early_stopping_rounds, self._scores(state)
        # Up to the newest evaluation: a round that is not measured yet may be the best.
        return patience is not None and bool(scores) and scores[-1][1] - min(scores)[1] >= patience

    def take_step_loss(self, compute: Callable[[], float]) -> None:
        """Be given what computes the loss of the newest step's batches, for the line search."""
        self._step_loss = compute

    def _scale(self) -> float:
        """How much of the finished boosters to keep, by the loss on the last batches they were trained on."""
        if self._step_loss is None:
            return 1.0
        found = search_boosters([own for _, own in self.boosters() if int(own.round) != NO_ROUND], self._step_loss)
        self._told["step_scale"] = found.scale
        return found.scale

    def _keep(self, scale: float = 1.0) -> None:
        for path, own in self.boosters():
            if int(own.round) != NO_ROUND:
                own.keep(int(own.round), self.config.shrinkage * scale)
                self._fold(path)

    def _fold(self, path: str) -> None:
        if self.config.fold:
            self.layers[path].fold(self.adapter)

    @override
    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> TrainerControl:
        """Enough rounds without a lower validation loss end the training."""
        control.should_training_stop |= self.is_over(state)
        return control

    def _scores(self, state: TrainerState) -> list[tuple[float, int]]:
        """The validation losses after whole rounds, and these rounds."""
        every = self.config.steps_per_round
        return [
            (line["eval_loss"], self._offset + line["step"] // every - 1)
            for line in state.log_history
            if line["step"] and line["step"] % every == 0 and math.isfinite(line.get("eval_loss", math.nan))
        ]

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **keywords: Any,
    ) -> None:
        """Whoever logs after this one sees the round, its blocks, and the rate that the step was taken with."""
        if logs is not None and "loss" in logs:
            logs |= self._told
            if "learning_rate" in logs:
                logs["learning_rate"] *= self._factor

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """A booster that the end of training cut short is kept too; then the adapter is as one that was loaded."""
        partial = any(int(own.round) != NO_ROUND for _, own in self.boosters())
        self._keep()
        rounds = self.tuner.num_boosted_rounds(self.adapter)
        if not self._has_begun:
            # Nothing was left to train: the checkpoint's rounds are all there are.
            self._offset = rounds - math.ceil(state.global_step / self.config.steps_per_round)
        self.config.num_boosted_rounds = rounds
        self.settled = not partial or self.config.shrinkage == 1
        scores = self._scores(state) if self.config.early_stopping_rounds is not None else []
        if scores:
            # Of equals the earliest.
            self.config.best_score, best = min(scores)
            self.config.best_iteration = best
            if best + 1 < rounds:
                self.tuner.set_iteration_range((0, best + 1), self.adapter)
                self.settled = False
        self.tuner.has_rounds = False
        for path, own in self.boosters():
            own.working, own.resting = None, False
            own.start(self.config.seed, path, rounds)
            own.requires_grad_(True)

    def _tell(self, number: int, training: list[str]) -> None:
        names = [block for block, paths in self.blocks.items() if set(paths) & set(training)]
        self._told = {"round": number, "blocks": names}

    def _forget(self, optimizer: Any) -> None:
        """Leave nothing of the round before in the optimizer: neither moments nor the count of steps."""
        state = _inner(optimizer).state
        for _, own in self.boosters():
            state.pop(own.A, None)
            state.pop(own.B, None)

    def _require_all(self, optimizer: Any) -> None:
        """An optimizer that was made over the blocks of one round would never train the others."""
        held = {id(each) for group in _inner(optimizer).param_groups for each in group["params"]}
        missing = [path for path, own in self.boosters() if id(own.A) not in held or id(own.B) not in held]
        if missing:
            got = f"holds no booster of {', '.join(missing[:3])}" + " and more" * (len(missing) > 3)
            do = "make it while all boosters have requires_grad, as the Trainer does"
            raise MethodError(describe("optimizer", got, "the boosters of all blocks", do))

    def _require_steady(self, args: TrainingArguments) -> None:
        if args.torch_compile:
            got = "torch_compile, and each round has another graph"
            raise MethodError(describe("XGBLoRA", got, "an uncompiled model", "leave compile out"))
        if args.world_size > 1 or args.deepspeed or args.fsdp:
            got = "another set of blocks trains in each round, which processes that share gradients cannot follow"
            raise MethodError(
                describe("XGBLoRA", got, "one process", "train in one process, or use another method, e.g. lora")
            )


def _inner(optimizer: Any) -> Any:
    """The optimizer itself, without the wrapper that accelerate puts around it."""
    return getattr(optimizer, "optimizer", optimizer)
