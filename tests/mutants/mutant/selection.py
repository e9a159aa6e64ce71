"""Faults in which units are chosen, and in what calibration measures."""

from __future__ import annotations

from harness import Fault

SELECTION = "leantune/methods/_selection.py"
STRUCTURE = "leantune/methods/structure.py"
CALIBRATION = "leantune/methods/_calibration.py"

S2FT_TESTS = "tests/methods/test_s2ft.py"
CALIBRATION_TESTS = "tests/methods/test_calibration.py"

CHOICE_FAULTS = (
    Fault(
        "entries off by one",
        STRUCTURE,
        "return (starts[:, None] + torch.arange(self.size)).flatten()",
        "return (starts[:, None] + torch.arange(self.size) + 1).flatten()",
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
        "leantune/methods/_slice.py",
        "slice(first, end), None",
        "slice(first, end - 1), None",
        "the last chosen unit of a permuted base never trains",
        ("tests/methods/test_permutation.py::test_the_same_function_and_the_same_gradients",),
    ),
)

CALIBRATION_FAULTS = (
    Fault(
        "padding is measured",
        CALIBRATION,
        "return flat if mask is None or mask.numel() != len(flat) else flat[mask.reshape(-1)]",
        "return flat if mask is None or mask.numel() != len(flat) else flat[: mask.numel()]",
        "channels that padding excites are chosen, the more the shorter the rows",
        (f"{CALIBRATION_TESTS}::test_activations_are_those_of_real_tokens",),
    ),
    Fault(
        "a mean over the tokens of a batch in place of the sum",
        CALIBRATION,
        "add(torch.linalg.vector_norm(values, dim=0, dtype=torch.float64).square())",
        "add(values.double().square().mean(0))",
        "the choice depends on how rows are put into batches",
        (f"{CALIBRATION_TESTS}::test_activations_are_those_of_real_tokens",),
    ),
    Fault(
        "each batch counts alike in the calibration loss",
        CALIBRATION,
        "return self.model(**batch).loss * (self._labels(batch) / self._all_labels)",
        "return self.model(**batch).loss / len(self.batches)",
        "a batch of one short answer weighs as much as one of a thousand tokens",
        (f"{CALIBRATION_TESTS}::test_the_models_own_loss_is_weighted_by_labels",),
    ),
    Fault(
        "a group of layers begins with the gradients of the one before",
        CALIBRATION,
        "totals = {key: torch.zeros(wanted[key].shape, dtype=self.dtype, device=self.device) for key in group}",
        "totals = {\n"
        "                key: self.__dict__.setdefault('room', {}).setdefault(\n"
        "                    (place, wanted[key].shape),\n"
        "                    torch.zeros(wanted[key].shape, dtype=self.dtype, device=self.device),\n"
        "                )\n"
        "                for place, key in enumerate(group)\n"
        "            }",
        "memory is saved, and lower layers are ranked by the gradients of upper ones",
        (f"{CALIBRATION_TESTS}::test_gradients_are_the_dense_ones",),
    ),
    Fault(
        "largest and smallest exchanged among experts",
        "leantune/methods/_expert_choice.py",
        'descending=config.order == "largest"',
        'descending=config.order == "smallest"',
        "each expert trains the channels that matter least to it",
        ("tests/methods/test_expert_choice.py::test_choices_are_the_naive_ranking",),
    ),
)
