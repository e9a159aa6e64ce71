"""Boosting's rounds inside transformers' own Trainer: what trains, what is forgotten, what is kept."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState, TrainingArguments

import leantune
from boosting_fixture import BLOCKS, answer, boosted, layers, llama, rows, state, tokens, trainer, wrap
from leantune.core.errors import MethodError
from leantune.methods._boosting import Boosting
from leantune.testing.closeness import assert_close, assert_differs, assert_same, assert_same_state
from leantune.train import LeanTrainer

pytestmark = pytest.mark.usefixtures("frozen")


def blocks_of(names: Any) -> set[int]:
    """The numbers of the blocks that some parameters stand in."""
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names}


class Watch(TrainerCallback):
    """Writes down what stands when, after the method's own callbacks."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.before: dict[str, Tensor] = {}
        self.steps: list[dict[str, Any]] = []
        self.logits: list[Tensor] = []
        self.logs: list[dict[str, Any]] = []

    def on_step_begin(self, args: Any, state_: Any, control: Any, **keywords: Any) -> None:
        self.before = state(self.model)
        self.active = {name for name, each in self.model.named_parameters() if each.requires_grad}

    def on_pre_optimizer_step(self, args: Any, state_: Any, control: Any, **keywords: Any) -> None:
        optimizer = keywords["optimizer"]
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.gradients = {name for name, each in self.model.named_parameters() if each.grad is not None}

    def on_optimizer_step(self, args: Any, state_: Any, control: Any, **keywords: Any) -> None:
        held = keywords["optimizer"].state
        after = state(self.model)
        self.steps.append(
            {
                "step": state_.global_step,
                "active": {name for name, each in self.model.named_parameters() if each.requires_grad},
                "gradients": self.gradients,
                # Beside the numbers stands the round that each belongs to.
                "changed": {
                    name
                    for name, value in after.items()
                    if not name.endswith(".round") and not torch.equal(value, self.before[name])
                },
                "B": {name: (after[name] - self.before[name]).abs() for name in self.gradients if name.endswith(".B")},
                "rates": self.rates,
                "back": [group["lr"] for group in keywords["optimizer"].param_groups],
                "counts": {int(each["step"]) for each in held.values()},
                "bytes": sum(v.numel() * v.element_size() for each in held.values() for v in each.values()),
            }
        )

    def on_step_end(self, args: Any, state_: Any, control: Any, **keywords: Any) -> None:
        self.logits.append(answer(self.model))
        self.held = len(keywords["optimizer"].state)

    def on_log(self, args: Any, state_: Any, control: Any, logs: Any = None, **keywords: Any) -> None:
        self.logs.append(dict(logs))


def watched(folder: Path, model: Any, **options: Any) -> Watch:
    watch = Watch(model)
    trainer(model, folder, [watch], **options).train()
    return watch


