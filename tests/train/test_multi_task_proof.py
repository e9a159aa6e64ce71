"""The proof: k tasks trained together on given batches are, in float64, each what it is when trained alone on its rows.

The joint run is :class:`TaskTrainer` as a run builds it. The lone ones are ordinary runs of one task: the stock loss,
schedule, clipping and AdamW of :class:`LeanTrainer`, one batch of the task's own rows a step. Row counts are unequal,
tasks are absent from some steps, batches are padded to other lengths, every step has two forward passes, and clipping
is at work.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler

from leantune.data import Collator
from leantune.methods import TrainingPlan
from leantune.train import LeanTrainer, RunConfig, fit
from leantune.train.setup import Prepared, prepare
from leantune.train.setup import _arguments as arguments
from leantune.train.task_config import view
from leantune.train.task_data import TASK
from leantune.train.task_trainer import TaskTrainer
from train.multi_task_fixture import causal_tasks, head_tasks, settings

STEPS, ROWS, PASSES = 24, 4, 2
# Of each task; small, so that nearly every step is clipped.
CLIPS = (0.02, 0.3, 0.05)
RATES = (1e-2, 4e-3, 2e-2)
SCHEDULES = ("cosine", "linear", "constant")
# float64 sums in another order: some 1e-16 a step, which AdamW's division by a small square root raises.
TOLERANCE = 1e-10


class Given(Sampler[int]):
    """The rows in a given order."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Any:
        return iter(self.order)


