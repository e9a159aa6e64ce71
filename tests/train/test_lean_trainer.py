"""The trainer: what it divides by, what it trains, what a plan can ask of it, and what it measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback, TrainingArguments

from leantune.core.errors import MethodError, RunError
from leantune.data import Collator
from leantune.methods import TrainingPlan
from leantune.train import LeanTrainer, callbacks

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


@pytest.fixture
def llama() -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**TINY)).double()


def with_lora(model: nn.Module, **options: Any) -> Any:
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**{**settings, **options}))  # type: ignore[arg-type]


def plain_descent(groups: list[dict[str, Any]], rate: float, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """The step is the gradient itself, so that weights after a step show what the gradient was."""
    return torch.optim.SGD(groups, lr=rate)


def make_trainer(
    model: nn.Module, folder: Path, rows: list[dict[str, Any]], columns: tuple[str, ...] = (), **options: Any
) -> LeanTrainer:
    names = {"plan", "task", "logits", "group_by_length", "eval_dataset", "callbacks"}
    own = {name: options.pop(name) for name in names & options.keys()}
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**settings, **options})
    return LeanTrainer(model, args=arguments, train_dataset=rows, data_collator=Collator(0, columns), **own)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.state_dict().items()}


def losses_of(trainer: LeanTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@torch.no_grad()
def row_losses(model: nn.Module, rows: list[dict[str, Any]]) -> list[tuple[float, int]]:
    """Sum and count of the losses of each row, one row and one token at a time."""
    found = []
    for row in rows:
        scores = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        targets = [(i, token) for i, token in enumerate(row["labels"][1:]) if token != -100]
        found.append((-sum(float(scores[i, token]) for i, token in targets), len(targets)))
    return found


# What the loss is divided by


def step_with(
    make_model: Callable[[], Any], folder: Path, rows: list[dict[str, Any]], size: int, **options: Any
) -> Any:
    model = make_model()
    options = {"plan": TrainingPlan(optimizer=plain_descent), **options}
    accumulation = len(rows) // size
    trainer = make_trainer(
        model, folder, rows, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, **options
    )
    trainer.train()
    return trainer, state_of(model)


@pytest.mark.parametrize("logits", ["selected", "all"])
def test_four_passes_of_one_row_are_one_pass_of_four(
    llama: Any, tmp_path: Path, examples: list[dict[str, Any]], logits: str
) -> None:
    import copy

    rows = examples[:4]
    expected = row_losses(llama, rows)
    assert len({count for _, count in expected}) > 1, "rows must differ in their number of loss tokens"
    at_once, one = step_with(lambda: copy.deepcopy(llama), tmp_path, rows, 4, logits=logits)
    in_parts, four = step_with(lambda: copy.deepcopy(llama), tmp_path, rows, 1, logits=logits)
    assert any(not torch.equal(one[name], each) for name, each in state_of(llama).items())
    # The stock path takes its cross-entropy in float32.
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if logits == "selected" else {"rtol": 1e-5, "atol": 1e-7}
    for name, each in one.items():
        torch.testing.assert_close(four[name], each, **tolerance)
    mean = sum(total for total, _ in expected) / sum(count for _, count in expected)
    for trainer in (at_once, in_parts):
        assert losses_of(trainer)[0] == pytest.approx(mean, rel=1e-6)


def test_selected_and_all_logits_train_alike(llama: Any, tmp_path: Path, examples: list[dict[str, Any]]) -> None:
    import copy

    results = []
    for logits in ("selected", "all"):
        torch.manual_seed(2)
        model = with_lora(copy.deepcopy(llama))
        trainer = make_trainer(model, tmp_path, examples, logits=logits, max_steps=6, learning_rate=1e-2)
        trainer.train()
        results.append(losses_of(trainer))
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert results[0][0] != pytest.approx(results[0][-1], rel=1e-3)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_head_counts_rows_over_the_whole_step(tmp_path: Path, examples: list[dict[str, Any]], task: str) -> None:
    rows = [
        {**row, "labels": number % 2 if task == "classification" else number / 3} for number, row in enumerate(examples)
    ]

    def make_model() -> Any:
        torch.manual_seed(1)
        head = {"classification": {"num_labels": 2}, "regression": {"num_labels": 1, "problem_type": "regression"}}
        return LlamaForSequenceClassification(LlamaConfig(**TINY, **head[task])).double()

    if task == "regression":
        rows = [{**row, "labels": -100.0 if number == 1 else row["labels"]} for number, row in enumerate(rows)]
    rows = rows[:4]
    collate = Collator(0)
    batch = collate(rows)
    batch["labels"] = batch["labels"].double() if task == "regression" else batch["labels"]
    expected = float(make_model()(**batch).loss.detach())
    results = []
    for size in (4, 1):
        trainer, state = step_with(make_model, tmp_path, rows, size, task=task)
        assert losses_of(trainer)[0] == pytest.approx(expected, rel=1e-6)
        results.append(state)
    for name, each in results[0].items():
        torch.testing.assert_close(results[1][name], each, rtol=1e-6, atol=1e-8)


def test_a_plan_may_reduce_the_loss_itself(llama: Any, tmp_path: Path, examples: list[dict[str, Any]]) -> None:
    rows = [{**row, "weight": float(number)} for number, row in enumerate(examples[:4])]
    seen = []

    def weighted(sums: Tensor, counts: Tensor, columns: dict[str, Any]) -> Tensor:
        seen.append(sorted(columns))
        return (sums / counts * columns["weight"]).sum()

    plan = TrainingPlan(loss_reduction=weighted, batch_columns=("weight",), optimizer=plain_descent)
    expected = row_losses(llama, rows)
    trainer = make_trainer(llama, tmp_path, rows, ("weight",), plan=plan, eval_dataset=rows)
    trainer.train()
    wanted = sum(total / count * row["weight"] for (total, count), row in zip(expected, rows, strict=True))
    assert losses_of(trainer)[0] == pytest.approx(wanted, rel=1e-6)
    assert seen == [["weight"]]
    # Evaluation stays the mean per token: what is compared between methods.
    after = row_losses(llama, rows)
    mean = sum(total for total, _ in after) / sum(count for _, count in after)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean, rel=1e-9)


# What trains


def test_only_the_adapter_changes_and_only_it_has_optimizer_state(
    llama: Any, tmp_path: Path, examples: list[dict[str, Any]]
) -> None:
    model = with_lora(llama)
    before = state_of(model)
    trainer = make_trainer(model, tmp_path, examples, max_steps=3)
    trainer.train()
    changed = {name for name, each in state_of(model).items() if not torch.equal(each, before[name])}
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert changed == trained
    assert all("lora_" in name for name in trained)
    with_state = {id(each) for each in trainer.optimizer.state}
    assert with_state == {id(each) for each in model.parameters() if each.requires_grad}
    in_groups = [id(each) for group in trainer.optimizer.param_groups for each in group["params"]]
    assert sorted(in_groups) == sorted(with_state)


def test_weight_decay_spares_norms_and_biases(llama: Any, tmp_path: Path, examples: list[dict[str, Any]]) -> None:
    trainer = make_trainer(llama, tmp_path, examples, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    names = {id(each): name for name, each in llama.named_parameters()}
    spared = {names[id(each)] for group in groups if group["weight_decay"] == 0 for each in group["params"]}
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
    assert spared == {name for name in names.values() if "norm" in name}


def test_a_strided_parameter_is_never_given_to_the_fused_kernel(tmp_path: Path, examples: list[dict[str, Any]]) -> None:
    model = nn.Linear(4, 4)
    model.slice = nn.Parameter(torch.zeros(4, 8)[:, 2:5])  # type: ignore[assignment]
    assert not model.slice.is_contiguous()
    trainer = make_trainer(model, tmp_path, examples, plan=TrainingPlan())
    assert trainer.create_optimizer().defaults["fused"] is False
    contiguous = make_trainer(nn.Linear(4, 4), tmp_path, examples, plan=TrainingPlan())
    assert contiguous.create_optimizer().defaults["fused"] is True


def test_nothing_to_train_is_an_error(llama: Any, tmp_path: Path, examples: list[dict[str, Any]]) -> None:
    llama.requires_grad_(False)
    with pytest.raises(MethodError, match="nothing to train"):
        make_trainer(llama, tmp_path, examples).train()


# What a plan can ask for


def test_a_plan_chooses_groups_optimizer_sampler_and_callbacks(
    llama: Any, tmp_path: Path, examples: list[dict[str, Any]]
) -> None:
    steps: list[int] = []
    given: dict[str, Any] = {}

    class Listener(TrainerCallback):
        begun = 0

        def on_train_begin(self, *arguments: Any, **keywords: Any) -> None:
            self.begun += 1

    def groups(model: nn.Module, rate: float, decay: float) -> list[dict[str, Any]]:
        given.update(rate=rate, decay=decay)
        return [{"params": [next(model.parameters())], "lr": rate * 2}]

    def sampler(dataset: Any, seed: int) -> Any:
        given["seed"] = seed
        return torch.utils.data.SequentialSampler(range(4))

    listener = Listener()
    plan = TrainingPlan(
        callbacks=[listener],
        parameter_groups=groups,
        optimizer=plain_descent,
        sampler=sampler,
        after_optimizer_step=steps.append,
    )
    first = row_losses(llama, examples[:4])
    trainer = make_trainer(llama, tmp_path, examples, plan=plan, max_steps=3, weight_decay=0.25)
    trainer.train()
    assert steps == [1, 2, 3]
    assert given == {"rate": 0.1, "decay": 0.25, "seed": 5}
    assert listener.begun == 1
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [0.2]
    mean = sum(total for total, _ in first) / sum(count for _, count in first)
    assert losses_of(trainer)[0] == pytest.approx(mean, rel=1e-6), "the sampler's rows, in its order"


def test_a_plan_takes_schedule_clipping_and_the_whole_loss(
    llama: Any, tmp_path: Path, examples: list[dict[str, Any]]
) -> None:
    """A constant rate of its own, every gradient cut to a length of its own, and twice the mean of each pass's loss."""
    seen: list[dict[str, Any]] = []
    rows = [{**example, "weight": float(number)} for number, example in enumerate(examples[:8])]

    def schedule(optimizer: Any, steps: int, arguments: TrainingArguments) -> Any:
        assert steps == 2
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)

    def clip(limit: float) -> Tensor:
        assert limit == 1.0
        gradients = [each.grad for each in llama.parameters() if each.grad is not None]
        for gradient in gradients:
            gradient.mul_(1e-3)
        return torch.tensor(float(len(gradients)))

    def loss(model: nn.Module, inputs: dict[str, Any], columns: dict[str, Any]) -> Tensor:
        assert list(columns) == ["weight"]
        assert "weight" not in inputs
        found: Tensor = model(**inputs).loss * 2
        return found

    plan = TrainingPlan(
        optimizer=plain_descent,
        scheduler=schedule,
        clip=clip,
        loss=loss,
        before_forward=seen.append,
        batch_columns=("weight",),
    )
    before = state_of(llama)
    options = {"max_steps": 2, "max_grad_norm": 1.0, "gradient_accumulation_steps": 2, "eval_dataset": rows[:2]}
    trainer = make_trainer(llama, tmp_path, rows, ("weight",), plan=plan, per_device_train_batch_size=2, **options)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert [line["learning_rate"] for line in lines] == [0.05, 0.05]
    parameters = len(list(llama.parameters()))
    assert [line["grad_norm"] for line in lines] == [parameters] * 2
    assert [sorted(each["weight"].tolist()) for each in seen] != []
    assert sorted(row for each in seen for row in each["weight"].tolist()) == [0, 1, 2, 3, 4, 5, 6, 7]
    moved = max((llama.state_dict()[name] - before[name]).abs().max().item() for name in before)
    assert 0 < moved < 2 * 0.05 * 1e-3 * 100

    llama.load_state_dict(before)
    trainer.evaluate()
    assert len(seen) == 4, "an evaluation is none of the plan's forwards"


