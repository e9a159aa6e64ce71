"""Options of boosting beyond rounds and blocks, its results, and the papers that are settings of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from leantune.core.errors import describe, did_you_mean
from leantune.methods._config import AdapterConfig

STARTS = ("random", "gradient")


@dataclass
class BoostingOptions(AdapterConfig):
    """How a booster starts, how it is kept, and what training found."""

    start: str = field(
        default="random",
        metadata={
            "help": "Where a round's booster begins: 'random', or 'gradient': A along the directions in which the loss "
            "falls fastest at the round's first step (a weight gradient of each chosen layer, once a round)."
        },
    )
    line_search: bool = field(
        default=False,
        metadata={
            "help": "Keep a round's boosters at the scale in [0, 4] with the lowest loss on the round's last batch, "
            "found by at most six forward passes over it; never worse there than as trained."
        },
    )

    iteration_range: list[int] | None = field(
        default=None,
        metadata={
            "help": "Set by Leantune: the rounds [first, end) that count; all are saved. model.set_iteration_range "
            "changes it.",
            "is_result": True,
        },
    )
    num_boosted_rounds: int | None = field(
        default=None, metadata={"help": "Set by Leantune: the rounds that were trained.", "is_result": True}
    )
    best_iteration: int | None = field(
        default=None,
        metadata={"help": "Set by Leantune: the round, from 0, with the lowest validation loss.", "is_result": True},
    )
    best_score: float | None = field(
        default=None, metadata={"help": "Set by Leantune: the validation loss after that round.", "is_result": True}
    )

    def option_problems(self) -> list[str]:
        """What is wrong with them."""
        if self.start in STARTS:
            return []
        near, where = did_you_mean(str(self.start), STARTS), f"{type(self).__name__}.start"
        return [describe(where, repr(self.start), "one of " + ", ".join(STARTS), near)]


PRESETS: dict[str, dict[str, Any]] = {
    # r, alpha, reset and warm-up: the authors' code (github.com/Guitaricet/relora, training_configs/1B_v1.0.yaml and
    # torchrun_main.py). There 90% of the moments are pruned by magnitude at a reset, after a start of full training;
    # here all are dropped, and nothing but the boosters trains.
    "relora": {
        "title": "ReLoRA: boosters of high rank in all blocks",
        "paper": "ReLoRA, arXiv 2307.05695",
        "options": {"r": 128, "alpha": 32, "blocks_per_round": 0, "steps_per_round": 5320, "warmup_steps": 100},
        "default_learning_rate": 4e-4,
        "toy_options": {"r": 4, "alpha": 8, "steps_per_round": 2, "warmup_steps": 1},
    },
    # A chain of LoRAs (rank 8 at first), each merged and followed by a new one with a new optimizer. How long a link
    # trains is the user's: the paper says it in epochs of its own tasks, 100 steps are ours.
    "cola": {
        "title": "Chain of LoRA: LoRAs one after the other in all blocks",
        "paper": "COLA, arXiv 2401.04151",
        "options": {"r": 8, "alpha": 16, "blocks_per_round": 0, "steps_per_round": 100, "warmup_steps": 0},
        "default_learning_rate": 1e-3,
        "toy_options": {"r": 2, "steps_per_round": 2},
    },
}
"""Names over XGBLoraConfig, as keywords of :meth:`~leantune.methods._registry.Method.preset`."""
