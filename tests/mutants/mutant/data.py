"""Faults in rows, their tokens and their batches."""

from __future__ import annotations

from harness import Fault

ENCODING = "leantune/data/encoding.py"
COLLATOR = "leantune/data/collator.py"
STREAMING = "leantune/data/streaming.py"
MASKING = "leantune/data/masking.py"

PACK_TESTS = "tests/data/test_pack.py"
STREAM_TESTS = "tests/data/test_stream.py"
MASKING_TESTS = "tests/data/test_masking.py"

BATCH_FAULTS = (
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
        COLLATOR,
        "self._pad(labels, length, NO_LOSS) if is_tokens",
        "self._pad(labels, length, self.pad_token_id) if is_tokens",
        "short rows teach the model to write padding",
        ("tests/data/test_batch.py",),
    ),
    Fault(
        "rows of a pack see each other",
        COLLATOR,
        "same = documents[:, None, :, None] == documents[:, None, None, :]",
        "same = (documents[:, None, :, None] >= 0) == (documents[:, None, None, :] >= 0)",
        "each row is learned with whatever happened to be packed before it as its context",
        (f"{PACK_TESTS}::test_a_mask_in_booleans_or_numbers",),
    ),
    Fault(
        "the first token of a packed row is predicted from the row before",
        COLLATOR,
        'for token in (NO_LOSS, *row["labels"][1:])]',
        'for token in row["labels"]]',
        "plain texts learn how one row follows another, which is chance",
        (f"{PACK_TESTS}::test_positions_restart_and_first_tokens_carry_no_loss",),
    ),
    Fault(
        "positions run on through a pack",
        COLLATOR,
        'positions = [[place for row in pack for place in range(len(row["input_ids"]))] for pack in packs]',
        'positions = [list(range(sum(len(row["input_ids"]) for row in pack))) for pack in packs]',
        "transformers finds no borders in the positions, and rows see each other",
        (f"{PACK_TESTS}::test_positions_restart_and_first_tokens_carry_no_loss",),
    ),
    Fault(
        "the last rows in the shuffle buffer are dropped",
        STREAMING,
        "    while held:\n",
        "    while len(held) > 1:\n",
        "rows at the end of a stream are never trained on",
        (f"{STREAM_TESTS}::test_each_row_once_a_pass",),
    ),
    Fault(
        "each process of a stream draws an order of its own",
        STREAMING,
        "generator = random.Random(self.seed * 1_000_003 + number)",
        "generator = random.Random()",
        "two processes share out two orders of one file: some rows twice, others never, and no resume finds its row",
        (f"{STREAM_TESTS}::test_the_order_is_of_the_seed_and_comes_again",),
    ),
    Fault(
        "special tokens are hidden",
        MASKING,
        'hideable = [not special for special in kept["special_tokens_mask"]]',
        'hideable = [special in (0, 1) for special in kept["special_tokens_mask"]]',
        "a masked language model learns to write separators, and short texts teach nothing else",
        (f"{MASKING_TESTS}::test_a_short_text_still_hides_one_token_and_no_special_one",),
    ),
    Fault(
        "loss on tokens that are not hidden",
        MASKING,
        "        labels[chosen] = ids[chosen]\n",
        "        labels[places] = ids[places]\n",
        "85% of the loss asks for the token that stands there: it falls, and nothing is learned",
        (f"{MASKING_TESTS}::test_the_shares_are_those_of_the_paper",),
    ),
)

ROW_FAULTS = (
    Fault(
        "the user of a ShareGPT row speaks for the assistant",
        "leantune/data/layout/sharegpt.py",
        '    "human": "user",\n',
        '    "human": "assistant",\n',
        "the model learns to write the user's turns",
        ("tests/data/test_layouts.py::test_sharegpt_speakers",),
    ),
    Fault(
        "turns of weight zero carry loss",
        "leantune/data/template.py",
        'if message["role"] != "assistant" or message.get("weight", 1) == 0:',
        'if message["role"] != "assistant":',
        "bad answers that were kept as context are learned",
        ("tests/data/test_encode.py::test_a_turn_of_weight_zero_carries_no_loss",),
    ),
    Fault(
        "the answer decides on which side a row is",
        "leantune/data/split.py",
        'row.asked().encode("utf-8")',
        '(row.asked() + (row.completion or "")).encode("utf-8")',
        "one question stands on both sides of the split, and the evaluation measures memory",
        ("tests/data/test_split.py::test_order_neighbours_and_answers_move_no_row",),
    ),
    Fault(
        "a stream trains on the rows held out",
        "leantune/train/rows.py",
        "        if config.eval_share is None or not is_held_out(row, config.eval_share):\n",
        "        if row is not None:\n",
        "the evaluation is of rows that were trained on",
        ("tests/train/test_rows.py::test_a_stream_leaves_the_same_rows_out",),
    ),
)
