"""The papers' recipes: each is read as a configuration, and has the numbers of the table that its comment names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leantune.train import RunConfig

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"

# Rate, epochs, rows in a step, and options: LoRA-SB paper, tables 7 and 8; S2FT paper, table 6 and appendix C;
# Multi-LoRA paper, section 5; computational limits of LoRA, section 6; else what the recipe's comment names.
STATED: dict[str, dict[str, Any]] = {
    "s2ft-commonsense": {"lr": 2e-4, "epochs": 3, "rows": 64, "schedule": "linear"},
    "s2ft-arithmetic": {"lr": 1e-3, "epochs": 3, "rows": 64, "schedule": "linear"},
    "s2ft-instructions": {"lr": 2e-5, "epochs": 1, "rows": 64, "schedule": "cosine", "warmup_ratio": 0.0},
    "spft-arithmetic": {"epochs": 3, "rows": 64, "ratio": 0.01},
    "galore-commonsense": {"epochs": 3, "rows": 64, "rank": 128, "update_proj_gap": 200, "scale": 0.25},
    "lisa-instructions": {"lr": 2e-5, "epochs": 1, "rows": 64, "active_blocks": 2, "period": 20},
    "lora-commonsense": {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05, "lr": 3e-4, "rows": 16, "max_length": 256},
    "dora-commonsense": {"r": 32, "lora_alpha": 64, "lr": 1e-4, "rows": 16},
    "series-adapter-commonsense": {"bottleneck_size": 256, "lr": 3e-4, "rows": 16},
    "parallel-adapter-commonsense": {"bottleneck_size": 256, "lr": 3e-4, "rows": 16},
    "prefix-commonsense": {"num_virtual_tokens": 10, "rows": 8, "lr": 3e-2, "epochs": 5},
    "loreft-commonsense": {"r": 8, "positions": "f7+l7", "rows": 32, "epochs": 6, "lr": 9e-4},
    "lora-sb-math": {
        "lr": 1e-4,
        "epochs": 1,
        "rows": 32,
        "max_length": 512,
        "schedule": "cosine",
        "warmup_ratio": 0.02,
    },
    "lora-xs-math": {"lr": 1e-4, "epochs": 1, "rows": 32, "r": 96, "alpha": 96.0},
    "lora-sb-commonsense": {"lr": 2e-3, "epochs": 2, "rows": 144, "max_length": 256, "dropout": 0.05},
    "lora-sb-glue": {"lr": 1e-3, "epochs": 30, "rows": 128, "max_length": 256, "warmup_ratio": 0.06},
    "multi-lora-glue": {"r": 8, "alpha": 16.0, "warmup_ratio": 0.06, "max_length": 512},
    "multi-lora-nlg": {"r": 4, "alpha": 32.0, "dropout": 0.1, "max_length": 512},
    "xgblora-instructions": {"r": 1, "blocks_per_round": 11},
    "lora-opt": {"r": 128, "lora_alpha": 256},
}


@pytest.mark.parametrize("name", STATED)
def test_the_numbers_of_the_paper(name: str) -> None:
    config = RunConfig.from_yaml(RECIPES / f"{name}.yaml")
    assert config.method == name.rpartition("-")[0]
    found = {**config.model_dump(), **config.method_options, "rows": config.batch_size * config.gradient_accumulation}
    assert {each: found[each] for each in STATED[name]} == STATED[name]


def test_each_recipe_says_where_its_numbers_are_from() -> None:
    for name in STATED:
        text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        said = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
        assert "paper" in said, name
