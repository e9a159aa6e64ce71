"""The planted faults: what a tired programmer, a wrong merge or a clever optimisation could do to this code."""

from __future__ import annotations

from harness import Fault

KERNEL = "leantune/kernels/partial_linear.py"
BASE = "leantune/methods/_base.py"
S2FT = "leantune/methods/s2ft.py"
SELECTION = "leantune/methods/_selection.py"
SLICE = "leantune/methods/_slice.py"
TRAINER = "leantune/train/trainer.py"
LOSS = "leantune/train/loss.py"
ENCODING = "leantune/data/encoding.py"

KERNEL_TESTS = "tests/kernels/test_partial_linear.py"
S2FT_TESTS = "tests/methods/test_s2ft.py"
CONTRACT = "tests/methods/test_contract.py"
TRAINER_TESTS = "tests/train/test_lean_trainer.py"

KERNEL_FAULTS = (
    Fault(
        "a view of the activation is saved",
        KERNEL,
        "return x[..., entries].clone(memory_format=torch.contiguous_format)",
        "return x[..., entries]",
        "the whole activation stays alive until the backward: the memory that S2FT saves is lost",
        (KERNEL_TESTS,),
    ),
    Fault(
        "the slice's share of the input gradient has the wrong sign",
        KERNEL,
        "_add_at(flat, index, seen @ delta)",
        "_add_at(flat, index, -(seen @ delta))",
        "every layer below trains on a wrong gradient once the slice has left zero",
        (
            f"{KERNEL_TESTS}::test_gradcheck",
            f"{S2FT_TESTS}::test_gradients_of_a_started_slice_are_those_of_the_merged_model",
        ),
    ),
    Fault(
        "the input gradient leaves the slice out",
        KERNEL,
        "                _add_product(flat, seen, delta)\n",
        "                pass\n",
        "row slices (q, k, v, up, gate) pass on the gradient of the base alone",
        (f"{KERNEL_TESTS}::test_gradcheck",),
    ),
    Fault(
        "all outputs reach the gradient of a row slice",
        KERNEL,
        'seen = pick(grad_rows, index) if ctx.axis == "out" else grad_rows',
        'seen = grad_rows[:, : delta.shape[0]] if ctx.axis == "out" else grad_rows',
        "rows train on the gradient of other rows: right shape, wrong numbers",
        (f"{KERNEL_TESTS}::test_gradient_is_the_slice_of_the_dense_gradient",),
    ),
    Fault(
        "the slice's product in 16 bits",
        KERNEL,
        "_add_product(rows, kept.to(delta.dtype), delta.t())",
        "_add_product(rows, kept, delta.t().to(kept.dtype))",
        "over a bfloat16 base small updates of the slice are rounded away in the forward",
        (f"{KERNEL_TESTS}::test_float32_delta_beside_a_weight_of_16_bits",),
    ),
)

