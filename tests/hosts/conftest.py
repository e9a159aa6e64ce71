"""Folders with a base model and with an adapter for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from host_model import OPTIONS, base, tokenizer
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from leantune import S2FTConfig
from leantune.testing.subject import start


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    base().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter_folder(tmp_path: Path, base_folder: Path) -> Path:
    """An adapter whose config names the base folder, as after training a model that was loaded from there."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), S2FTConfig(**OPTIONS))
    start(model)
    folder = tmp_path / "adapter"
    model.save_pretrained(str(folder))
    return folder
