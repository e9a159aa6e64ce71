"""Tiny models with boosters on them, made by hand or by a few steps of training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

import leantune
from leantune import XGBLoraConfig
from leantune.testing.model import scatter_weights

BLOCKS = 4
VOCABULARY = 32


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Four blocks, the same weights at each call."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **options}))
    scatter_weights(model, 0, dtype)
    return model.eval()


def wrap(base: Any = None, **options: Any) -> Any:
    """A fresh adapter; by default a block a round, two steps each."""
    settings = {"blocks_per_round": 1, "steps_per_round": 2, "task_type": "CAUSAL_LM", **options}
    return get_peft_model(llama() if base is None else base, XGBLoraConfig(**settings)).eval()


def layers(model: Any, adapter: str = "default") -> dict[str, Any]:
    """The layers with boosters, by path."""
    found: dict[str, Any] = model.base_model.boosters(adapter)
    return found


def boosted(model: Any, rounds: int, size: float = 0.3, adapter: str = "default") -> list[Tensor]:
    """Put finished boosters of noise on a model, round by round, a block each; the logits after each round."""
    generator = torch.Generator().manual_seed(17)
    logits = []
    first = model.base_model.num_boosted_rounds(adapter)
    for number in range(first, first + rounds):
        for path, layer in layers(model, adapter).items():
            own = layer.booster(adapter)
            own.rest()
            if f"layers.{number * 3 % BLOCKS}." in path:
                own.start(0, path, number)
                noise = torch.randn(own.B.shape, generator=generator, dtype=torch.float64) * size
                with torch.no_grad():
                    own.B.copy_(noise)
                own.train_in(number)
                own.keep(number, 1.0)
        logits.append(answer(model))
    for layer in layers(model, adapter).values():
        layer.booster(adapter).resting = False
        layer.booster(adapter).requires_grad_(True)
    return logits


def tokens(rows: int = 16, length: int = 6, seed: int = 3) -> Tensor:
    """Token ids, seeded."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def answer(model: Any) -> Tensor:
    """The logits on some tokens, in evaluation mode."""
    was = model.training
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens(3)).logits
    model.train(was)
    return logits


def rows() -> list[dict[str, Tensor]]:
    """Sixteen rows that a language model can learn by heart."""
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in tokens()]


def trainer(model: Any, folder: Path, callbacks: Iterable[Any] = (), **options: Any) -> Trainer:
    """transformers' own Trainer with the method's callbacks, and those given after them."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        **options,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=rows(),  # type: ignore[arg-type]
        eval_dataset=rows(),  # type: ignore[arg-type]
        data_collator=default_data_collator,
        callbacks=[*leantune.callbacks(model), *callbacks],
    )


def state(model: Any) -> dict[str, Tensor]:
    """A copy of everything that the model holds."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
