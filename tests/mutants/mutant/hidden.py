"""Faults in methods that change single entries, hidden states, or add a network beside a layer."""

from __future__ import annotations

from harness import Fault

SPARSE = "leantune/kernels/sparse_linear.py"
ENTRIES = "leantune/methods/_entries.py"
EDIT = "leantune/methods/_hidden_edit.py"
POSITION = "leantune/methods/_position.py"
PROMPT = "leantune/core/prompt.py"
LOREFT = "leantune/methods/loreft.py"
BOTTLENECK = "leantune/methods/bottleneck.py"

SPARSE_TESTS = "tests/kernels/test_sparse_linear.py"
SPFT_TESTS = "tests/methods/test_spft.py"
LOREFT_TESTS = "tests/methods/test_loreft.py"
BOTTLENECK_TESTS = "tests/methods/test_bottleneck.py"
CONTRACT = "tests/methods/test_contract.py"

ENTRY_FAULTS = (
    Fault(
        "the gradient of the transposed entries",
        SPARSE,
        "grad_values[entries] = (grad_y[:, part].t() @ x).view(-1)[local].to(values.dtype)",
        "grad_values[entries] = (x.t() @ grad_y[:, part]).reshape(-1)[local].to(values.dtype)",
        "entries train on the gradient of other entries: right count, wrong numbers",
        (f"{SPARSE_TESTS}::test_gradient_is_the_chosen_part_of_the_dense_gradient",),
    ),
    Fault(
        "the input gradient leaves the entries out",
        SPARSE,
        "(grad_y @ weight).add_(share)",
        "(grad_y @ weight)",
        "every layer below trains on the gradient of the base alone",
        (f"{SPARSE_TESTS}::test_gradcheck",),
    ),
    Fault(
        "the last stretch of rows is cut off",
        SPARSE,
        "firsts = [*range(0, out, step), out]",
        "firsts = [*range(0, out - step + 1, step), out // step * step]",
        "of a layer whose rows are no multiple of a stretch the last ones do nothing and never train",
        (f"{SPARSE_TESTS}::test_equals_the_reference_for_any_shape",),
    ),
    Fault(
        "values in the dtype of a 16-bit base, joined with its weight",
        SPARSE,
        "share = _turned(torch.sparse.mm(_csr(values, index, out, width), wide.t()))",
        "weight = None if weight is None else weight + scatter(values, index, out, width).to(weight.dtype)\n"
        "            share = torch.zeros(len(rows), out, dtype=values.dtype)",
        "over a bfloat16 base a small value is rounded away with its weight",
        (f"{SPARSE_TESTS}::test_values_that_the_weight_would_round_away_are_seen",),
    ),
    Fault(
        "positions of a file are not looked at",
        ENTRIES,
        'self._require_entries(prefix + "index", stored)',
        "pass",
        "a torn or foreign file reads and writes memory that is no entry of the weight",
        (f"{SPFT_TESTS}::test_positions_that_cannot_be_are_refused",),
    ),
    Fault(
        "flat positions counted down the columns",
        "leantune/methods/_region.py",
        "return weight.put_(index.long(), values) if dim is None",
        "return weight.t().put_(index.long(), values).t() if dim is None",
        "a merge writes other entries than those that trained",
        (f"{SPFT_TESTS}::test_a_merge_writes_the_chosen_entries_alone_and_undoes_them",),
    ),
)

EDIT_FAULTS = (
    Fault(
        "rows of R that are not orthonormal",
        EDIT,
        "return (q * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype)).mT",
        "return (q @ t).mT",
        "the edit leaves its subspace's metric: R grows with training and the formula is another one",
        (f"{LOREFT_TESTS}::test_r_has_orthonormal_rows_and_the_row_space_of_what_trains",),
    ),
    Fault(
        "signs of QR as they come",
        EDIT,
        "return (q * torch.where(diagonal < 0, -1.0, 1.0).to(q.dtype)).mT",
        "return q.mT",
        "R is not the row space's own frame: it jumps to its negative under an optimizer step",
        (f"{LOREFT_TESTS}::test_r_has_orthonormal_rows_and_the_row_space_of_what_trains",),
    ),
    Fault(
        "generated tokens are edited too",
        EDIT,
        "if self.disable_adapters or (self.positions is not None and self.positions.behind_prefix):",
        "if self.disable_adapters:",
        "a token decoded through the cache is taken for a prompt of its own",
        (f"{LOREFT_TESTS}::test_decode_steps_are_left_alone",),
    ),
    Fault(
        "padding is counted",
        POSITION,
        "self._number = torch.where(real, real.cumsum(1) - 1, -1)",
        "self._number = torch.ones_like(real).cumsum(1) - 1",
        "behind padding on the left the first positions are padding",
        (f"{LOREFT_TESTS}::test_positions_count_real_tokens_whichever_side_is_padded",),
    ),
    Fault(
        "the answer belongs to the prompt",
        PROMPT,
        "before = (real & (lossy.cumsum(1) == 0)).sum(1)",
        "before = (real & (lossy.cumsum(1) <= 1)).sum(1)",
        "in training the last edited token is the first of the answer, which generation never has",
        (f"{LOREFT_TESTS}::test_labels_tell_where_the_prompt_ends",),
    ),
    Fault(
        "generation without a cache",
        LOREFT,
        'if has_chunks or settings.get("use_cache") is False:',
        "if has_chunks:",
        "each new token is read with the whole text again, whose last positions are those of the answer",
        (f"{LOREFT_TESTS}::test_generation_that_cannot_tell_prompt_from_answer_is_refused",),
    ),
    Fault(
        "the trainer keeps the labels to itself",
        "leantune/train/loss.py",
        "with selected_logits(model, selection), prompt.told_by(selection.labels):",
        "with selected_logits(model, selection):",
        "leantune train edits the ends of the answers, generation those of the prompts",
        (f"{LOREFT_TESTS}::test_the_losses_of_a_run_edit_the_prompts_alone",),
    ),
)

BESIDE_FAULTS = (
    Fault(
        "all-linear in every block",
        "leantune/methods/_base.py",
        "        keep_chosen_blocks(peft_config, self.model)\n",
        "",
        "layers_to_transform beside all-linear changes nothing",
        ("tests/methods/test_block.py",),
    ),
    Fault(
        "the second layer starts from noise",
        BOTTLENECK,
        "std=0.0 if config.init_weights else 0.2",
        "std=0.01 if config.init_weights else 0.2",
        "a fresh adapter already changes the model",
        (CONTRACT,),
        "series-adapter-toy-llama and identity_at_init",
    ),
    Fault(
        "scaling of a bottleneck forgotten",
        BOTTLENECK,
        "self.bottleneck_up[adapter](hidden) * config.scaling",
        "self.bottleneck_up[adapter](hidden)",
        "the option changes nothing",
        (f"{BOTTLENECK_TESTS}::test_the_formula",),
    ),
)
