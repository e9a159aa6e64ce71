"""The training loop: ``transformers.Trainer`` with our loss, and whatever a method's plan asks for.

Resume, accumulation, mixed precision, trackers and several processes stay the Trainer's own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from leantune.adapters.restoration import native_errors, restore
from leantune.adapters.verification import WEIGHTS_NAME
from leantune.core.errors import DataError, MethodError, RunError, describe
from leantune.methods import TrainingPlan
from leantune.train import checkpoint, distributed
from leantune.train.failure import reading
from leantune.train.isolation import packed_inputs
from leantune.train.listener import plan_callbacks, plan_of
from leantune.train.loss import Selection, count_items, dense_losses, per_row, selected_losses
from leantune.train.meter import Meter
from leantune.train.regime import ADAMW, make_optimizer
from leantune.train.sampler import LengthSampler
from leantune.train.validation import validate

Task = Literal["causal-lm", "classification", "regression", "masked-lm", "image-classification"]


class LeanTrainer(Trainer):
    """A Trainer whose loss is the mean over the loss-carrying tokens of a whole step, or what the plan makes of it.

    Args:
        model: the model to train, method applied.
        plan: what the method asks for; None asks the method of the model's adapter.
        task: a causal language model, or the kind of head.
        logits: ``"selected"`` computes logits only where loss is, ``"all"`` everywhere.
        group_by_length: batches of similar row length (needs examples with ``input_ids``).
        keywords: everything else ``transformers.Trainer`` takes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        plan: TrainingPlan | None = None,
        task: Task = "causal-lm",
        logits: Literal["selected", "all"] = "selected",
        group_by_length: bool = False,
        **keywords: Any,
    ) -> None:
        self.plan = plan if plan is not None else plan_of(model)
        self.task = task
        self.logits = logits
        self.group_by_length = group_by_length
        self.meter = Meter()
        # The record of the run that its checkpoints carry.
        self.record: dict[str, Any] = {}
        self._writing: Path | None = None
        callbacks = [*(keywords.pop("callbacks", None) or []), *plan_callbacks(self.plan)]
        super().__init__(model=model, callbacks=callbacks, **keywords)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        # The loss below is already divided by the number of items of the whole step.
        self.loss_is_scaled_for_ga = True
        self._newest: tuple[list[Any], Any] = ([], None)
        if self.plan.take_step_loss is not None:
            self.plan.take_step_loss(self._loss_of_newest_step)

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        """``Trainer.train``, timed; a bad row that turns up on the way leaves a checkpoint of the steps before it."""
        self.meter.start()
        try:
            return super().train(*arguments, **keywords)
        except DataError as error:
            raise self._kept(error) from error
        finally:
            self.meter.stop()

    def _kept(self, error: DataError) -> DataError:
        """The error, with the place where what was trained before it is kept."""
        step = self.state.global_step
        if step == 0:
            return error
        path = Path(super()._get_output_dir(None)) / f"checkpoint-{step}"
        if not path.is_dir():
            self._save_checkpoint(self.model_wrapped, None)
        return DataError(f"{error}; the {step} steps before it are kept in {path}")

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's; asked for FSDP2 it shards over CPU processes too."""
        super().create_accelerator_and_postprocess()
        distributed.shard_on_cpu(self.accelerator)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    # The loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one forward pass, as its share of the loss of the step."""
        inputs, documents = packed_inputs(dict(inputs))
        columns = {name: inputs.pop(name) for name in self.plan.batch_columns if name in inputs}
        outputs = None
        if model.training and self.plan.before_forward is not None:
            self.plan.before_forward(columns)
        if model.training and self.plan.loss is not None:
            loss = self.plan.loss(model, inputs, columns) / self._passes()
        elif self.task != "causal-lm":
            outputs = model(**inputs)
            items = count_items(self.task, inputs["labels"])
            loss = outputs.loss * items / self._items(num_items_in_batch, items)
        elif self._takes_stock_path():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            labels = inputs.pop("labels")
            selection = Selection.of(labels, documents)
            compute = selected_losses if self.logits == "selected" else dense_losses
            losses = compute(model, inputs, selection)
            if model.training and self.plan.loss_reduction is not None:
                # A method's own reduction is a mean in its own sense: the step takes the mean over its passes.
                loss = self.plan.loss_reduction(*per_row(losses, selection), columns) / self._passes()
            else:
                loss = losses.sum() / self._items(num_items_in_batch, len(losses))
        if model.training:
            self._check_finite("the loss", loss.detach())
        return (loss, outputs if outputs is not None else {"loss": loss}) if return_outputs else loss

    def _passes(self) -> int:
        """Forward passes of the optimizer step."""
        return int(getattr(self, "current_gradient_accumulation_steps", 1))

    def _takes_stock_path(self) -> bool:
        return self.logits == "all" and self.plan.loss_reduction is None and self.model_accepts_loss_kwargs

    def _items(self, given: Tensor | int | None, own: int | Tensor) -> Tensor | float:
        """What to divide by: the items of the step over all processes, whose gradients will be averaged."""
        if given is None:
            return max(own, 1)
        across = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return given / across

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Tokens with loss (rows, for a head) in all forward passes of a step, over all processes."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        labels = [batch["labels"] for batch in batch_samples]
        items = torch.stack([count_items(self.task, each).to(device) for each in labels]).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            items = self.accelerator.gather(items).sum()
        return items.clamp(min=1)

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
        """The batches of a step, counted."""
        batches, items = super().get_batch_samples(*arguments, **keywords)
        seen = Meter()
        for batch in batches:
            seen.add(batch)
        self.meter.join(distributed.sums(seen.counts, self.args.device))
        if self.plan.take_step_loss is not None:
            self._newest = batches, items
        return batches, items

    def _loss_of_newest_step(self) -> float:
        """The loss of the newest step's batches by the model as it stands now; it draws no random number."""
        batches, items = self._newest
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager(), torch.random.fork_rng(devices=[]):
                losses = [
                    self.compute_loss(model, self._prepare_inputs(batch), num_items_in_batch=items) for batch in batches
                ]
        finally:
            model.train(was_training)
        return float(sum(loss.item() for loss in losses))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As the Trainer's, or as the plan clips; the norm before it."""
        if self.plan.clip is not None:
            return self.plan.clip(self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm; a step is never taken with one that is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        # A scaler meets infinite gradients by design and skips such a step itself.
        if norm is not None and self.accelerator.scaler is None:
            self._check_finite("the gradient norm", norm)
        return norm

    def _check_finite(self, what: str, value: Any) -> None:
        number = float(value)
        if number - number == 0:
            return
        rate = self._get_learning_rate() if self.lr_scheduler is not None else self.args.learning_rate
        last = checkpoint.last_checkpoint(Path(str(self.args.output_dir)))
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written before it"
        raise RunError(
            describe(
                f"step {self.state.global_step + 1}",
                f"{what} is {number}",
                "a finite number",
                f"lower lr (it was {rate:.3g}, peak {self.args.learning_rate:.3g}) or raise warmup_ratio; {kept}",
            )
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the estimate walks over all parameters in every step and nobody here reads it."""
        del inputs
        return 0

    # Optimizer and rows

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The named optimizer over the trainable parameters alone, or the plan's parameter groups and optimizer."""
        if self.optimizer is not None:
            return self.optimizer
        model = model if model is not None else cast(nn.Module, self.model)
        rate, decay = self.args.learning_rate, self.args.weight_decay
        if self.plan.parameter_groups is not None:
            groups = self.plan.parameter_groups(model, rate, decay)
        else:
            groups = self._parameter_groups(model, decay)
        if self.plan.optimizer is not None:
            self.optimizer = self.plan.optimizer(groups, rate, self.args)
        elif self.args.optim not in ADAMW:
            self.optimizer = make_optimizer(self, model, groups)
        else:
            # The fused kernel takes a strided view for a contiguous tensor and writes into its neighbours.
            contiguous = all(parameter.is_contiguous() for group in groups for parameter in group["params"])
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(
                groups, lr=rate, betas=betas, eps=self.args.adam_epsilon, fused=contiguous
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The named schedule, or the plan's."""
        if self.plan.scheduler is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = self.plan.scheduler(optimizer or self.optimizer, num_training_steps, self.args)
        return self.lr_scheduler

    def _parameter_groups(self, model: nn.Module, decay: float) -> list[dict[str, Any]]:
        trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
        if not trainable:
            raise MethodError(
                describe(type(model).__name__, "nothing to train", "trainable parameters", "apply a method")
            )
        decayed = set(self.get_decay_parameter_names(model)) if decay else set()
        groups = [
            {"params": [each for name, each in trainable.items() if name in decayed], "weight_decay": decay},
            {"params": [each for name, each in trainable.items() if name not in decayed], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if self.plan.sampler is not None:
            return self.plan.sampler(dataset, self.args.seed)
        if self.group_by_length:
            rows: Any = dataset
            lengths = [len(example.get("input_ids", ())) for example in rows]
            # The processes share out what is one batch to all of them together.
            return LengthSampler(lengths, self.args.train_batch_size * self.args.world_size, self.args.seed)
        return super()._get_train_sampler(train_dataset)

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The loss per token (per row, for a head) over all batches, whatever their sizes."""
        if description != "Evaluation" or self.compute_metrics is not None:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        metrics, rows = validate(self, dataloader)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=named, num_samples=rows)

    @property
    def evaluated_last_step(self) -> bool:
        """Whether the newest evaluation is of the model as it is now."""
        steps = [line["step"] for line in self.state.log_history if "eval_loss" in line]
        settled = self.plan.is_settled is None or self.plan.is_settled()
        return settled and bool(steps) and steps[-1] == self.state.global_step

    def evaluate(self, *arguments: Any, **keywords: Any) -> Any:
        """``Trainer.evaluate``; it draws no random number, so that evaluating more often changes nothing."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*arguments, **keywords)

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; of a model sharded by FSDP2 nothing is gathered that an adapter's file does not hold."""
        if self.accelerator.is_fsdp2 and isinstance(self.model, PeftModel):
            self._save(output_dir, state_dict=distributed.whole_state(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing) if self._writing is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint where no reader looks, and give it its name once it is complete."""
        folder = Path(super()._get_output_dir(trial))
        target = folder / f"checkpoint-{self.state.global_step}"
        writing = folder / checkpoint.WRITING
        if self.args.should_save and writing.exists():
            # Strictly: a file left there would become a part of this checkpoint.
            shutil.rmtree(writing)
        self.accelerator.wait_for_everyone()
        self._writing = writing
        try:
            with native_errors(target):
                super()._save_checkpoint(model, trial)
        finally:
            self._writing = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._name_best(writing, target)
            checkpoint.seal(writing / target.name, self._facts())
            checkpoint.publish(writing / target.name, target)
            if self.args.save_total_limit:
                checkpoint.prune(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _facts(self) -> dict[str, Any]:
        """What a run that goes on from here needs to know."""
        meter = {**self.meter.state(), "device": self.args.device.type, "processes": self.args.world_size}
        facts = {"step": self.state.global_step, "meter": meter}
        if not self._is_sharded:
            model = cast(nn.Module, self.model)
            facts["trained"] = checkpoint.trained_hash(model, self._held(model))
        return facts | ({"run": self.record} if self.record else {})

    def _held(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameter groups of the optimizer; before there is one, those that the plan will give it."""
        if self.optimizer is not None:
            return self.optimizer.param_groups
        groups = self.plan.parameter_groups
        return [] if groups is None else groups(model, self.args.learning_rate, self.args.weight_decay)

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _init_training_state(self, max_steps: int, *arguments: Any) -> tuple[int, int]:
        found: tuple[int, int] = super()._init_training_state(max_steps, *arguments)
        # A state that was loaded would go on saving and evaluating as often as the run before.
        self.state.compute_steps(self.args, max_steps)
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Put the trained parameters back, and prove that they are those that were saved."""
        path = Path(resume_from_checkpoint)
        target = model if model is not None else cast(nn.Module, self.model)
        inner = self.accelerator.unwrap_model(target, keep_torch_compile=False)
        places = _adapter_places(inner, path) if isinstance(inner, PeftModel) and not self._is_sharded else {}
        for name, place in places.items():
            restore(inner, place, adapter_name=name)
        if not places:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        wanted = checkpoint.sealed(path).get("trained") if not self._is_sharded else None
        if wanted and checkpoint.trained_hash(target, self._held(target)) != wanted:
            got = "the parameters it gives are not those that were saved"
            raise RunError(
                describe(str(path), got, "the same bits", "go on from the checkpoint before: remove this one")
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(Path(str(checkpoint))):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(Path(str(checkpoint))):
            super()._load_rng_state(checkpoint)

    def finish_from(self, path: Path) -> bool:
        """Take over a checkpoint that no step is left to train from.

        Args:
            path: the checkpoint.

        Returns:
            False, with nothing done, when steps are left.
        """
        state = TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
        planned = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        if state.global_step < planned and not (self.plan.is_over is not None and self.plan.is_over(state)):
            return False
        self.meter.start()
        self._load_from_checkpoint(str(path))
        self.state = state
        for each in self.plan.callbacks:
            each.on_train_end(self.args, self.state, self.control, model=self.model)
        self.meter.stop()
        return True

    def _name_best(self, writing: Path, target: Path) -> None:
        """The state must name the best checkpoint by the name it will have, not by where it was written."""
        if self.state.best_model_checkpoint != str(writing / target.name):
            return
        self.state.best_model_checkpoint = str(target)
        path = writing / target.name / "trainer_state.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        state["best_model_checkpoint"] = str(target)
        path.write_text(json.dumps(state, indent=2), encoding="utf-8")


def _adapter_places(model: PeftModel, folder: Path) -> dict[str, Path]:
    """Where PEFT puts the adapters of a model: one of several into a folder of its name."""
    places = {name: folder if name == "default" else folder / name for name in model.peft_config}
    return {name: place for name, place in places.items() if (place / WEIGHTS_NAME).is_file()}
