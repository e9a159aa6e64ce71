"""TRL's three trainers on a tiny Llama: the same few steps for whatever adapter method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from host_model import tokenizer
from transformers import AutoModelForCausalLM

STEPS = 4
SAVED = 2
"""The step whose checkpoint a resumed run starts from."""


def _words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def _common(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": SAVED,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 5,
        **more,
    }


def sft(model: Any, folder: Path, **keywords: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": _words(n, n + 1), "completion": " " + _words(n + 2, n)} for n in range(16)]
    arguments = SFTConfig(**_common(folder, max_length=16))
    return SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), **keywords)


def dpo(model: Any, folder: Path, *, bf16: bool = False, **keywords: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": _words(n, n + 1), "chosen": " " + _words(n + 2, n), "rejected": " " + _words(n + 3, n + 4, 9)}
        for n in range(16)
    ]
    arguments = DPOConfig(**_common(folder, max_length=16, bf16=bf16))
    return DPOTrainer(
        model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), **keywords
    )


def small_words(completions: list[str], **columns: Any) -> list[float]:
    """A reward in [0, 1]: the share of words with a number below ten."""
    return [sum(len(word) == 2 for word in text.split()) / max(len(text.split()), 1) for text in completions]


def grpo(model: Any, folder: Path, **keywords: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": _words(n, n + 1)} for n in range(16)]
    arguments = GRPOConfig(**_common(folder, num_generations=4, max_completion_length=5, beta=0.1))
    return GRPOTrainer(
        model,
        small_words,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        **keywords,
    )


TRAINERS: dict[str, Callable[..., Any]] = {"sft": sft, "dpo": dpo, "grpo": grpo}


def from_folder(folder: Path) -> Any:
    """The base as users load it."""
    return AutoModelForCausalLM.from_pretrained(folder)