LAYER_FAULTS = (
    Fault(
        "wrong axis",
        S2FT,
        'return own.weight.detach(), 1 if own.axis == "in" else 0, where',
        'return own.weight.detach(), 0 if own.axis == "in" else 1, where',
        "merging writes columns over rows",
        (f"{S2FT_TESTS}::test_forward_and_merge",),
    ),
    Fault(
        "indices are not saved",
        SLICE,
        'self.register_buffer("index", chosen.index.to(device, copy=True))',
        'self.register_buffer("index", chosen.index.to(device, copy=True), persistent=False)',
        "a file loads onto whatever another version of the random generator draws",
        (f"{S2FT_TESTS}::test_the_file_wins_over_what_the_config_would_choose",),
    ),
    Fault(
        "one-hot factor in another order",
        S2FT,
        "one_hot[torch.arange(own.index.numel(), device=delta.device), own.index] = 1",
        "one_hot[torch.arange(own.index.numel(), device=delta.device), own.index.flip(0)] = 1",
        "the exported LoRA gives each slice to another channel",
        ("tests/adapters/test_lora_conversion.py::test_the_file_holds_the_change_of_every_weight",),
    ),
    Fault(
        "factors of a row slice transposed",
        S2FT,
        "else (one_hot.t().contiguous(), delta)",
        "else (delta.t().contiguous(), one_hot)",
        "the exported LoRA of q, k, v, up and gate is the transposed change",
        (CONTRACT,),
        "s2ft-all-linear-llama and lora_form_equals_the_delta",
    ),
    Fault(
        "the slice in the base's dtype",
        BASE,
        "return torch.float64 if self.weight.dtype == torch.float64 else torch.float32",
        "return self.weight.dtype",
        "over a bfloat16 base the trained slice has 8 bits: updates below 1/256 are lost",
        (CONTRACT,),
        "s2ft-toy-llama and (trained_dtype or over_bfloat16)",
    ),
    Fault(
        "unmerge by subtraction",
        BASE,
        "weight.index_copy_(dim, index.to(weight.device), original)",
        "delta = self.delta_region(self.merged_adapters[-1])[0]\n"
        "                    delta = delta.t() if self.transposed else delta\n"
        "                    left = weight.index_select(dim, index).to(delta.dtype) - delta\n"
        "                    weight.index_copy_(dim, index.to(weight.device), left.to(weight.dtype))",
        "the base drifts by a rounding with every merge and unmerge; in bfloat16 39% of the entries change at once",
        (CONTRACT,),
        "s2ft-toy-llama and (unmerge_restores or unmerge_does_not_drift)",
    ),
    Fault(
        "stale write-back",
        BASE,
        "kept, dim, index = self._overwritten.pop()",
        "kept, dim, index = self._overwritten.pop(0)",
        "with two adapters merged, unmerging writes the first one back into the base for good",
        (CONTRACT,),
        "s2ft and llama and unmerge_restores_the_base",
    ),
    Fault(
        "merged weights rounded twice",
        BASE,
        "updated = (original.to(delta.dtype) + delta).to(weight.dtype)",
        "updated = original + delta.to(weight.dtype)",
        "merging into a bfloat16 base rounds the delta before it is added",
        (f"{S2FT_TESTS}::test_merged_weights_are_rounded_once",),
    ),
    Fault(
        "the base trains along",
        BASE,
        "            super().inject_adapter(model, adapter_name, *args, **kwargs)\n",
        "            super().inject_adapter(model, adapter_name, *args, **kwargs)\n"
        "            model.requires_grad_(True)\n",
        "the whole base gets gradients, moments and changed weights that no adapter file holds",
        (f"{TRAINER_TESTS}::test_only_the_adapter_changes_and_only_it_has_optimizer_state",),
    ),
    Fault(
        "every row of a mixed batch gets every adapter",
        BASE,
        "for row, own in enumerate(names) if own == name]",
        "for row, own in enumerate(names) if own != BASE_ROW]",
        "one user's request is answered with another user's adapter",
        (CONTRACT,),
        "s2ft-toy-llama and mixed_batch",
    ),
    Fault(
        "a disabled adapter still acts",
        BASE,
        "        if self.disable_adapters:\n            if self.merged:\n                self.unmerge()\n"
        "            return self.base_layer(x, *args, **kwargs)\n",
        "        if self.disable_adapters and self.merged:\n            self.unmerge()\n",
        "the reference of DPO, and every comparison with the base, is the tuned model itself",
        (CONTRACT,),
        "s2ft-toy-llama and reference_forward_in_between",
    ),
)

CHOICE_FAULTS = (
    Fault(
        "entries off by one",
        SELECTION,
        "return (part.offset + chosen[:, None] * run + torch.arange(run)).flatten()",
        "return (part.offset + (chosen[:, None] * run + torch.arange(run) + 1) % (run * units)).flatten()",
        "a head's slice begins in the middle of the head and ends in its neighbour",
        ("tests/methods/test_selection.py::test_entries_of_heads_and_groups",),
    ),
    Fault(
        "largest and smallest exchanged",
        SELECTION,
        'descending=order == "largest"',
        'descending=order == "smallest"',
        "choice by weight takes the opposite end of the ranking",
        (f"{S2FT_TESTS}::test_choice_by_weight_finds_the_unit_that_was_made_to_stand_out",),
    ),
    Fault(
        "every block draws the same units",
        SELECTION,
        "generator=seeded(seed, structure.block, structure.kind, side)",
        "generator=seeded(seed, structure.kind, side)",
        "random selection is one choice repeated through the depth",
        ("tests/methods/test_selection.py::test_random_choices_depend_on_seed_block_and_side_alone",),
    ),
    Fault(
        "a run of permuted entries ends one early",
        "leantune/methods/_permutation.py",
        "slice(first, last + 1)",
        "slice(first, last)",
        "the last chosen unit of a permuted base never trains",
        ("tests/methods/test_permutation.py::test_the_same_function_and_the_same_gradients",),
    ),
)

