"""Faults in the loss, the optimizer, resuming, several processes and the run itself."""

from __future__ import annotations

from harness import Fault

TRAINER = "leantune/train/trainer.py"
LOSS = "leantune/train/loss.py"
RESUMPTION = "leantune/train/resumption.py"

TRAINER_TESTS = "tests/train/test_lean_trainer.py"
CHECKPOINT_TESTS = "tests/train/test_checkpoint.py"
RESUME_TESTS = "tests/train/test_resume.py"
PROCESS_TESTS = "tests/train/test_process.py"
SAME_RUN = f"{CHECKPOINT_TESTS}::test_a_resumed_run_equals_the_uninterrupted_one"

TRAINING_FAULTS = (
    Fault(
        "loss shifted by one",
        LOSS,
        "return cls(sequence * length + column, labels",
        "return cls(sequence * length + column + 1, labels",
        "each position is asked for the token it was given: the loss falls to zero and the model learns to repeat",
        ("tests/train/test_selected_loss.py::test_loss_and_gradients_follow_the_formula",),
    ),
    Fault(
        "loss mask inverted",
        LOSS,
        "sequence, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)",
        "sequence, column = (labels[:, 1:] == IGNORED).nonzero(as_tuple=True)",
        "the loss is taken where there is nothing to learn",
        ("tests/train/test_selected_loss.py::test_selection_of_a_batch_worked_out_by_hand",),
    ),
    Fault(
        "mean of means under accumulation",
        TRAINER,
        "loss = losses.sum() / self._items(num_items_in_batch, len(losses))",
        "loss = losses.mean() / getattr(self, 'current_gradient_accumulation_steps', 1)",
        "a short row weighs as much as a long one, and a run depends on how its batch is cut",
        (f"{TRAINER_TESTS}::test_four_passes_of_one_row_are_one_pass_of_four",),
    ),
    Fault(
        "loss divided by the passes once more",
        TRAINER,
        "        self.loss_is_scaled_for_ga = True\n",
        "        self.loss_is_scaled_for_ga = False\n",
        "gradient accumulation divides the learning signal by the number of passes a second time",
        (f"{TRAINER_TESTS}::test_four_passes_of_one_row_are_one_pass_of_four",),
    ),
    Fault(
        "fused AdamW on a strided parameter",
        TRAINER,
        "fused=contiguous",
        "fused=True",
        "the fused kernel writes into neighbouring columns of the base",
        (f"{TRAINER_TESTS}::test_a_strided_parameter_is_never_given_to_the_fused_kernel",),
    ),
    Fault(
        "stale optimizer state",
        TRAINER,
        "            checkpoint.publish(writing / target.name, target)\n",
        "            (writing / target.name / 'optimizer.pt').unlink()\n"
        "            checkpoint.publish(writing / target.name, target)\n",
        "a resumed run starts its moments anew and is another run",
        ("tests/train/test_checkpoint.py::test_a_resumed_run_equals_the_uninterrupted_one",),
    ),
    Fault(
        "a checkpoint under its name before it is whole",
        TRAINER,
        "        writing = folder / checkpoint.WRITING\n",
        "        writing = folder\n",
        "a kill while a checkpoint is written leaves half of one, and resume takes it",
        ("tests/train/test_checkpoint.py::test_a_write_that_fails_half_way_leaves_the_last_good_checkpoint",),
    ),
)

