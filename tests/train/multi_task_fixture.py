"""Files of tiny tasks, and runs over them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from train.conftest import WORDS, write_jsonl

TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "value"]}


def causal_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Questions of unequal lengths and answers of unequal lengths."""
    draw = random.Random(seed)
    words = WORDS[3:]
    return [
        {
            "prompt": " ".join(draw.choices(words, k=draw.randint(2, 14))),
            "completion": " " + " ".join(draw.choices(words, k=draw.randint(1, 5))),
        }
        for _ in range(count)
    ]


def labelled_rows(count: int, seed: int, classes: int | None) -> list[dict[str, Any]]:
    """Texts of unequal lengths, with the name of a class that a word gives away, or a number when classes is None."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        text = draw.choices(WORDS[12:], k=draw.randint(2, 16))
        label: Any
        if classes is None:
            label = round(draw.uniform(0, 5), 2)
        else:
            label = f"class {number % classes}"
            text.append(WORDS[3 + number % classes])
        rows.append({"text": " ".join(text), "label": label})
    return rows


def causal_tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """Three language tasks with unequal numbers of rows."""
    counts = {"alpha": 26, "beta": 11, "gamma": 6}
    return {
        name: {
            "data": str(write_jsonl(folder / f"{name}.jsonl", causal_rows(count, seed))),
            "eval_data": str(write_jsonl(folder / f"{name}-eval.jsonl", causal_rows(5, seed + 10))),
        }
        for seed, (name, count) in enumerate(counts.items())
    }


def head_tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """Two classifications with label spaces of their own and a regression."""
    found = {}
    for seed, (name, count, classes) in enumerate((("pair", 22, 2), ("triple", 12, 3), ("stars", 7, None))):
        found[name] = {
            "data": str(write_jsonl(folder / f"{name}.jsonl", labelled_rows(count, seed, classes))),
            "eval_data": str(write_jsonl(folder / f"{name}-eval.jsonl", labelled_rows(6, seed + 10, classes))),
            "kind": "classification" if classes else "regression",
        }
    return found


def settings(base: Path, kind: str, tasks: dict[str, dict[str, Any]], out: Path) -> dict[str, Any]:
    """A run over the tasks, short."""
    return {
        "model": str(base),
        "method": "multi-lora",
        "method_options": {"r": 2, "alpha": 4.0, "target_modules": TARGETS[kind]},
        "tasks": tasks,
        "out": out,
        "batch_size": 4,
        "lr": 1e-2,
        "max_steps": 6,
        "save_steps": 3,
        "device": "cpu",
    }