@pytest.mark.parametrize("sampling", ["uniform", "balanced", "gradient"])
def test_a_round_trains_its_blocks_and_no_bit_of_another(tmp_path: Path, sampling: str) -> None:
    model = wrap(block_sampling=sampling, blocks_per_round=2, steps_per_round=3)
    watch = watched(tmp_path, model, max_steps=9, gradient_accumulation_steps=2)
    seen = []
    for step in watch.steps:
        blocks = blocks_of(step["active"])
        assert len(blocks) == 2
        assert step["gradients"] == step["active"], "no gradient reaches the optimizer but those of the round"
        # A fresh B of zeros gives A no gradient in its first step, which weight decay alone moves.
        assert step["changed"] <= step["active"]
        assert {name for name in step["active"] if name.endswith(".B")} <= step["changed"]
        seen.append(blocks)
        assert seen[step["step"] // 3 * 3] == blocks, "a round keeps its blocks"
    assert len({tuple(sorted(blocks)) for blocks in seen}) > 1
    plain = [line for line in watch.logs if "loss" in line]
    assert [line["round"] for line in plain] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [blocks_of(f"{name}." for name in line["blocks"]) for line in plain] == seen
    assert_same_state(
        {k: v for k, v in model.get_base_model().state_dict().items() if "base_layer" in k or "embed" in k},
        {k: v for k, v in wrap().get_base_model().state_dict().items() if "base_layer" in k or "embed" in k},
        "the base",
    )


def test_the_optimizer_forgets_moments_and_count_of_steps_each_round(tmp_path: Path) -> None:
    model = wrap(steps_per_round=3, warmup_steps=0)
    watch = watched(tmp_path, model, max_steps=9, weight_decay=0.0, max_grad_norm=0, adam_epsilon=1e-30)
    assert [step["counts"] for step in watch.steps] == [{1}, {2}, {3}] * 3
    for step in watch.steps[::3]:
        for name, change in step["B"].items():
            # Adam's very first step is the rate times the sign; moments kept over a forgotten count make it 3.2 rates.
            moved = change[change > 0]
            assert len(moved) > 0
            wanted = torch.full_like(moved, 2e-2, dtype=torch.float64)
            assert_close(moved, wanted, torch.float32, 64, 4, what=f"first step of {name}")
    assert watch.held == 0, "nothing is left after the last round"


def test_the_optimizer_holds_as_much_after_twenty_rounds_as_in_the_first(tmp_path: Path) -> None:
    model = wrap(steps_per_round=1)
    watch = watched(tmp_path, model, max_steps=20, save_strategy="no")
    assert model.num_boosted_rounds() == 20
    (held,) = {step["bytes"] for step in watch.steps}
    parameters = sum(
        each.numel() for name, each in model.named_parameters() if ".layers.0." in name and "booster" in name
    )
    # Two moments of four bytes, and a step count of each of 14 parameters.
    assert held == 2 * 4 * parameters + 4 * 14
    assert len(set().union(*(blocks_of(step["active"]) for step in watch.steps))) == BLOCKS


@pytest.mark.parametrize(
    ("steps", "warmup", "factors"), [(4, 2, [1 / 3, 2 / 3, 1, 1]), (2, 100, [1 / 2, 1]), (1, 2, [1])]
)
def test_the_rate_rises_at_the_start_of_each_round_and_the_schedule_goes_on(
    tmp_path: Path, steps: int, warmup: int, factors: list[float]
) -> None:
    """A warm-up longer than half of a round is cut: the rate of the run is reached in every round."""
    model = wrap(steps_per_round=steps, warmup_steps=warmup)
    watch = watched(tmp_path, model, lr_scheduler_type="linear", learning_rate=0.08)
    schedule = [0.08 * (1 - step / 8) for step in range(8)]
    for step, plain in zip(watch.steps, schedule, strict=True):
        factor = factors[step["step"] % steps]
        assert step["rates"] == pytest.approx([plain * factor] * len(step["rates"]), rel=1e-12)
        assert step["back"] == pytest.approx([plain] * len(step["back"]), rel=1e-12)
        assert watch.logs[step["step"]]["learning_rate"] == pytest.approx(plain * factor, rel=1e-12)


def test_backward_stops_at_the_lowest_chosen_block(tmp_path: Path) -> None:
    model = wrap(blocks_per_round=1, steps_per_round=1)
    graph: list[list[bool]] = []
    for block in model.get_base_model().model.layers:
        block.register_forward_hook(lambda module, inputs, output: graph[-1].append(output.requires_grad))

    class Fresh(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
            graph.append([])

    watch = Watch(model)
    trainer(model, tmp_path, [Fresh(), watch], max_steps=6).train()
    lowest = [min(blocks_of(step["active"])) for step in watch.steps]
    assert len(set(lowest)) > 2
    for block, flags in zip(lowest, graph, strict=True):
        assert flags[:BLOCKS] == [number >= block for number in range(BLOCKS)]


@pytest.mark.filterwarnings("ignore:XGBLoRA trains without rounds:UserWarning")
def test_nothing_below_the_lowest_chosen_block_is_saved_for_backward(tmp_path: Path) -> None:
    def saved(chosen: int) -> int:
        model = wrap()
        for path, layer in layers(model).items():
            own = layer.booster("default")
            own.train_in(0) if f".layers.{chosen}." in path else own.rest()
        held: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.train()(input_ids=tokens(), labels=tokens())
        return sum(held.values())

    sizes = [saved(block) for block in range(BLOCKS)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == BLOCKS
    steps = [before - after for before, after in pairwise(sizes)]
    assert len(set(steps)) == 1, "each block less saves the same"


@pytest.mark.parametrize("options", [{}, {"shrinkage": 0.5}, {"fold": True}, {"block_sampling": "gradient", "r": 2}])
def test_any_prefix_of_the_rounds_is_the_model_as_it_was(tmp_path: Path, options: dict[str, Any]) -> None:
    model = wrap(**options)
    watch = watched(tmp_path, model, max_steps=10)
    model.save_pretrained(tmp_path / "adapter")
    loaded = leantune.load(llama(), tmp_path / "adapter").eval()
    plain = answer(llama())
    for rounds in range(1, 6):
        loaded.set_iteration_range((0, rounds))
        if options.get("fold"):
            for layer in layers(loaded).values():
                layer.fold("default")
        assert_same(answer(loaded), watch.logits[2 * rounds - 1], f"logits of the first {rounds} rounds")
        assert_differs(watch.logits[2 * rounds - 1], plain, "logits")
    assert {layer.booster("default").working for layer in layers(model).values()} == {None}, "training is over"


def test_shrinkage_is_what_is_left_of_a_booster(tmp_path: Path) -> None:
    kept = {}
    for shrinkage in (1.0, 0.25):
        model = wrap(shrinkage=shrinkage, alpha=3.0)
        watched(tmp_path, model, max_steps=2)
        kept[shrinkage] = {path: layer.booster("default").kept_B for path, layer in layers(model).items()}
    for path, B in kept[1.0].items():
        assert_same(kept[0.25][path], B * 0.25, path)
    assert any(len(B.flatten()) for B in kept[1.0].values())


def test_what_the_end_cuts_short_is_kept_and_training_again_goes_on_from_there(tmp_path: Path) -> None:
    model = wrap(steps_per_round=4, shrinkage=0.5)
    boosting = leantune.callbacks(model)[0]
    assert isinstance(boosting, Boosting)
    watched(tmp_path, model, max_steps=6)
    assert model.num_boosted_rounds() == 2
    assert model.peft_config["default"].num_boosted_rounds == 2
    after = answer(model)
    first = {path: layer.booster("default").kept_A.clone() for path, layer in layers(model).items()}
    watched(tmp_path, model, max_steps=4)
    assert model.num_boosted_rounds() == 3
    assert_differs(answer(model), after, "logits after one more round")
    model.set_iteration_range((0, 2))
    assert_same(answer(model), after, "logits of the first two")
    for path, layer in layers(model).items():
        assert_same(layer.booster("default").used()[1], first[path], path)


def test_training_goes_on_from_the_rounds_that_count(tmp_path: Path) -> None:
    model = wrap()
    staged = boosted(model, 5)
    model.set_iteration_range((0, 3))
    watched(tmp_path, model, max_steps=2)
    assert model.num_boosted_rounds() == 4
    model.set_iteration_range((0, 3))
    assert_same(answer(model), staged[2], "logits of the rounds before")


def test_the_best_of_the_checkpoints_may_be_taken_back(tmp_path: Path) -> None:
    """transformers' own load_best_model_at_end puts an earlier checkpoint under the same adapter."""
    model = wrap(early_stopping_rounds=9)
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    made = trainer(model, tmp_path, max_steps=12, learning_rate=8.0, load_best_model_at_end=True, **every)
    made.train()
    losses = [line["eval_loss"] for line in made.state.log_history if "eval_loss" in line]
    best = min(range(6), key=lambda number: losses[number])
    assert best < 5
    config = model.peft_config["default"]
    assert (config.best_iteration, config.num_boosted_rounds) == (best, best + 1)
    assert made.evaluate()["eval_loss"] == losses[best]


def test_what_was_trained_outside_of_rounds_is_not_lost(tmp_path: Path) -> None:
    model = wrap(init_weights=False)
    before = answer(model)
    assert_differs(before, answer(llama()), "logits of noise")
    watched(tmp_path, model, max_steps=2)
    model.set_iteration_range((0, 1))
    assert_close(answer(model), before.double(), torch.float32, 64, 64, wrong=(answer(llama()),))


@pytest.mark.parametrize("given", [{"max_steps": 20}, {"max_steps": -1, "num_train_epochs": 1}])
def test_as_many_rounds_as_were_asked_for(tmp_path: Path, given: dict[str, int]) -> None:
    """They are the length of the run and of its schedule; an epoch here has four steps."""
    model = wrap(num_boost_round=3, warmup_steps=0)
    watch = watched(tmp_path, model, lr_scheduler_type="linear", learning_rate=0.06, **given)
    assert (len(watch.steps), model.num_boosted_rounds()) == (6, 3)
    assert [step["rates"][0] for step in watch.steps] == pytest.approx([0.01 * left for left in range(6, 0, -1)])


@pytest.mark.parametrize(
    ("every", "losses", "steps", "best"),
    [(1, [3.0, 4.0, 2.0, 5.0, 6.0], 5, 2), (3, [3.0, 2.0, 2.5], 9, 5), (1, [3.0, 3.0, 3.0], 3, 0)],
)
def test_patience_counts_rounds_that_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, losses: list[float], steps: int, best: int
) -> None:
    """The round that would end it may be the best, and between two evaluations nothing is known to be worse."""
    model = wrap(early_stopping_rounds=2, eval_rounds=every, steps_per_round=1)
    made = trainer(model, tmp_path, max_steps=20)
    measured = iter(losses)

    def evaluate(**keywords: Any) -> dict[str, float]:
        scores = {"eval_loss": next(measured)}
        made.log(dict(scores))
        made.control = made.callback_handler.on_evaluate(made.args, made.state, made.control, scores)
        return scores

    monkeypatch.setattr(made, "evaluate", evaluate)
    made.train()
    config = model.peft_config["default"]
    assert (made.state.global_step, config.best_iteration, config.best_score) == (steps, best, min(losses))


def test_fewer_steps_than_the_rounds_need_end_it(tmp_path: Path) -> None:
    model = wrap(num_boost_round=9)
    assert len(watched(tmp_path, model, max_steps=4).steps) == 4


def test_callbacks_that_come_late_end_it_after_the_rounds_too(tmp_path: Path) -> None:
    model = wrap(num_boost_round=2)
    made = trainer(model, tmp_path)
    made.args.max_steps = 20
    made.train()
    assert (made.state.global_step, model.num_boosted_rounds()) == (4, 2)


def test_training_that_nobody_divides_into_rounds_is_told_so_once(tmp_path: Path) -> None:
    model = wrap().train()
    with pytest.warns(UserWarning, match=r"without rounds, as a plain LoRA.*leantune\.callbacks"):
        model(input_ids=tokens())
    model(input_ids=tokens())
    boosted_model = wrap()
    watched(tmp_path, boosted_model, max_steps=2)
    # Evaluation and references are no training.
    answer(wrap())
    with torch.no_grad():
        wrap().train()(input_ids=tokens())
    with pytest.warns(UserWarning, match="without rounds"):
        boosted_model.train()(input_ids=tokens())


def test_reference_forwards_in_the_middle_of_a_round_wake_no_booster(tmp_path: Path) -> None:
    model = wrap(steps_per_round=3)
    plain = answer(llama())

    class Reference(TrainerCallback):
        def on_substep_end(self, *arguments: Any, **keywords: Any) -> None:
            with model.disable_adapter():
                assert_same(answer(model), plain, "logits of the reference")

    watch = Watch(model)
    trainer(model, tmp_path, [Reference(), watch], max_steps=6, gradient_accumulation_steps=2).train()
    for step in watch.steps:
        assert len(blocks_of(step["active"])) == 1
        assert step["changed"] <= step["active"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_round(tmp_path: Path, reentrant: bool) -> None:
    exact = wrap(llama(torch.float64))
    watched(tmp_path, exact)
    model = wrap(llama(torch.float64))
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    watched(tmp_path, model)
    assert_close(answer(model), answer(exact), torch.float64, 1e6, 64, wrong=(answer(llama(torch.float64)),))


def test_an_optimizer_over_one_round_is_refused(tmp_path: Path) -> None:
    model = wrap()
    made = trainer(model, tmp_path)
    own = layers(model)["model.layers.0.mlp.up_proj"].booster("default")
    made.optimizer = torch.optim.AdamW([own.A, own.B], lr=1e-2)
    with pytest.raises(MethodError, match=r"holds no booster of model\.layers\.0.*and more; the boosters of"):
        made.train()


@pytest.mark.parametrize("which", [{"world_size": 2}, {"fsdp": ["full_shard"]}, {"deepspeed": "zero.json"}])
def test_several_processes_are_refused_in_one_sentence(which: dict[str, Any]) -> None:
    arguments = SimpleNamespace(**{"world_size": 1, "deepspeed": None, "fsdp": [], "torch_compile": False, **which})
    with pytest.raises(MethodError, match="which processes that share gradients cannot follow; one process; train in"):
        Boosting(wrap(), "default").on_init_end(arguments, TrainerState(), None)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="one process"):
        Boosting(wrap(), "default").on_train_begin(arguments, TrainerState(), None)  # type: ignore[arg-type]


def test_compiling_is_refused() -> None:
    arguments = SimpleNamespace(torch_compile=True)
    for event in ("on_init_end", "on_train_begin"):
        with pytest.raises(MethodError, match="each round has another graph"):
            getattr(Boosting(wrap(), "default"), event)(arguments, TrainerState(), None)


def test_a_checkpoint_without_its_adapter_is_refused(tmp_path: Path) -> None:
    boosting = Boosting(wrap(), "default")
    optimizer = torch.optim.AdamW([each for _, own in boosting.boosters() for each in (own.A, own.B)])
    for step in (4, 3):
        with pytest.raises(MethodError, match="does not hold the"):
            boosting.on_train_begin(
                TrainingArguments(str(tmp_path), use_cpu=True),
                TrainerState(global_step=step),
                None,  # type: ignore[arg-type]
                optimizer=optimizer,
            )


def test_both_trainers_take_the_same_rounds(tmp_path: Path) -> None:
    stock = wrap(steps_per_round=2)
    made = trainer(stock, tmp_path)
    made.train()
    own = wrap(steps_per_round=2)
    lean = LeanTrainer(
        own,
        args=made.args,
        train_dataset=rows(),
        data_collator=made.data_collator,  # type: ignore[arg-type]
    )
    lean.train()
    ranks = [{path: layer.booster("default").rank for path, layer in layers(each).items()} for each in (stock, own)]
    assert ranks[0] == ranks[1]
    assert_close(answer(own), answer(stock).double(), torch.float32, 4096, 64, wrong=(answer(llama()),))