RESUME_FAULTS = (
    Fault(
        "the random state is not restored",
        TRAINER,
        "            super()._load_rng_state(checkpoint)\n",
        "            Path(str(checkpoint)).stat()\n",
        "a resumed run drops out other units and is another run",
        (f"{SAME_RUN}[1-shuffled]",),
    ),
    Fault(
        "the schedule begins anew",
        TRAINER,
        "            super()._load_optimizer_and_scheduler(checkpoint)\n",
        "            begun = self.lr_scheduler.state_dict()\n"
        "            super()._load_optimizer_and_scheduler(checkpoint)\n"
        "            self.lr_scheduler.load_state_dict(begun)\n",
        "a run that is resumed late warms up again and ends at a high rate",
        (f"{SAME_RUN}[1-shuffled]",),
    ),
    Fault(
        "one batch is trained on twice",
        TRAINER,
        "        return found\n\n    def _load_from_checkpoint",
        "        return found[0], max(found[1] - 1, 0)\n\n    def _load_from_checkpoint",
        "a resumed run is a batch behind the uninterrupted one, in every epoch that it resumes",
        (f"{SAME_RUN}[1-shuffled]",),
    ),
    Fault(
        "lines after the checkpoint stay in the metrics",
        "leantune/train/record.py",
        'json.dumps(line) + "\\n" for line in kept))',
        'json.dumps(line) + "\\n" for line in kept + lines[len(kept) :]))',
        "metrics and loss curve of a resumed run hold some steps twice",
        (f"{RESUME_TESTS}::test_lost_lines_of_metrics_are_brought_back",),
    ),
    Fault(
        "another seed is no difference",
        RESUMPTION,
        '"device", "eval_steps", "eval_data"),',
        '"device", "eval_steps", "eval_data", "seed"),',
        "half of a run has one order of rows and half another, and its record names one seed",
        (f"{RESUME_TESTS}::test_other_settings_are_refused_by_name_with_both_values",),
    ),
    Fault(
        "other rows of the same number are the same data",
        RESUMPTION,
        '    if was.get("hash") != now.get("hash"):\n',
        '    if was.get("rows") != now.get("rows"):\n',
        "a run goes on with a file that was edited meanwhile",
        (f"{RESUME_TESTS}::test_other_rows_are_refused",),
    ),
    Fault(
        "a torn checkpoint is believed",
        "leantune/train/checkpoint.py",
        "        if file_hash(folder / name) != recorded:\n",
        "        if not file_hash(folder / name).startswith(recorded[:6]):\n",
        "after a power cut a run goes on from optimizer state of zeros",
        (f"{RESUME_TESTS}::test_a_torn_checkpoint_gives_way_to_the_one_before",),
    ),
)

PROCESS_FAULTS = (
    Fault(
        "the mean of the processes' means",
        TRAINER,
        "items = self.accelerator.gather(items).sum()",
        "items = items * self.args.world_size",
        "the process with the shorter answers counts as much as the other, and two train otherwise than one",
        (f"{PROCESS_TESTS}::test_items_of_a_step_are_those_of_all_processes",),
    ),
    Fault(
        "every process writes",
        "leantune/train/distributed.py",
        "        return dist.get_rank() == 0\n",
        "        return dist.get_rank() >= 0\n",
        "processes write the same files at once, and each says everything",
        (f"{PROCESS_TESTS}::test_the_first_process_alone_writes",),
    ),
    Fault(
        "rows that fill up the last round are evaluated",
        "leantune/train/validation.py",
        "        if counts:\n",
        "        if rows:\n",
        "the evaluation of two processes counts some rows twice",
        (f"{PROCESS_TESTS}::test_every_row_is_evaluated_once",),
    ),
)

RUN_FAULTS = (
    Fault(
        "a layer of a fresh head stays as it was drawn",
        "leantune/train/head.py",
        "    if kept or own:\n",
        "    if kept:\n",
        "PEFT knows the classifier by itself: the fresh pooler below it is neither trained nor saved",
        ("tests/train/test_tasks.py::test_a_pair_classifier[bert-masked]",),
    ),
    Fault(
        "the run's chat template stays behind",
        "leantune/train/run.py",
        "            self.tokenizer.chat_template = template\n",
        "            self.tokenizer.init_kwargs['chat_template'] = template\n",
        "a tuned model is asked in the base's template, which it never saw",
        ("tests/train/test_rows.py::test_the_template_goes_into_the_run_and_comes_back",),
    ),
    Fault(
        "a dry run makes the run's folder",
        "leantune/train/preview.py",
        'prepare(config.model_copy(update={"report_to": []}), checkpoints=Path(scratch))',
        'prepare(config.model_copy(update={"report_to": []}))',
        "looking leaves a folder behind",
        ("tests/train/test_preview.py::test_it_says_what_the_run_then_does_and_writes_nothing",),
    ),
    Fault(
        "the base's answers come from the tuned model",
        "leantune/cli/comparison.py",
        "        with run.model.disable_adapter():\n            yield run.model\n",
        "        yield run.model\n",
        "chat and eval show the tuned model twice, as if training had changed nothing",
        ("tests/cli/test_chat.py::test_the_base_answers_beside_it",),
    ),
)