def test_callbacks_of_a_model_for_a_trainer_of_ones_own(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerControl, TrainerState

    assert callbacks(llama) == []
    model = with_lora(llama)
    assert callbacks(model) == []
    steps: list[int] = []
    plan = TrainingPlan(after_optimizer_step=steps.append)
    monkeypatch.setattr("leantune.train.listener.plan_of", lambda model: plan)
    [callback] = callbacks(model)
    callback.on_optimizer_step(TrainingArguments(), TrainerState(global_step=6), TrainerControl())
    assert steps == [7]


# What it measures


@pytest.mark.parametrize("size", [1, 3, 5, 12])
def test_evaluation_is_the_mean_per_token_whatever_the_batches(
    llama: Any, tmp_path: Path, examples: list[dict[str, Any]], size: int
) -> None:
    expected = row_losses(llama, examples)
    trainer = make_trainer(llama, tmp_path, examples, eval_dataset=examples, per_device_eval_batch_size=size)
    scores = trainer.evaluate()
    tokens = sum(count for _, count in expected)
    assert scores["eval_loss"] == pytest.approx(sum(total for total, _ in expected) / tokens, rel=1e-9)
    assert scores["eval_tokens"] == tokens


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_evaluation_of_a_head(tmp_path: Path, examples: list[dict[str, Any]], task: str) -> None:
    torch.manual_seed(1)
    regression = task == "regression"
    head = {"num_labels": 1, "problem_type": "regression"} if regression else {"num_labels": 3}
    model = LlamaForSequenceClassification(LlamaConfig(**TINY, **head))
    rows = [{**row, "labels": number / 3 if regression else number % 3} for number, row in enumerate(examples)]
    trainer = make_trainer(model, tmp_path, rows, task=task, eval_dataset=rows, per_device_eval_batch_size=5)
    scores = trainer.evaluate()
    batch = Collator(0)(rows)
    with torch.no_grad():
        output = model(**batch)
    assert scores["eval_loss"] == pytest.approx(float(output.loss), rel=1e-5)
    if regression:
        error = (output.logits[:, 0] - batch["labels"]).abs().mean()
        assert scores["eval_mean_absolute_error"] == pytest.approx(float(error), rel=1e-5)
    else:
        right = (output.logits.argmax(-1) == batch["labels"]).double().mean()
        assert scores["eval_accuracy"] == pytest.approx(float(right))


def test_training_goes_on_in_training_mode_after_an_evaluation(
    llama: Any, tmp_path: Path, examples: list[dict[str, Any]]
) -> None:
    model = with_lora(llama, lora_dropout=0.5)
    trainer = make_trainer(
        model, tmp_path, examples, max_steps=4, eval_dataset=examples, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    assert model.training
    assert len([line for line in trainer.state.log_history if "eval_loss" in line]) == 4


def test_tokens_and_padding_are_counted(llama: Any, tmp_path: Path, examples: list[dict[str, Any]]) -> None:
    trainer = make_trainer(llama, tmp_path, examples, per_device_train_batch_size=12, eval_dataset=examples)
    trainer.train()
    trainer.evaluate()
    lengths = [len(row["input_ids"]) for row in examples]
    meter = trainer.meter
    assert (meter.rows, meter.tokens, meter.cells) == (12, sum(lengths), 12 * max(lengths))
    assert meter.loss_tokens == sum(count for _, count in row_losses(llama, examples))
    assert meter.padding == pytest.approx(1 - sum(lengths) / (12 * max(lengths)))


# What it refuses


def test_a_loss_that_is_not_finite_stops_before_the_step(
    llama: Any, tmp_path: Path, examples: list[dict[str, Any]]
) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    llama.lm_head.weight[3, 0] = float("nan")

    trainer = make_trainer(
        llama, tmp_path, examples, max_steps=5, callbacks=[Poison()], save_strategy="steps", save_steps=1
    )
    with pytest.raises(RunError, match=r"step 3: the loss is nan; .*lower lr.*checkpoint-2"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    llama: Any, tmp_path: Path, examples: list[dict[str, Any]]
) -> None:
    for clip in (0.0, 1.0):
        llama.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
        before = state_of(llama)
        trainer = make_trainer(llama, tmp_path, examples, max_grad_norm=clip)
        with pytest.raises(RunError, match="step 1: the gradient norm is"):
            trainer.train()
        assert all(torch.equal(each, before[name]) for name, each in state_of(llama).items())
