"""From a configuration to what trains: rows, base model, method, trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from leantune.core.errors import MethodError, describe
from leantune.data import (
    Collator,
    Encoded,
    ImageCollator,
    MaskedTokens,
    PackCollator,
    Packs,
    Row,
    RowStream,
    encode,
    encode_classification,
    encode_images,
    encode_masked,
    encode_regression,
)
from leantune.methods import Method, TrainingPlan
from leantune.models import BaseModel, load_base
from leantune.train.batching import stream
from leantune.train.config import RunConfig
from leantune.train.folder import CHECKPOINTS, check_vacant, kept_template
from leantune.train.head import settle_head
from leantune.train.isolation import packing_form
from leantune.train.listener import MaskingEpoch
from leantune.train.option import user_options
from leantune.train.regime import check_plan, check_prompt
from leantune.train.rows import Rows, read_data
from leantune.train.tracker import RunArguments, check_trackers, place_logs
from leantune.train.trainer import LeanTrainer

_TASK_TYPES = {"causal-lm": "CAUSAL_LM", "classification": "SEQ_CLS", "regression": "SEQ_CLS"}
HEAD_TASKS = ("classification", "regression", "image-classification")
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass
class Examples:
    """The rows as tokens.

    Attributes:
        train: to train on, or the stream of them.
        evaluation: to measure on; None without eval_data and eval_share.
        packs: the training rows, packed; None where they are not, or are streamed.
        source: how the training file was understood, for the record.
    """

    train: Encoded | RowStream
    evaluation: Encoded | None
    packs: Packs | None = None
    source: dict[str, Any] = field(default_factory=dict)


@dataclass
class Prepared:
    """A run before its first step.

    Attributes:
        base: the base model.
        examples: the rows as tokens.
        model: the base with the method on it.
        trainer: what would train it.
        tasks: of a run with several.
    """

    base: BaseModel
    examples: Examples
    model: Any
    trainer: LeanTrainer
    tasks: list[Any] = field(default_factory=list)


def prepare(config: RunConfig, *, checkpoints: Path | None = None, resume: bool = False) -> Prepared:
    """All that comes before the first step, the same for a run and for its dry run.

    Args:
        config: the settings, learning rate resolved.
        checkpoints: where the trainer may make its folder; the run's own unless given.
        resume: the folder holds this very run.

    Raises:
        LeantuneError: the run folder is occupied, or the data, the model or the method's options are not as they must.
    """
    if not resume:
        check_vacant(config.out, config.overwrite)
    check_trackers(config.report_to)
    set_seed(config.seed)
    if config.tasks:
        from leantune.train.task_setup import prepare_tasks

        return prepare_tasks(config, checkpoints or config.out / CHECKPOINTS, resume=resume)
    # A run goes on with the template it began with, whatever became of the file.
    rows = read_data(config, kept_template(config) if resume else None)
    base = load_model(config, config.model, rows.label_names)
    if rows.template is not None:
        base.tokenizer.chat_template = rows.template
    examples = encode_rows(config, rows, base.encoder)
    model = apply_method(config, base)
    trainer = build_trainer(config, base, model, examples, checkpoints or config.out / CHECKPOINTS)
    return Prepared(base, examples, model, trainer)


def encode_rows(config: RunConfig, rows: Rows, tokenizer: Any) -> Examples:
    """The rows as token ids with their labels.

    Raises:
        DataError: a row carries no loss, or a label is unknown.
    """
    evaluation = None if rows.evaluation is None else _encode(config, rows.evaluation, rows.label_names, tokenizer)
    if config.streaming:
        read = stream(config, lambda some: _encode(config, some, None, tokenizer))
        return Examples(read, evaluation, source=rows.source)
    train = _encode(config, rows.train, rows.label_names, tokenizer)
    packs = Packs.of(train, config.max_length, config.seed) if config.packing else None
    return Examples(train, evaluation, packs, rows.source)


def _encode(config: RunConfig, rows: list[Row], labels: list[str] | None, tokenizer: Any) -> Encoded:
    if config.task == "classification":
        return encode_classification(rows, tokenizer, max_length=config.max_length, label_names=labels)
    if config.task == "regression":
        return encode_regression(rows, tokenizer, max_length=config.max_length)
    if config.task == "masked-lm":
        return encode_masked(rows, tokenizer, max_length=config.max_length)
    if config.task == "image-classification":
        return encode_images(rows, label_names=labels)
    return encode(rows, tokenizer, max_length=config.max_length)


def load_model(config: RunConfig, name: str, labels: list[str] | None) -> BaseModel:
    """The base model of a run, with the head its task needs.

    Args:
        config: task, dtype, revision.
        name: the base model, or the folder of a fully trained one.
        labels: class names, for a classification head.

    Raises:
        ModelError: it cannot be found or read.
    """
    base = load_base(
        name,
        task=config.task,
        num_labels=len(labels) if labels else None,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        quantization=config.quantization,
        quantization_backend=config.quantization_backend,
        device=config.device,
    )
    if labels:
        base.model.config.id2label = dict(enumerate(labels))
        base.model.config.label2id = {label: number for number, label in enumerate(labels)}
    return base


def method_config(method: Method, config: RunConfig, base: BaseModel | None = None) -> Any:
    """The method's own config object for a run: its options, the run's seed, the task, the head that trains whole.

    Raises:
        MethodError: the options make of the head a target of the adapter.
    """
    options = dict(config.method_options)
    if "seed" in user_options(method.config):
        options.setdefault("seed", config.seed)
    if "task_type" in getattr(method.config, "__dataclass_fields__", {}):
        # PEFT has no task of its own for the others.
        options["task_type"] = _TASK_TYPES.get(config.task)
    if base is not None and config.task in HEAD_TASKS and method.is_adapter:
        settle_head(options, base, method)
    return method.make_config(**options)


def apply_method(config: RunConfig, base: BaseModel) -> Any:
    """The base model with the method on it, ready to train.

    Raises:
        LeantuneError: the options contradict each other or do not fit the model.
    """
    method = config.chosen_method
    try:
        model = method.apply(base.model, method_config(method, config, base))
    except (ValueError, TypeError) as error:
        text = " ".join(str(error).split())
        do = f"see leantune methods {method.name} and leantune inspect model {base.name}"
        raise MethodError(describe(f"method {method.name}", text, "options that fit the model", do)) from error
    check_prompt(config, model)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass."""
    # transformers 5.23 has renamed the switch; the older name goes in its version 6.
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    # It also makes the embeddings ask for gradients, for a kind of checkpointing that is not used here: the backward
    # pass would then go below the lowest trained layer.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.disable_input_require_grads()