TRAINING_FAULTS = (
    Fault(
        "loss shifted by one",
        LOSS,
        "return cls(row * length + column, labels",
        "return cls(row * length + column + 1, labels",
        "each position is asked for the token it was given: the loss falls to zero and the model learns to repeat",
        ("tests/train/test_selected_loss.py::test_loss_and_gradients_follow_the_formula",),
    ),
    Fault(
        "loss mask inverted",
        LOSS,
        "row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)",
        "row, column = (labels[:, 1:] == IGNORED).nonzero(as_tuple=True)",
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

DATA_FAULTS = (
    Fault(
        "labels on the prompt instead of the answer",
        ENCODING,
        "labels = [token if flag else NO_LOSS for",
        "labels = [NO_LOSS if flag else token for",
        "the model learns to write prompts",
        ("tests/data/test_encode.py::test_prompt_then_completion_then_end",),
    ),
    Fault(
        "the end of the answer is not learned",
        ENCODING,
        "[*ids, _end_of_text(tokenizer)], [*flags, True]",
        "[*ids, _end_of_text(tokenizer)], [*flags, False]",
        "the tuned model never stops",
        ("tests/data/test_encode.py::test_prompt_then_completion_then_end",),
    ),
    Fault(
        "truncation is not counted",
        ENCODING,
        "        encoded.truncated += 1\n",
        "        encoded.truncated += 0\n",
        "answers are cut without a word",
        ("tests/data/test_encode.py::test_truncation_is_counted",),
    ),
    Fault(
        "padding carries loss",
        "leantune/data/collator.py",
        "self._pad(labels, length, NO_LOSS)",
        "self._pad(labels, length, self.pad_token_id)",
        "short rows teach the model to write padding",
        ("tests/data/test_batch.py",),
    ),
)

FILE_FAULTS = (
    Fault(
        "a file written in place",
        "leantune/core/atomic.py",
        "        os.replace(temporary, path)\n",
        "        path.write_bytes(data)\n",
        "a kill while run.json is written leaves half of it",
        ("tests/core/test_atomic.py",),
    ),
    Fault(
        "renamed before it is on the disk",
        "leantune/core/atomic.py",
        "        _fsync_tree(temporary)\n",
        "",
        "after a power cut the folder is there and its files are empty",
        ("tests/core/test_atomic.py",),
    ),
    Fault(
        "forgotten scaling",
        "leantune/adapters/layer.py",
        "return B.to(wide) * layer.scaling[adapter_name], A.to(wide)",
        "return B.to(wide), A.to(wide)",
        "an exported LoRA acts at alpha / r of its strength",
        ("tests/adapters/test_lora_conversion.py::test_the_file_holds_the_change_of_every_weight",),
    ),
    Fault(
        "an adapter over any base",
        "leantune/adapters/verification.py",
        "    if given_hash == wanted:\n",
        "    if given_hash:\n",
        "an adapter loads over weights it was not trained on, and answers nonsense",
        ("tests/adapters/test_adapter_folder.py::TestBase::test_other_weights_are_refused",),
    ),
    Fault(
        "an index outside the weight is believed",
        "leantune/adapters/verification.py",
        "        if low < 0 or high >= size:\n",
        "        if low < 0 and high >= size:\n",
        "a damaged file changes other weights than it names",
        ("tests/adapters/test_adapter_folder.py::test_indices_that_name_no_entry_are_refused",),
    ),
)

FAULTS: tuple[Fault, ...] = (
    *KERNEL_FAULTS,
    *LAYER_FAULTS,
    *CHOICE_FAULTS,
    *TRAINING_FAULTS,
    *DATA_FAULTS,
    *FILE_FAULTS,
)
