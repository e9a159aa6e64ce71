"""Faults in boosting: rounds that are no rounds, boosters kept wrongly, a base that is written to."""

from __future__ import annotations

from harness import Fault

BLOCK = "leantune/methods/_block.py"
BOOSTER = "leantune/methods/_booster.py"
BOOSTING = "leantune/methods/_boosting.py"
LAYER = "leantune/methods/_boosted_linear.py"

ADAPTER_TESTS = "tests/methods/test_xgblora.py"
ROUND_TESTS = "tests/train/test_boosting.py"
RUN_TESTS = "tests/train/test_boosting_run.py"
FORGETS = f"{ROUND_TESTS}::test_the_optimizer_forgets_moments_and_count_of_steps_each_round"
ALONE = f"{ROUND_TESTS}::test_a_round_trains_its_blocks_and_no_bit_of_another"
PREFIX = f"{ROUND_TESTS}::test_any_prefix_of_the_rounds_is_the_model_as_it_was"
RATES = f"{ROUND_TESTS}::test_the_rate_rises_at_the_start_of_each_round_and_the_schedule_goes_on"
FOLDED = f"{ADAPTER_TESTS}::test_the_folded_weight_is_the_merged_one_and_the_base_stays"
SAME_RUN = f"{RUN_TESTS}::test_a_run_resumed_in_a_round_is_the_uninterrupted_one"
STOPPED = f"{RUN_TESTS}::test_early_stopping_keeps_all_rounds_and_predicts_with_the_best"

_FORGET = """            state.pop(own.A, None)
            state.pop(own.B, None)
"""

