"""Multi-LoRA's layers: rows with tasks of their own, absent tasks, one A that stays, trains and is counted."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import RobertaConfig, RobertaModel

from leantune import MultiLoraConfig
from leantune.core.errors import ConfigError, LeantuneError, MethodError
from leantune.methods._row_task import RowTasks
from leantune.testing import CHECKS, NotApplicable, subject
from leantune.testing.closeness import assert_close, assert_differs, assert_same
from leantune.testing.model import language_model
from leantune.testing.subject import (
    Wrapped,
    gradients,
    logits,
    no_grad_logits,
    objective,
    own_layers,
    start,
    tokens,
    trained,
)

TASKS = ["cola", "mrpc", "sst2"]
ROWS = ["mrpc", "cola", "__base__", "mrpc", "sst2", "cola"]


def made(tasks: list[str] = TASKS, *, started: bool = True, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A tiny Llama with an adapter for each task, all of them trainable."""
    options = {"r": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    model = get_peft_model(language_model("llama", dtype), MultiLoraConfig(**options), adapter_name=tasks[0])
    for task in tasks[1:]:
        model.add_adapter(task, MultiLoraConfig(**options))
    model.set_requires_grad(tasks)
    for number, task in enumerate(tasks if started else ()):
        start(model, task, seed=number)
    return model


def alone(model: Wrapped, task: str, ids: Tensor) -> Tensor:
    model.set_row_tasks([task] * len(ids))
    return no_grad_logits(model, ids)


@pytest.mark.parametrize("mode", [True, False])
def test_each_row_takes_its_own_task(mode: bool) -> None:
    """In training as in evaluation; PEFT's ``adapter_names`` says the same in evaluation alone."""
    model, ids = made().train(mode), tokens(rows=6)
    by_task = {task: alone(model, task, ids) for task in [*TASKS, "__base__"]}
    assert_same(by_task["__base__"], no_grad_logits(language_model("llama"), ids), "rows without a task")
    model.set_row_tasks(ROWS)
    mixed = no_grad_logits(model, ids)
    for row, task in enumerate(ROWS):
        wrong = [value[row] for other, value in by_task.items() if other != task]
        assert_close(mixed[row], by_task[task][row], torch.float64, 64, 8, wrong=wrong, what=f"row {row}")
    if not mode:
        model.set_row_tasks(None)
        assert_same(no_grad_logits(model, ids, adapter_names=ROWS), mixed, "the same by adapter_names")


def test_row_tasks_stay_until_the_next_call() -> None:
    model, ids = made().eval(), tokens(rows=6)
    plain = no_grad_logits(model, ids)
    model.set_row_tasks(ROWS)
    first = no_grad_logits(model, ids)
    assert_same(no_grad_logits(model, ids), first, "the second forward")
    with model.disable_adapter():
        assert_same(no_grad_logits(model, ids[:2]), no_grad_logits(language_model("llama"), ids[:2]), "the base")
    model.set_row_tasks(None)
    assert_same(no_grad_logits(model, ids), plain, "after None")
    assert_differs(first, plain)


def test_wrong_row_tasks_are_refused() -> None:
    model = made().train()
    with pytest.raises(MethodError, match=r"row task 'mprc': no adapter.*mrpc"):
        model.set_row_tasks(["mprc", "cola"])
    model.set_row_tasks(["mrpc", "cola"])
    with pytest.raises(ValueError, match=r"but got 2 and 3 respectively"):
        logits(model, tokens(rows=3))
    model.set_row_tasks(["cola"] * 3)
    model.merge_adapter(["cola"])
    with pytest.raises(ValueError, match="merged adapters"):
        logits(model, tokens(rows=3))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_mixed_batch_are_those_of_each_task_alone(checkpointing: bool) -> None:
    model, ids = made().train(), tokens(rows=6)
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    weights = torch.randn(6, ids.shape[1], 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def row_loss(rows: list[int]) -> Tensor:
        model.set_row_tasks([ROWS[row] for row in rows])
        output = logits(model, ids[rows])
        return (output * weights[rows]).sum() + (output.square() * weights[rows]).sum()

    row_loss(list(range(6))).backward()
    mixed = gradients(model)
    for task in TASKS:
        row_loss([row for row, own in enumerate(ROWS) if own == task]).backward()
        for name, parameter in trained(model, task).items():
            assert parameter.grad is not None
            assert_close(mixed[name], parameter.grad, torch.float64, 64, 8, what=name)
        others = [p for other in TASKS if other != task for p in trained(model, other).values()]
        assert all(parameter.grad is None for parameter in others), f"an absent task got a gradient beside {task}"
        model.zero_grad()


def test_a_batch_of_no_task_trains_nothing() -> None:
    model = made().train()
    model.set_row_tasks(["__base__"] * 3)
    assert not logits(model, tokens()).requires_grad


def test_rows_are_sorted_once_for_all_layers() -> None:
    model = made()
    model.set_row_tasks(ROWS)
    layers = own_layers(model)
    no_grad_logits(model, tokens(rows=6))
    rows = {id(layer.row_tasks) for layer in layers.values()}
    assert len(layers) > 3
    assert len(rows) == 1
    assert len(next(iter(layers.values())).row_tasks._groups) == 1


def test_dropout_of_a_task_is_keyed_by_task_and_step() -> None:
    """The rest of the batch, its padding, and the global random state do not matter; another step does."""
    model, ids = made(dropout=0.5).train(), tokens(rows=6, length=7)
    model.set_row_tasks(ROWS, step=3)
    torch.manual_seed(1)
    mixed = no_grad_logits(model, ids)
    for task in TASKS:
        rows = [row for row, own in enumerate(ROWS) if own == task]
        torch.manual_seed(2)
        model.set_row_tasks([task] * len(rows), step=3)
        # Causal: what stands behind does not reach the first five positions, and takes no random number from them.
        for length in (7, 5):
            shorter = no_grad_logits(model, ids[rows, :length])
            assert_close(mixed[rows, :length], shorter, torch.float64, 64, 8, what=f"{task}, {length} tokens")
        model.set_row_tasks([task] * len(rows), step=4)
        assert_differs(no_grad_logits(model, ids[rows]), mixed[rows], "another step")
    model.eval().set_row_tasks(ROWS, step=3)
    assert_differs(no_grad_logits(model, ids), mixed, "evaluation")


def test_dropout_without_a_step_is_the_global_one() -> None:
    model, ids = made(["cola"], dropout=0.5).train(), tokens()
    model.set_row_tasks(["cola"] * 3)
    for told in (["cola"] * 3, None):
        model.set_row_tasks(told)
        torch.manual_seed(1)
        first = no_grad_logits(model, ids)
        assert_differs(no_grad_logits(model, ids), first, "a second draw")
        torch.manual_seed(1)
        assert_same(no_grad_logits(model, ids), first, "the same random state")


def test_dropout_keeps_the_mean() -> None:
    rows = RowTasks(["a", "b", "a"], step=0)
    x = torch.ones(3, 50, 40)
    dropped = rows.dropped(x, "a", 0.25, "key")
    assert_same(dropped[1], x[1], "another task's row")
    assert_differs(RowTasks(["b", "a", "b"], step=0).dropped(x, "b", 0.25, "key"), dropped, "another task's mask")
    assert_differs(rows.dropped(x, "a", 0.25, "another layer"), dropped, "another layer's mask")
    kept = dropped[[0, 2]]
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    # 4000 entries: five standard deviations of their mean.
    assert abs(kept.mean().item() - 1) < 5 * (0.25 / 0.75 / kept.numel()) ** 0.5


def test_scaling_is_each_tasks_own() -> None:
    model, ids = made(["cola"]), tokens()
    model.add_adapter("loud", MultiLoraConfig(r=4, alpha=24.0, target_modules=["q_proj", "v_proj", "down_proj"]))
    layers = own_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.factor("loud").copy_(layer.factor("cola") / 3)
    quiet = alone(model, "cola", ids)
    assert_close(alone(model, "loud", ids), quiet, torch.float64, 64, 8, what="alpha three times")
    model.set_row_tasks(["cola", "loud", "cola"])
    assert_close(no_grad_logits(model, ids), quiet, torch.float64, 64, 8, what="both in one batch")
    stabilised = MultiLoraConfig(r=4, alpha=8.0, use_rslora=True)
    assert (stabilised.scaling, MultiLoraConfig(r=4, alpha=8.0).scaling) == (4.0, 2.0)


def test_one_a_for_all_tasks_which_goes_with_the_last() -> None:
    model = made()
    layers = own_layers(model)
    kept = {path: layer.shared.weight.clone() for path, layer in layers.items()}
    assert not any("multi_lora_shared" in name for name, _ in model.named_parameters())
    for task, following in pairwise(TASKS):
        model.set_adapter(following)
        model.delete_adapter(task)
    for path, layer in layers.items():
        assert_same(layer.shared.weight, kept[path], path)
    model.delete_adapter(TASKS[2])
    assert not any("multi_lora" in name for name in model.state_dict())
    # And so another rank is free to come.
    model.add_adapter("late", MultiLoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("late")
    assert own_layers(model)["model.layers.0.self_attn.q_proj"].shared.weight.shape == (2, 16)


def test_tasks_that_cannot_share_are_refused_before_anything_is_made() -> None:
    model = made(["cola"])
    before = set(model.state_dict())
    with pytest.raises(ConfigError, match=r"layers.0.self_attn.q_proj: r=3; r=4, the rank of the A"):
        model.add_adapter("other", MultiLoraConfig(r=3, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"train_shared=True; False, as the other tasks"):
        model.add_adapter("other", MultiLoraConfig(r=4, train_shared=True, target_modules=["q_proj"]))
    assert set(model.state_dict()) == before
    # Another layer is another A.
    model.add_adapter("other", MultiLoraConfig(r=3, target_modules=["k_proj"]))


def test_the_config_names_all_its_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        MultiLoraConfig(r=0, alpha=-1.0, dropout=1.0, shared_init="kaimng")
    for part in ("MultiLoraConfig.r: 0", "alpha: -1.0", "dropout: 1.0", "kaiming"):
        assert part in str(caught.value)
    assert isinstance(caught.value, LeantuneError)


def test_query_and_value_train_by_default() -> None:
    model = get_peft_model(language_model("llama"), MultiLoraConfig())
    assert {path.rpartition(".")[2] for path in own_layers(model)} == {"q_proj", "v_proj"}


def test_parameters_are_those_of_the_paper() -> None:
    """Table 1: RoBERTa-base, query and value, r 8, eight tasks: 1.3M against LoRA's 2.4M."""
    with torch.device("meta"):
        base = RobertaModel(RobertaConfig())
    model: Any = get_peft_model(base, MultiLoraConfig(r=8), adapter_name="task0")
    for number in range(1, 8):
        model.add_adapter(f"task{number}", MultiLoraConfig(r=8))
    count = model.parameter_count()
    shared = sum(value.numel() for name, value in model.state_dict().items() if "multi_lora_shared" in name)
    factors = sum(value.numel() for name, value in model.named_parameters() if "multi_lora_B" in name)
    assert (count.total, count.separate) == (shared + factors, 12 * 2 * 8 * 8 * (768 + 768))
    assert (count.total, count.separate) == (1_327_104, 2_359_296)
    assert model.parameter_count(tasks=1).total == 12 * 2 * 8 * (768 + 768)
    assert str(count).startswith("1,327,104 adapter parameters for 8 tasks (A 147,456, B 147,456 each)")
    assert str(count).endswith("as separate LoRAs 2,359,296")


def _shared_weights(model: Wrapped) -> list[Tensor]:
    return [layer.shared.weight for layer in own_layers(model).values()]


def test_an_a_that_trains_follows_its_tasks() -> None:
    model = made(["cola", "mrpc"], train_shared=True)
    weights = _shared_weights(model)

    def trains() -> bool:
        found = {weight.requires_grad for weight in weights}
        assert len(found) == 1
        return found.pop()

    assert trains()
    model.set_requires_grad("cola", False)
    assert trains(), "mrpc still does"
    model.set_requires_grad("mrpc", False)
    assert not trains()
    model.set_adapter("mrpc")
    assert trains()
    with model.disable_adapter():
        assert not trains()
    assert trains()
    model.add_adapter("late", model.peft_config["cola"])
    assert trains(), "adding a task stopped the others' training"
    model.set_adapter("late", inference_mode=True)
    assert not trains()
    model.set_adapter("cola")
    model.delete_adapter("mrpc")
    assert trains(), "a task that is left does"
    assert all(new is old for new, old in zip(_shared_weights(model), weights, strict=True))


def test_the_gradient_of_a_is_the_sum_over_the_tasks() -> None:
    """Claim 4.2, through the whole model; and the gradients of the B's are each task's own."""
    model, ids = made(train_shared=True).train(), tokens(rows=6)

    def backward(rows: list[int]) -> dict[str, Tensor]:
        model.zero_grad()
        model.set_row_tasks([ROWS[row] for row in rows])
        output = logits(model, ids[rows])
        output.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    mixed = backward(list(range(6)))
    parts = [backward([row for row, own in enumerate(ROWS) if own == task]) for task in TASKS]
    shared = [name for name in mixed if "multi_lora_shared" in name]
    assert len(shared) == len(_shared_weights(model))
    for name in shared:
        exact = torch.stack([part[name] for part in parts]).sum(0)
        assert_close(mixed[name], exact, torch.float64, 64, 8, wrong=[exact / 3], what=name)
    for task, part in zip(TASKS, parts, strict=True):
        for name in part:
            if f".{task}." in name:
                assert_close(mixed[name], part[name], torch.float64, 64, 8, what=name)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_where_a_trains(check: Any) -> None:
    # The first says of each parameter that it trains if and only if it has the active adapter's name, and A has none;
    # the second puts a trained A beside a fresh task, which is refused (test_multi_lora_file.py).
    if check.__name__ in ("several_adapters_switch", "save_and_load", "load_in_a_fresh_process"):
        return
    try:
        check(subject("multi-lora", "llama", train_shared=True))
    except NotApplicable as fact:
        pytest.skip(str(fact))


def test_objective_is_not_blind() -> None:
    """The comparisons above stand on an adapter that changes something."""
    model, ids = made(), tokens(rows=6)
    model.set_row_tasks(ROWS)
    assert objective(logits(model, ids)).item() != pytest.approx(objective(logits(language_model("llama"), ids)).item())
