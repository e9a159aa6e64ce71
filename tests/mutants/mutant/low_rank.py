"""Faults in adapters with a trained core between frozen factors, and in the first step that they start from."""

from __future__ import annotations

from harness import Fault

CORE = "leantune/methods/_core_factor.py"
STEP = "leantune/methods/_first_step.py"
START = "leantune/methods/_low_rank_start.py"
RANKS = "leantune/methods/_rank_budget.py"
SKETCH = "leantune/methods/_sketch.py"
LINALG = "leantune/core/linalg.py"
RUN = "leantune/train/calibration.py"
XS = "leantune/methods/_core_linear.py"

XS_TESTS = "tests/methods/test_lora_xs.py"
SB_TESTS = "tests/methods/test_lora_sb.py"
RUN_TESTS = "tests/train/test_lora_sb_run.py"
LINALG_TESTS = "tests/core/test_linalg.py"
REAL_STEP = f"{SB_TESTS}::test_the_start_is_the_best_approximation_of_the_real_first_step"

LOW_RANK_FAULTS = (
    Fault(
        "the sign of the gradient is left out",
        STEP,
        "return lambda gradient, step_size: gradient.sign_().mul_(-step_size)",
        "return lambda gradient, step_size: gradient.mul_(-step_size)",
        "LoRA-SB under AdamW starts from a step of SGD, thousands of times too small",
        (REAL_STEP,),
    ),
    Fault(
        "the first step goes uphill",
        STEP,
        "return lambda gradient, step_size: gradient.sign_().mul_(-step_size)",
        "return lambda gradient, step_size: gradient.sign_().mul_(step_size)",
        "the start raises the loss, and training first undoes it",
        (REAL_STEP,),
    ),
    Fault(
        "the step size is left out",
        STEP,
        "return lambda gradient, step_size: gradient.sign_().mul_(-step_size)",
        "return lambda gradient, step_size: gradient.sign_().neg_()",
        "the start is a step of learning rate 1: the model is destroyed before training",
        (REAL_STEP,),
    ),
    Fault(
        "Adafactor's step is not clipped",
        STEP,
        "rms.clamp(min=1.0)",
        "1.0",
        "the start of a run with Adafactor is larger than its first step",
        ("tests/methods/test_lora_sb.py::test_a_step_of_adafactor_that_is_clipped",),
    ),
    Fault(
        "the sign of each batch instead of the sum's",
        "leantune/methods/_calibration.py",
        "total.addmm_(grad.t(), x)",
        "total.add_((grad.t() @ x).sign())",
        "the start depends on how rows are put into batches, and loud batches count no more than quiet ones",
        (REAL_STEP,),
    ),
    Fault(
        "the scaling is forgotten in the forward",
        CORE,
        "return F.linear(F.linear(F.linear(x, self.A), self.scaling * core), self.B)",
        "return F.linear(F.linear(F.linear(x, self.A), core), self.B)",
        "the merged model is not the trained one once alpha is given",
        (f"{XS_TESTS}::test_dropout_is_inverted_on_the_input_and_off_in_evaluation",),
    ),
    Fault(
        "the scaling is forgotten in the start",
        START,
        "core = torch.zeros_like(root) if keep_function else root / scaling",
        "core = torch.zeros_like(root) if keep_function else root",
        "with alpha given LoRA-SB starts from a multiple of the step",
        (f"{SB_TESTS}::test_scaling_does_not_change_the_start",),
    ),
    Fault(
        "the core is transposed",
        CORE,
        "return self.B @ (self.scaling * self.weight.detach().to(self.B.dtype))",
        "return self.B @ (self.scaling * self.weight.detach().to(self.B.dtype)).t()",
        "merging and export write another matrix than the one that was trained",
        (f"{XS_TESTS}::test_dropout_is_inverted_on_the_input_and_off_in_evaluation",),
    ),
    Fault(
        "factors follow the base to 16 bits",
        CORE,
        "setattr(self, name, before.to(after.device))",
        "setattr(self, name, after)",
        "a host that casts the model leaves factors orthonormal to two digits",
        (f"{XS_TESTS}::test_factors_are_orthonormal_whatever_the_base",),
    ),
    Fault(
        "the preconditioner forgets the scaling",
        CORE,
        "@ self.B.to(wide)) / squared",
        "@ self.B.to(wide))",
        "the learning rate means another step for every alpha, against Theorem 4",
        (f"{XS_TESTS}::test_the_preconditioned_gradient_is_the_best_one",),
    ),
    Fault(
        "the preconditioner's sides are exchanged",
        CORE,
        "return (left @ grad.to(left.dtype) @ right).to(grad.dtype), None, None",
        "return (right @ grad.to(left.dtype) @ left).to(grad.dtype), None, None",
        "directions are scaled by each other's singular values",
        (f"{XS_TESTS}::test_the_preconditioned_gradient_is_the_best_one",),
    ),
    Fault(
        "a decomposition draws from the global random state",
        LINALG,
        "return torch.randn(rows, columns, generator=generator).to(like)",
        "return torch.randn(rows, columns).to(like)",
        "runs that differ in the method alone see their rows in another order",
        (f"{LINALG_TESTS}::test_the_generator_alone_decides",),
    ),
    Fault(
        "a decomposition is not iterated",
        LINALG,
        "for _ in range(iterations):",
        "for _ in range(iterations // 8):",
        "on the flat spectrum of a sign matrix the start captures much less than it could",
        (f"{LINALG_TESTS}::test_randomized_against_exact",),
    ),
    Fault(
        "the warm-up's first rate is taken",
        RUN,
        "            if rate > 0:\n                return rate\n            optimizer.step()",
        "            if rate > -1:\n                return peak\n            optimizer.step()",
        "with a warm-up the start is a step as large as a hundred of the run's first ones",
        (f"{RUN_TESTS}::test_the_step_is_the_runs_own",),
    ),
    Fault(
        "ranks cost what LoRA's do",
        RANKS,
        "cost = 2 * ranks[path] + 1",
        "cost = 1",
        "the budget of trained parameters is overrun many times",
        (f"{XS_TESTS}::test_ranks_are_the_best_under_the_budget",),
    ),
    Fault(
        "the sketch takes the second matrix for the first",
        SKETCH,
        "Z.addmm_((grad @ self.psi.t()).t(), x)",
        "Z.addmm_((grad @ self.psi.t()).t(), x.abs())",
        "a sketched start has nothing to do with the gradient",
        (f"{SB_TESTS}::test_a_sketch_of_a_gradient_of_low_rank_is_exact",),
    ),
    Fault(
        "gradients over float16 are formed as small as they are",
        "leantune/methods/_calibration.py",
        "min(2.0 ** round(math.log2(tokens)), _MOST_ENLARGED)",
        "1.0",
        "over a float16 base the signs of most of the gradient are zeros: the start is a fraction of the step",
        (f"{SB_TESTS}::test_gradients_over_float16_do_not_vanish",),
    ),
    Fault(
        "each process decides alone what was reached",
        "leantune/methods/_calibration.py",
        "counts = _over_processes(torch.tensor([float(each) for each in reached.values()], device=device))",
        "counts = torch.tensor([float(each) for each in reached.values()], device=device)",
        "one process refuses an expert that no row of its own goes to, and the others wait for ever",
        ("tests/methods/test_calibrated_adapter.py::test_what_another_process_reached_is_reached",),
    ),
    Fault(
        "the preconditioner divides by what the factors do not see",
        CORE,
        "torch.linalg.pinv(gram, rtol=_SINGULAR, hermitian=True)",
        "torch.linalg.inv(gram)",
        "over a weight of low rank the core's gradient is noise, a million times too large, or not finite",
        (f"{XS_TESTS}::test_the_preconditioned_gradient_over_a_weight_of_lower_rank",),
    ),
    Fault(
        "a sketch is kept of every gradient",
        "leantune/methods/_first_update.py",
        " if sketch.shape[1] < math.prod(shapes[path])",
        "",
        "small layers get an approximate start that takes more memory than the exact one",
        (f"{SB_TESTS}::test_a_gradient_no_larger_than_its_sketch_is_kept_itself",),
    ),
    Fault(
        "the core starts with noise",
        XS,
        "            nn.init.zeros_(own.weight)",
        "            nn.init.normal_(own.weight, std=1e-5)",
        "a fresh adapter is not the base model any more",
        (f"{XS_TESTS}::test_lora_xs_starts_from_the_weight_and_from_the_base",),
    ),
    Fault(
        "a file's rank is not taken over",
        CORE,
        "if B.shape[1] != self.B.shape[1]:",
        "if False:",
        "an adapter whose ranks came from data cannot be loaded by a config that does not know them",
        ("tests/methods/test_lora_sb.py::test_a_file_decides_the_rank",),
    ),
)