BOOSTING_FAULTS = (
    Fault(
        "moments zeroed, count of steps kept",
        BOOSTING,
        _FORGET,
        """            for held in (state.get(own.A, {}), state.get(own.B, {})):
                for name, value in held.items():
                    if name != "step":
                        value.zero_()
""",
        "the first step of every round but the first is 3.2 times the rate",
        (FORGETS,),
    ),
    Fault(
        "moments kept over a round",
        BOOSTING,
        _FORGET,
        """            for held in (state.get(own.A, {}), state.get(own.B, {})):
                if "step" in held:
                    held["step"].zero_()
""",
        "a fresh booster is pushed along the directions of the one before it",
        (FORGETS,),
    ),
    Fault(
        "optimizer state of resting blocks kept",
        BOOSTING,
        _FORGET,
        """            if not own.resting:
                state.pop(own.A, None)
                state.pop(own.B, None)
""",
        "memory grows with the rounds until every block has moments",
        (f"{ROUND_TESTS}::test_the_optimizer_holds_as_much_after_twenty_rounds_as_in_the_first",),
    ),
    Fault(
        "blocks drawn by the program's own random numbers",
        BLOCK,
        "return torch.rand(self.count, generator=generator, dtype=torch.float64)",
        "return torch.rand(self.count, dtype=torch.float64)",
        "a resumed run trains other blocks, and dropout changes the choice",
        (f"{ADAPTER_TESTS}::test_a_choice_is_a_function_of_seed_and_round",),
    ),
    Fault(
        "boosters drawn by the program's own random numbers",
        BOOSTER,
        'torch.rand(self.A.shape, generator=seeded("xgblora", "A", seed, path, number), dtype=torch.float64)',
        "torch.rand(self.A.shape, dtype=torch.float64)",
        "a run resumed between rounds starts the next booster elsewhere",
        (f"{ADAPTER_TESTS}::test_fresh_boosters_are_lora_starts_drawn_by_seed_path_and_round",),
    ),
    Fault(
        "a block used twice in balanced sampling",
        BLOCK,
        "            self._usage[chosen] += 1\n",
        "            self._usage[chosen] += number % 2\n",
        "usage drifts apart",
        (f"{ADAPTER_TESTS}::test_usage_under_uniform_and_balanced_sampling",),
    ),
    Fault(
        "folded boosters counted twice",
        LAYER,
        "share = own.share(x, folded=True)",
        "share = own.share(x)",
        "finished boosters act twice while training, and once when served",
        (FOLDED,),
    ),
    Fault(
        "folded onto the working weight of before",
        BOOSTER,
        "self.working = (weight.to(B.dtype) + B @ A).to(weight.dtype) if len(A) else None",
        "self.working = ((weight if self.working is None else self.working).to(B.dtype) + B @ A).to(weight.dtype)",
        "each booster is added again in every later round",
        (f"{ADAPTER_TESTS}::test_small_updates_survive_a_16_bit_base", PREFIX),
    ),
    Fault(
        "base overwritten by folding",
        LAYER,
        "            self.booster(adapter).fold(self.dense_weight().detach())\n",
        "            self.booster(adapter).fold(self.dense_weight().detach())\n"
        "            working = self.booster(adapter).working\n"
        "            if working is not None:\n"
        "                self.dense_weight().data.copy_(working)\n",
        "the base is no longer the one that the adapter belongs to",
        (FOLDED, f"{RUN_TESTS}::test_the_base_is_what_it_was_and_the_adapter_is_merged_and_exported"),
    ),
    Fault(
        "warm-up of the first round alone",
        BOOSTING,
        "self._factor = min(1.0, (within + 1) / (warmup + 1))",
        "self._factor = min(1.0, (state.global_step + 1) / (warmup + 1))",
        "later boosters get the whole rate on moments of one gradient",
        (RATES,),
    ),
    Fault(
        "warm-up longer than its round",
        BOOSTING,
        "warmup = min(self.config.warmup_steps, self.config.steps_per_round // 2)",
        "warmup = self.config.warmup_steps",
        "short rounds never reach the rate of the run",
        (RATES,),
    ),
    Fault(
        "schedule of the epochs whatever the rounds",
        BOOSTING,
        "            args.max_steps = min(steps, args.max_steps) if args.max_steps > 0 else steps\n",
        "            del steps\n",
        "fewer rounds than were asked for, or a rate that never falls",
        (f"{ROUND_TESTS}::test_as_many_rounds_as_were_asked_for",),
    ),
    Fault(
        "stopped before the last round is measured",
        BOOSTING,
        "scores[-1][1] - min(scores)[1] >= patience",
        "self._offset + done - 1 - min(scores)[1] >= patience",
        "training ends at what may be its best round, and between evaluations",
        (f"{ROUND_TESTS}::test_patience_counts_rounds_that_were_measured",),
    ),
    Fault(
        "all rounds exported",
        "leantune/adapters/truncation.py",
        "tuner.set_iteration_range((0, rounds), drop=drop)",
        "tuner.set_iteration_range((0, known), drop=drop)",
        "--rounds does nothing",
        (f"{RUN_TESTS}::test_the_first_rounds_of_a_run_by_every_command",),
    ),
    Fault(
        "rate of the warm-up not taken back",
        BOOSTING,
        '            group["lr"] = rate\n',
        "            del rate\n",
        "optimizers whose schedule multiplies the last rate never come back from the warm-up",
        (RATES,),
    ),
    Fault(
        "booster lost at the end of its round",
        BOOSTER,
        "        self.kept_A = torch.cat([self.kept_A, self.A.detach()])\n",
        "        self.kept_A = torch.cat([self.kept_A, torch.zeros_like(self.A)])\n",
        "every round begins where the first one did",
        (PREFIX, f"{ROUND_TESTS}::test_what_was_trained_outside_of_rounds_is_not_lost"),
    ),
    Fault(
        "scaling left out of a kept booster",
        BOOSTER,
        "self.B.detach() * (self.scaling * factor)",
        "self.B.detach() * factor",
        "the model jumps at the end of each round",
        (f"{ROUND_TESTS}::test_what_was_trained_outside_of_rounds_is_not_lost",),
    ),
    Fault(
        "resting boosters woken by a reference forward",
        LAYER,
        "            if cast(Booster, own).resting:\n",
        "            if False:\n",
        "after the first reference forward of a preference run all blocks train",
        (
            f"{ADAPTER_TESTS}::test_a_resting_booster_stays_frozen_whoever_sets_what_trains",
            f"{ROUND_TESTS}::test_reference_forwards_in_the_middle_of_a_round_wake_no_booster",
        ),
    ),
    Fault(
        "blocks not put to rest between rounds",
        BOOSTER,
        "            parameter.requires_grad_(False)\n            parameter.grad = None\n",
        "            parameter.grad = None\n",
        "backward goes through all blocks, and weight decay shrinks those that do not train",
        (ALONE, f"{ROUND_TESTS}::test_backward_stops_at_the_lowest_chosen_block"),
    ),
    Fault(
        "an optimizer over one round's blocks accepted",
        BOOSTING,
        "        if missing:\n",
        "        if not held:\n",
        "all blocks but those of the first round never train (LMFlow issue 726)",
        (f"{ROUND_TESTS}::test_an_optimizer_over_one_round_is_refused",),
    ),
    Fault(
        "range without its last round",
        BOOSTER,
        "slice(bisect_left(rounds, span[0]), bisect_left(rounds, span[1]))",
        "slice(bisect_left(rounds, span[0]), bisect_left(rounds, span[1] - 1))",
        "a truncated model is one round short",
        (f"{ADAPTER_TESTS}::test_the_first_rounds_are_the_model_as_it_was_after_them",),
    ),
    Fault(
        "round of a resumed run begun anew",
        BOOSTING,
        "            if path in training:\n                own.train_in(number)\n",
        "            if False:\n                own.train_in(number)\n",
        "a run resumed in the middle of a round forgets its booster",
        (SAME_RUN,),
    ),
    Fault(
        "last round of a finished checkpoint not kept",
        "leantune/train/trainer.py",
        "            each.on_train_end(self.args, self.state, self.control, model=self.model)\n",
        "            del each\n",
        "a run killed after its last step is saved otherwise than one that was not",
        (f"{RUN_TESTS}::test_a_run_killed_after_its_last_step_ends_as_the_uninterrupted_one",),
    ),
    Fault(
        "best round counted from one",
        BOOSTING,
        "self.tuner.set_iteration_range((0, best + 1), self.adapter)",
        "self.tuner.set_iteration_range((0, best + 2), self.adapter)",
        "predictions are those of the round after the best",
        (STOPPED,),
    ),
    Fault(
        "evaluation of the last round taken for that of the best",
        "leantune/train/trainer.py",
        "return settled and bool(steps) and steps[-1] == self.state.global_step",
        "return bool(steps) and steps[-1] == self.state.global_step",
        "run.json reports the loss of a model that is not the saved one",
        (STOPPED,),
    ),
)