def build_trainer(
    config: RunConfig, base: BaseModel, model: Any, examples: Examples, checkpoints: Path, tasks: Sequence[Any] = ()
) -> LeanTrainer:
    """The trainer of a run (of one with several tasks: of them all); its checkpoints go into the folder given."""
    plan = config.chosen_method.plan(model)
    check_plan(config, plan)
    make: Any = LeanTrainer
    if tasks:
        from leantune.train.task_trainer import TaskTrainer, with_tasks

        make, plan = partial(TaskTrainer, tasks=tasks), with_tasks(plan)
    evaluation: Any = None
    if examples.evaluation is not None:
        # The loss does not depend on their order, the padding does.
        evaluation = sorted(examples.evaluation, key=lambda example: len(example.get("input_ids", ())))
        if config.task == "masked-lm":
            evaluation = MaskedTokens(evaluation, base.tokenizer, seed=config.seed, fixed=True)
    training: Any = examples.packs if examples.packs is not None else examples.train
    if config.task == "masked-lm":
        training = MaskedTokens(training, base.tokenizer, seed=config.seed)
    trainer: LeanTrainer = make(
        model=model,
        plan=plan,
        task=config.task,
        logits=config.logits,
        group_by_length=config.group_by_length,
        args=_arguments(config, checkpoints),
        train_dataset=training,
        eval_dataset=evaluation,
        data_collator=collator_of(config, base, plan),
    )
    if isinstance(training, MaskedTokens):
        trainer.add_callback(MaskingEpoch(training))
    if isinstance(trainer.data_collator, PackCollator):
        # Tried where the model now stands and as it will run: attention kernels differ by device and precision.
        with trainer.accelerator.autocast():
            form = packing_form(model, config.max_length)
        trainer.data_collator.form, trainer.data_collator.mask_dtype = form["form"], form["mask_dtype"]
    place_logs(trainer, config.out)
    return trainer


def collator_of(config: RunConfig, base: BaseModel, plan: TrainingPlan) -> Collator | ImageCollator:
    """Batches (of packs, with packing) for this model, with the columns that the plan asks for."""
    if config.task == "image-classification":
        return ImageCollator(base.image_processor, plan.batch_columns)
    make = PackCollator if config.packing else Collator
    return make(base.tokenizer.pad_token_id, plan.batch_columns)


def _arguments(config: RunConfig, checkpoints: Path) -> RunArguments:
    return RunArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=SCHEDULES[config.schedule],
        # Below one it is a share of the steps.
        warmup_steps=config.warmup_ratio,
        optim=config.optimizer,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        bf16=config.precision == "bf16",
        torch_compile=config.compile,
        seed=config.seed,
        data_seed=config.seed,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 1,
        save_total_limit=config.keep_checkpoints,
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps,
        # Every step goes to metrics.jsonl; log_steps decides what the screen shows.
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=config.report_to or "none",
        run_name=config.run_name or config.out.absolute().name,
        run_settings=config.model_dump(mode="json"),
        disable_tqdm=True,
        # Without an accelerator, processes find each other, and bf16 is taken, only when told that they run on CPUs.
        use_cpu=config.device == "cpu" or not torch.accelerator.is_available(),
        # Every trained part gets a gradient in every backward, and the buffers are constants.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        # Each process reads a stream itself and takes its share: joined in one process, batches would need one length.
        accelerator_config={"dispatch_batches": False},
        dataloader_num_workers=0,
        dataloader_pin_memory=config.device != "cpu" and torch.cuda.is_available(),
    )
