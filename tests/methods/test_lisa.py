"""LISA: which blocks train, that the others stand still and are forgotten, and that every block has its turn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import leantune
import tiny
from leantune import methods
from leantune.core.errors import ConfigError, MethodError
from leantune.data import Collator
from leantune.methods.lisa import BlockSampler, LISAConfig, blocks_of
from leantune.train import LeanTrainer

LAYERS = 6
LISA = methods.get("lisa")


def make_llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    options = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**options, initializer_range=0.3, tie_word_embeddings=False)).to(dtype)


def rows(count: int = 8) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 32, (count, 6), generator=generator).tolist()
    return [{"input_ids": each, "labels": each} for each in ids]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"}
    settings |= {"remove_unused_columns": False, "label_names": ["labels"], "report_to": "none", "disable_tqdm": True}
    settings |= {"use_cpu": True, "dataloader_pin_memory": False, "lr_scheduler_type": "constant"}
    return TrainingArguments(output_dir=str(folder), **{**settings, **options})


class Watch(TrainerCallback):
    """What stood where after each step: bytes of moments, which blocks changed, how far the backward went."""

    def __init__(self, model: Any) -> None:
        self.model, self.before = model, {}
        self.bytes: list[int] = []
        self.moved: list[frozenset[int]] = []
        self.steps: list[dict[int, float]] = []

    def snapshot(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

    def on_step_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self.before = self.snapshot()

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        moments = keywords["optimizer"].optimizer.state
        tensors = [each for own in moments.values() for each in own.values() if each.dim()]
        self.bytes.append(sum(each.numel() * each.element_size() for each in tensors))
        after = self.snapshot()
        changed = {name for name, value in after.items() if not torch.equal(value, self.before[name])}
        self.moved.append(frozenset(int(name.split(".")[2]) for name in changed if ".layers." in name))
        self.outside = {name for name in changed if ".layers." not in name}
        blocks = self.model.model.layers
        first = {number: next(block.parameters()) for number, block in enumerate(blocks)}
        self.steps.append({number: float(moments[each]["step"]) for number, each in first.items() if each in moments})


def train(folder: Path, config: LISAConfig, steps: int, **options: Any) -> tuple[Any, Watch, BlockSampler]:
    model = LISA.apply(make_llama(), config)
    plan = LISA.plan(model)
    watch = Watch(model)
    trainer = LeanTrainer(
        model,
        plan=plan,
        args=arguments(folder, max_steps=steps, **options),
        train_dataset=rows(),
        data_collator=Collator(0, ()),
    )
    trainer.add_callback(watch)
    trainer.train()
    return model, watch, plan.callbacks[0]


def test_the_blocks_of_a_model() -> None:
    for family in tiny.EVERY:
        model = tiny.model(family)
        assert len(blocks_of(model)) == tiny.LAYERS, family
        assert len({type(block) for block in blocks_of(model)}) == 1, family
    plain = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    assert blocks_of(plain) == [plain[0], plain[2]]


def test_the_draw_is_of_seed_and_step_alone() -> None:
    model = make_llama()
    first, again = (BlockSampler(model, LISAConfig(active_blocks=2, period=3, seed=5)) for _ in range(2))
    steps = list(range(90))
    drawn = [first.choice(step) for step in steps]
    assert [again.choice(step) for step in reversed(steps)] == drawn[::-1], "in whatever order it is asked"
    assert all(drawn[step] == drawn[step - step % 3] for step in steps)
    assert {len(each) for each in drawn} == {2}
    counts = [sum(block in each for each in drawn[::3]) for block in range(LAYERS)]
    # 30 draws of 2 in 6: ten each, with a standard deviation of 2.6; four of them.
    assert all(0 < count < 21 for count in counts)
    other = BlockSampler(model, LISAConfig(active_blocks=2, period=3, seed=6))
    assert [other.choice(step) for step in steps] != drawn


def test_every_block_has_its_turn_and_memory_stays(tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in make_llama().named_parameters()}
    model, watch, sampler = train(tmp_path, LISAConfig(active_blocks=2, period=2), 40)
    assert watch.moved == [sampler.choice(step) for step in range(40)], "what is drawn trains, and nothing else"
    assert frozenset().union(*watch.moved) == set(range(LAYERS)), "an optimizer of the first draw would step two"
    assert len(set(watch.bytes)) == 1, "moments of two blocks and what stands outside, however many were seen"
    for step, taken in enumerate(watch.steps):
        for block, count in taken.items():
            # Back to the last period in which it stood still.
            start = step - step % 2
            while start and block in sampler.choice(start - 1):
                start -= 2
            assert count == step - start + 1, "a block that comes back begins anew"
    block, outside = sum(p.numel() for p in model.model.layers[0].parameters()), 2 * 32 * 16 + 16
    assert watch.bytes[0] == 2 * 4 * (2 * block + outside)
    assert watch.outside == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_without_embeddings_the_backward_stops_at_the_lowest_block(tmp_path: Path) -> None:
    config = LISAConfig(active_blocks=2, period=1, embeddings=False, seed=1)
    lowest: list[tuple[int, int]] = []
    reached: list[int] = []

    def forward(block: int) -> Any:
        return lambda module, args, output: reached.append(block) if output.requires_grad else None

    model = LISA.apply(make_llama(), config)
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(forward(number))
    sampler = BlockSampler(model, config)
    for step in range(12):
        reached.clear()
        sampler.draw(step)
        model(input_ids=torch.tensor([rows(1)[0]["input_ids"]])).logits.sum().backward()
        lowest.append((min(reached), min(sampler.choice(step))))
        assert {name.split(".")[2] for name, each in model.named_parameters() if each.grad is not None} == {
            str(number) for number in sampler.choice(step)
        }
    assert all(found == wanted for found, wanted in lowest)
    assert len({wanted for _, wanted in lowest}) > 2
    held = {id(each) for group in sampler.groups(model, 0.1, 0.1) for each in group["params"]}
    assert id(model.lm_head.weight) not in held
    assert id(model.model.layers[0].mlp.up_proj.weight) in held


def test_several_processes_are_refused() -> None:
    sampler = BlockSampler(make_llama(), LISAConfig())
    control: Any = SimpleNamespace()
    sampler.on_init_end(SimpleNamespace(world_size=1), control, control)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="2 processes"):
        sampler.on_init_end(SimpleNamespace(world_size=2), control, control)  # type: ignore[arg-type]


def test_an_optimizer_of_the_first_draw_is_refused(tmp_path: Path) -> None:
    model = LISA.apply(make_llama(), LISAConfig(active_blocks=1, period=1))
    (sampler,) = leantune.callbacks(model)

    def trainer(**options: Any) -> Trainer:
        settings = arguments(tmp_path, max_steps=8)
        return Trainer(model, settings, Collator(0, ()), rows(), callbacks=[sampler], **options)

    with pytest.raises(MethodError, match=r"an optimizer without \d+ of the parameters that are to train"):
        trainer().train()
    groups = LISA.plan(model).parameter_groups
    assert groups is not None
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer(optimizers=(torch.optim.AdamW(groups(model, 1e-2, 0.0), lr=1e-2), None)).train()
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert len({name.split(".")[2] for name in changed if ".layers." in name}) > 2


def test_options_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"active_blocks(.|\n)*period"):
        LISAConfig(active_blocks=0, period=0)
    with pytest.raises(MethodError, match="7 of 6 blocks"):
        LISA.apply(make_llama(), LISAConfig(active_blocks=7))
    with pytest.raises(MethodError, match="without blocks"):
        LISA.apply(nn.Tanh(), LISAConfig())
