"""Faults in the mathematics beside the rounds: the aligned start, the line search, recompression, the presets."""

from __future__ import annotations

from harness import Fault

START = "leantune/methods/_booster_start.py"
SEARCH = "leantune/methods/_line_search.py"
OPTION = "leantune/methods/_boosting_option.py"
BOOSTING = "leantune/methods/_boosting.py"
RECOMPRESSION = "leantune/adapters/recompression.py"
EXPORT = "leantune/adapters/export.py"

START_TESTS = "tests/methods/test_booster_start.py"
SEARCH_TESTS = "tests/methods/test_line_search.py"
RECOMPRESSION_TESTS = "tests/adapters/test_recompression.py"

BOOSTER_MATH_FAULTS = (
    Fault(
        "a start of unit length",
        START,
        "result[:r] = lengths[:r] * Vh",
        "result[:r] = Vh",
        "the same learning rate means another step than with a random start",
        (f"{START_TESTS}::test_rows_lie_along_the_top_right_singular_vectors",),
    ),
    Fault(
        "each forward pass of a step turns A again",
        START,
        "        if own.B.grad is None:",
        "        if own.A is not None:",
        "under accumulation the gradients of B are of different starts",
        (f"{START_TESTS}::test_of_several_forward_passes_the_first_decides",),
    ),
    Fault(
        "the first gradient without its scaling",
        START,
        "return None, torch.zeros_like(own.A), own.scaling * of_B, None",
        "return None, torch.zeros_like(own.A), of_B, None",
        "the first step of each round is of another length",
        (f"{START_TESTS}::test_the_first_gradient_is_that_of_the_start_it_chose",),
    ),
    Fault(
        "a start along the gradient that is never taken",
        "leantune/methods/_boosted_linear.py",
        'own.aligns = config.start == "gradient"',
        'own.aligns = config.start == "gradients"',
        "the option is accepted and does nothing",
        (f"{START_TESTS}::test_rounds_of_a_run_start_along_their_own_gradient",),
    ),
    Fault(
        "the worst scale wins",
        SEARCH,
        "best = min(known, key=lambda scale: (known[scale], abs(scale - 1)))",
        "best = max(known, key=lambda scale: (known[scale], abs(scale - 1)))",
        "the search harms what was trained",
        (f"{SEARCH_TESTS}::test_it_is_never_worse_than_what_was_trained",),
    ),
    Fault(
        "a parabola off by half its slope",
        SEARCH,
        "return (a + b) / 2 - left / (2 * curvature)",
        "return (a + b) / 2 - left / (4 * curvature)",
        "the optimum of a quadratic loss is missed",
        (f"{SEARCH_TESTS}::test_a_parabola_is_solved_exactly",),
    ),
    Fault(
        "boosters stay at the last scale that was tried",
        SEARCH,
        "            own.scaling = scaling\n",
        "            own.scaling = own.scaling\n",
        "a round goes on with boosters of another size",
        (f"{SEARCH_TESTS}::test_boosters_are_put_back_also_when_the_loss_fails",),
    ),
    Fault(
        "the scale is found and not used",
        BOOSTING,
        "own.keep(int(own.round), self.config.shrinkage * scale)",
        "own.keep(int(own.round), self.config.shrinkage)",
        "the line search costs passes and changes nothing",
        (f"{SEARCH_TESTS}::test_a_run_keeps_each_round_at_its_scale",),
    ),
    Fault(
        "one singular value too few is counted as lost",
        RECOMPRESSION,
        "absolute = torch.linalg.vector_norm(values[r:]).item()",
        "absolute = torch.linalg.vector_norm(values[r + 1 :]).item()",
        "an export says that it lost less than it did",
        (f"{RECOMPRESSION_TESTS}::test_it_is_the_truncated_svd_of_the_product",),
    ),
    Fault(
        "both factors carry the singular values",
        RECOMPRESSION,
        "    root = S[:r].sqrt()",
        "    root = S[:r]",
        "the exported change is that of squared singular values",
        (f"{RECOMPRESSION_TESTS}::test_it_is_the_truncated_svd_of_the_product",),
    ),
    Fault(
        "an exact export of less than everything",
        EXPORT,
        "if left_out is not None and exact:",
        "if left_out is not None and exact and left_out.is_exact:",
        "an export asked to be exact is not",
        ("tests/adapters/test_export_run.py::test_an_export_asked_to_be_exact_is_refused_at_a_smaller_rank",),
    ),
    Fault(
        "ReLoRA of a third of the blocks",
        OPTION,
        '"options": {"r": 128, "alpha": 32, "blocks_per_round": 0, "steps_per_round": 5320, "warmup_steps": 100},',
        '"options": {"r": 128, "alpha": 32, "steps_per_round": 5320, "warmup_steps": 100},',
        "a baseline that is compared with is another method",
        ("tests/methods/test_boosting_preset.py",),
    ),
)
