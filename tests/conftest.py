"""What every test stands on: no network, one thread, the same seed, and warnings that are errors."""

from __future__ import annotations

import os
import random

# Before transformers is imported: a test that would reach for a hub fails at once instead of hanging.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

# Warnings of other people's code, each with the day it was seen and why it stays: (date, reason, filter).
THIRD_PARTY_WARNINGS: list[tuple[str, str, str]] = [
    (
        "2026-11-23",
        "PEFT 0.21.2 asks a transformers 5.23 model by a name that goes in transformers 6",
        "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    ),
    (
        "2026-11-25",
        "bitsandbytes 0.50.2 has torch 2.13 script a function while it is imported",
        "ignore:`torch.jit.script:DeprecationWarning",
    ),
    (
        "2026-11-25",
        "torch 2.13 makes an object of an autograd function itself when torch.compile traces one",
        "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning",
    ),
]


def pytest_configure(config: pytest.Config) -> None:
    """Take the third-party warnings out of ``filterwarnings = error``."""
    for _, _, line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One thread: sums in a fixed order, and tests side by side do not fight for cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state; returns the seed."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0
