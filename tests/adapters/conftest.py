"""Bases as folders, and trained-looking adapters on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_models import MAKERS, TARGETS, fill, make_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from leantune import S2FTConfig


@pytest.fixture(scope="session")
def base_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A transformers folder of each family, with tokenizer."""
    folders = {}
    for family, make in MAKERS.items():
        folders[family] = tmp_path_factory.mktemp("base") / family
        make().save_pretrained(folders[family])
        make_tokenizer().save_pretrained(folders[family])
    return folders


@pytest.fixture(params=list(MAKERS))
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return str(request.param)


@pytest.fixture
def base(base_folders: dict[str, Path]) -> Callable[[str], Any]:
    """A fresh base model, loaded from its folder."""
    return lambda family="llama": AutoModelForCausalLM.from_pretrained(base_folders[family]).eval()


@pytest.fixture
def s2ft(base: Callable[[str], Any]) -> Callable[..., PeftModel]:
    """A base with a trained-looking S2FT adapter: whole heads and channels, other counts in attention and FFN."""

    def make(family: str = "llama", **options: Any) -> PeftModel:
        settings = {"target_modules": TARGETS[family], "heads": 1, "channels": 3, "task_type": "CAUSAL_LM"}
        model = get_peft_model(base(family), S2FTConfig(**{**settings, **options}))
        fill(model)
        return model.eval()

    return make


@pytest.fixture
def lora(base: Callable[[str], Any]) -> Callable[..., PeftModel]:
    """A base with a trained-looking stock LoRA: scaling 3, and another rank and scaling in one kind of module."""

    def make(family: str = "llama", **options: Any) -> PeftModel:
        leaf = TARGETS[family][-1]
        settings = {
            "target_modules": TARGETS[family],
            "r": 2,
            "lora_alpha": 6,
            "rank_pattern": {leaf: 5},
            "alpha_pattern": {leaf: 4},
            "fan_in_fan_out": family == "gpt2",
            "task_type": "CAUSAL_LM",
        }
        model = get_peft_model(base(family), LoraConfig(**{**settings, **options}))
        fill(model)
        return model.eval()

    return make