def given_order(numbers: list[int]) -> list[int]:
    """Row indices for all steps: any mixture, and every third step without some task."""
    draw = random.Random(7)
    order: list[int] = []
    for step in range(STEPS):
        absent = {step // 3 % 3} if step % 3 == 0 else {1, 2} if step % 7 == 5 else set()
        rows = [row for row, task in enumerate(numbers) if task not in absent]
        # At least one row of every task that takes part.
        first = [draw.choice([row for row in rows if numbers[row] == task]) for task in sorted({0, 1, 2} - absent)]
        step_rows = first + draw.choices(rows, k=ROWS * PASSES - len(first))
        order += draw.sample(step_rows, len(step_rows))
    return order


def joint(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Prepared, list[int]]:
    """The tasks trained together, and the order of the rows."""
    prepared = prepare(config)
    order = given_order([example[TASK] for example in prepared.examples.train])  # type: ignore[union-attr]
    monkeypatch.setattr(TaskTrainer, "_get_train_sampler", lambda *_: Given(order))
    prepared.trainer.train()
    return prepared, order


def alone(config: RunConfig, name: str, number: int, together: Prepared, order: list[int]) -> LeanTrainer:
    """One task trained in an ordinary run, each step on its rows of that step; steps without any are left out."""
    examples: Any = together.examples.train
    a_step = ROWS * PASSES
    steps = [[examples[row] for row in order[start : start + a_step]] for start in range(0, len(order), a_step)]
    groups: Any = [own for step in steps if (own := [example for example in step if example[TASK] == number])]
    lone = view(config, name)
    lone = lone.model_copy(update={"batch_size": 1, "gradient_accumulation": 1, "max_steps": len(groups)})
    prepared = prepare(lone.model_copy(update={"out": config.out / name}))
    collate = Collator(prepared.base.tokenizer.pad_token_id)
    trainer = LeanTrainer(
        prepared.model,
        plan=TrainingPlan(sampler=lambda rows, seed: SequentialSampler(rows)),
        task=lone.task,
        args=arguments(lone, config.out / name / "checkpoints"),
        train_dataset=groups,
        data_collator=lambda items: collate(items[0]),
    )
    trainer.train()
    return trainer


def state_of(trainer: LeanTrainer, adapter: str, others: set[str]) -> dict[str, Tensor]:
    """Parameters of an adapter and what Adam keeps of each, without the adapter's name."""
    model: Any = trainer.model
    optimizer: Any = trainer.optimizer
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if not parameter.requires_grad or set(parts) & others:
            continue
        key = ".".join(part for part in parts if part != adapter)
        found[key] = parameter.detach()
        for part, value in optimizer.state[parameter].items():
            found[f"{key} {part}"] = torch.as_tensor(value)
    return found


def proof(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> float:
    """The largest difference of any number between training together and alone; all must be there."""
    together, order = joint(config, monkeypatch)
    worst = 0.0
    names = list(config.tasks)
    for number, name in enumerate(names):
        lone = alone(config, name, number, together, order)
        found = state_of(together.trainer, name, set(names) - {name})
        wanted = state_of(lone, "default", set())
        assert found.keys() == wanted.keys()
        assert any(key.endswith("exp_avg_sq") for key in wanted)
        for key, value in wanted.items():
            assert found[key].shape == value.shape, key
            worst = max(worst, float((found[key] - value).abs().max()))
        moved = [value.abs().max() for key, value in wanted.items() if key.endswith("multi_lora_B.weight")]
        assert min(moved) > 1e-3
    return worst


@pytest.fixture(params=["decoder", "encoder"])
def config(
    request: pytest.FixtureRequest, llama_folder: Path, bert_folder: Path, tmp_path: Path, frozen: None
) -> RunConfig:
    """Three tasks in float64, with rates, schedules and clipping of their own."""
    is_decoder = request.param == "decoder"
    tasks = causal_tasks(tmp_path) if is_decoder else head_tasks(tmp_path)
    for own, rate, schedule, clip in zip(tasks.values(), RATES, SCHEDULES, CLIPS, strict=True):
        own |= {"lr": rate, "schedule": schedule, "clip": clip}
        own.pop("eval_data")
    base, kind = (llama_folder, "llama") if is_decoder else (bert_folder, "bert")
    values = settings(base, kind, tasks, tmp_path / "run")
    values |= {"dtype": "float64", "batch_size": ROWS, "gradient_accumulation": PASSES, "max_steps": STEPS}
    return RunConfig(**{**values, "save_steps": 0, "warmup_ratio": 0.2, "weight_decay": 0.1}).resolved()


def test_training_together_is_training_alone(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert proof(config, monkeypatch) < TOLERANCE


def test_clipping_is_at_work_and_tasks_are_absent(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    together, _ = joint(config, monkeypatch)
    lines = [line for line in together.trainer.state.log_history if "loss" in line]
    for name, clip in zip(config.tasks, CLIPS, strict=True):
        norms = [line[f"grad_norm/{name}"] for line in lines if f"grad_norm/{name}" in line]
        assert sum(norm > clip for norm in norms) > len(norms) / 2
        assert len(norms) < STEPS
        assert all((f"loss/{name}" in line) == (f"grad_norm/{name}" in line) for line in lines)
    for line in lines:
        own = [value for name, value in line.items() if name.startswith("loss/")]
        # The Trainer adds losses up in float32.
        assert line["loss"] == pytest.approx(sum(own), rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", TOLERANCE), ("float32", 1e-3)])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_run_of_all_leaves_what_a_run_of_each_leaves(
    kind: str, dtype: str, tolerance: float, llama_folder: Path, bert_folder: Path, tmp_path: Path, quick: None
) -> None:
    """Settings as a user has them: the default schedule, warm-up and clipping, the sampler's own order, two epochs.

    Drawn evenly, as many rows of each task a step as its own run has.
    """
    files = causal_tasks(tmp_path) if kind == "decoder" else head_tasks(tmp_path)
    tasks = {name: {key: own[key] for key in ("data", "kind") if key in own} for name, own in files.items()}
    base = llama_folder if kind == "decoder" else bert_folder
    values = settings(base, "llama" if kind == "decoder" else "bert", tasks, tmp_path / "all")
    values |= {"dtype": dtype, "limit": 6, "epochs": 3, "max_steps": None, "save_steps": 0, "task_sampling": "uniform"}
    fit(RunConfig(**{**values, "batch_size": 3, "gradient_accumulation": 2}), progress=False)
    for name, task in tasks.items():
        fit(RunConfig(**{**values, "tasks": {name: task}, "batch_size": 2, "out": tmp_path / name}), progress=False)
        found, wanted = (
            load_file(tmp_path / run / "adapter" / name / "adapter_model.safetensors") for run in ("all", name)
        )
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert (found[key] - value).abs().max() <= tolerance * value.abs().max(), key


def clip_together(owned: Any, present: Any) -> list[float | None]:
    """A fault: one norm for all tasks."""
    parameters = [each for part, _ in owned for each in part.values() if each.grad is not None]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max(limit for _, limit in owned)))
    return [norm if number in present else None for number in range(len(owned))]


def zeros_for_absent(owned: Any, present: Any) -> list[float | None]:
    """A fault: tasks without rows get gradients of zero, and step."""
    from leantune.train.task_optimizer import clip_gradients

    norms = clip_gradients(owned, present)
    for part, _ in owned:
        for parameter in part.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return norms


def joint_mean(trainer: TaskTrainer, labels: Tensor, numbers: Tensor) -> Tensor:
    """A fault: the mean over the tokens of all tasks."""
    genuine = COUNT(trainer, labels, numbers)
    return torch.where(genuine > 0, genuine.sum(), 0)


COUNT = TaskTrainer._count
FAULTS: dict[str, tuple[str, Any]] = {
    "one norm for all": ("leantune.train.task_trainer.clip_gradients", clip_together),
    "zero gradients for absent tasks": ("leantune.train.task_trainer.clip_gradients", zeros_for_absent),
    "one mean for all": ("leantune.train.task_trainer.TaskTrainer._count", joint_mean),
    "schedules go on without rows": (
        "leantune.train.task_trainer.TaskTrainer.present",
        lambda trainer: range(len(trainer.names)),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_proof_fails_with_a_planted_fault(config: RunConfig, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    assert proof(config, monkeypatch) > 1e3 * TOLERANCE
