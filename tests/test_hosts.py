"""S2FT inside the tools that people already use: PEFT, transformers' Trainer, TRL; and the order of imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import tiny
from leantune import S2FTConfig
from leantune.testing.closeness import assert_differs, assert_same, assert_same_state
from leantune.testing.subject import no_grad_logits, start, trained

OPTIONS: dict[str, Any] = {"heads": 1, "channels": 3, "task_type": "CAUSAL_LM"}


def base() -> Any:
    return tiny.model("llama", torch.float32)


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    base().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter_folder(tmp_path: Path, base_folder: Path) -> Path:
    """An adapter whose config names the base folder, as after training a model that was loaded from there."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), S2FTConfig(**OPTIONS))
    start(model)
    folder = tmp_path / "adapter"
    model.save_pretrained(str(folder))
    return folder


def expected_logits() -> torch.Tensor:
    model = get_peft_model(base(), S2FTConfig(**OPTIONS)).eval()
    start(model)
    logits = no_grad_logits(model, tiny.ids())
    assert_differs(logits, no_grad_logits(base(), tiny.ids()), "logits")
    return logits


# PEFT


@pytest.mark.parametrize("lean", [False, True])
def test_from_pretrained(adapter_folder: Path, base_folder: Path, lean: bool) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base_folder)
    loaded = PeftModel.from_pretrained(plain, adapter_folder, low_cpu_mem_usage=lean).eval()
    assert_same(no_grad_logits(loaded, tiny.ids()), expected_logits(), "logits")
    assert not trained(loaded), "an adapter loaded for inference does not train"
    again = PeftModel.from_pretrained(base(), adapter_folder, is_trainable=True)
    assert trained(again)


def test_auto_peft_model_finds_base_and_method(adapter_folder: Path) -> None:
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter_folder).eval()
    assert_same(no_grad_logits(loaded, tiny.ids()), expected_logits(), "logits")


def test_auto_model_of_transformers_finds_the_adapter(adapter_folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(adapter_folder).eval()
    assert_same(no_grad_logits(loaded, tiny.ids()), expected_logits(), "logits")


# 2026-11-23: PEFT says that there are now several adapters, which is what was asked for.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_transformers_own_adapter_interface(adapter_folder: Path, base_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    plain = no_grad_logits(model, tiny.ids())
    model.load_adapter(str(adapter_folder))
    assert_same(no_grad_logits(model, tiny.ids()), expected_logits(), "logits")
    model.disable_adapters()
    assert_same(no_grad_logits(model, tiny.ids()), plain, "logits with adapters off")
    model.enable_adapters()
    model.add_adapter(S2FTConfig(heads=1, channels=2, seed=4), "other")
    model.set_adapter("other")
    assert_same(no_grad_logits(model, tiny.ids()), plain, "logits of a fresh adapter")


def test_generation(adapter_folder: Path, base_folder: Path) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(adapter_folder).eval()
    ids = tiny.ids(rows=2)
    words = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    step = ids
    for _ in range(words.shape[1] - ids.shape[1]):
        step = torch.cat([step, no_grad_logits(model, step)[:, -1:].argmax(-1)], 1)
    ended = (words == 2).cumsum(1) > 0
    assert torch.equal(words[~ended], step[~ended])


def test_generation_with_beams_and_an_adapter_for_each_row(adapter_folder: Path, base_folder: Path) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(adapter_folder).eval()
    model.add_adapter("other", S2FTConfig(heads=2, channels=4, seed=8, task_type="CAUSAL_LM"))
    start(model, "other", seed=6)
    ids = tiny.ids(rows=3)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(ids)
    alone = {"default": model.generate(input_ids=ids, **options)}
    model.set_adapter("other")
    alone["other"] = model.generate(input_ids=ids, **options)
    model.set_adapter("default")
    with model.disable_adapter():
        alone["__base__"] = model.generate(input_ids=ids, **options)
    names = ["other", "__base__", "default"]
    mixed = model.generate(input_ids=ids, adapter_names=names, **options)
    for row, name in enumerate(names):
        assert torch.equal(mixed[row], alone[name][row]), name
    assert not torch.equal(alone["default"], alone["other"])


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_classification_head_trains_and_is_saved(family: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny.model(family, torch.float32), S2FTConfig(heads=1, channels=3, task_type="SEQ_CLS"))
    assert any("classifier" in name for name in trained(model))
    optimizer = torch.optim.AdamW(trained(model).values(), lr=5e-2)
    labels = torch.tensor([0, 1, 2])
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=tiny.ids(), labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny.model(family, torch.float32), tmp_path).eval()
    assert_same(no_grad_logits(loaded, tiny.ids()), no_grad_logits(model.eval(), tiny.ids()), "logits")


# Trainer


class _Stop(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            control.should_training_stop = True


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in tiny.ids(rows=16, length=6)]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-2,
        weight_decay=0.1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
        **more,
    )


def make_trainer(folder: Path, callbacks: list[Any] | None = None, **more: Any) -> Trainer:
    model = get_peft_model(base(), S2FTConfig(**OPTIONS))
    return Trainer(
        model=model,
        args=arguments(folder, **more),
        train_dataset=rows(),  # type: ignore[arg-type]
        eval_dataset=rows(),  # type: ignore[arg-type]
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trained(model).items()}


def loss_of(model: Any) -> float:
    ids = tiny.ids(rows=16, length=6)
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def test_trainer_trains_saves_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole")
    frozen = {name: value.clone() for name, value in whole.model.state_dict().items() if "s2ft" not in name}  # type: ignore[union-attr]
    before = loss_of(whole.model)
    whole.train()
    assert loss_of(whole.model) < before - 0.1
    after = {name: value for name, value in whole.model.state_dict().items() if "s2ft" not in name}  # type: ignore[union-attr]
    assert_same_state(after, frozen, "the base after training")

    make_trainer(tmp_path / "part", callbacks=[_Stop(3)]).train()
    checkpoint = tmp_path / "part" / "checkpoint-3"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= files
    assert "model.safetensors" not in files
    resumed = make_trainer(tmp_path / "part")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 6
    assert_same_state(values(resumed.model), values(whole.model), "trained parameters, resumed and uninterrupted")
    again = make_trainer(tmp_path / "again")
    assert_differs(
        torch.cat([value.flatten() for value in values(again.model).values()]),
        torch.cat([value.flatten() for value in values(whole.model).values()]),
        "trained parameters",
    )


def test_trainer_with_checkpointing_and_the_best_model_at_the_end(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        activation_checkpointing=True,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    best = PeftModel.from_pretrained(base(), trainer.state.best_model_checkpoint).eval()
    model = trainer.model.eval()  # type: ignore[union-attr]
    assert_same(no_grad_logits(model, tiny.ids()), no_grad_logits(best, tiny.ids()), "logits of the best checkpoint")


# TRL


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{number}" for number in range(tiny.VOCABULARY - 4))]
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    )


# 2026-11-23: TRL 1.16.0 sets transformers' old name of activation checkpointing.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_sft_trainer_takes_the_config(tmp_path: Path, base_folder: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list(
        [{"prompt": f"w{number} w{number + 1}", "completion": f" w{number + 2} w{number}"} for number in range(16)]
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base_folder),
        args=SFTConfig(
            output_dir=str(tmp_path / "sft"),
            max_steps=6,
            per_device_train_batch_size=8,
            learning_rate=5e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            max_length=16,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=S2FTConfig(**OPTIONS),
    )
    before = values(trainer.model)
    assert all("s2ft_slice" in name for name in before)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "out"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_same(no_grad_logits(loaded, tiny.ids()), no_grad_logits(trainer.model.eval(), tiny.ids()), "logits")


# Imports


def run(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


_LOAD = "peft.PeftConfig.from_pretrained({folder!r})"


def test_methods_are_registered_in_whichever_order_the_imports_come(adapter_folder: Path) -> None:
    load = _LOAD.format(folder=str(adapter_folder))
    # Together: each process takes seconds to import torch.
    running = {
        "leantune first": run(f"import leantune, peft; print(type({load}).__name__)"),
        # A method's file in its author's hands: the first import is that of a base class.
        "a base class first": run(f"import leantune.methods._base, peft; print(type({load}).__name__)"),
        "peft first": run(
            "import peft\n"
            f"try: {load}\n"
            "except KeyError as error: print('unknown', error)\n"
            f"import leantune; print(type({load}).__name__)"
        ),
    }
    said = {}
    for order, process in running.items():
        out, error = process.communicate()
        assert process.returncode == 0, f"{order}\n{error}"
        said[order] = out.split("\n")
    assert said["leantune first"] == said["a base class first"] == ["S2FTConfig", ""]
    # Stock PEFT alone does not know the method; the model card and leantune.load tell what to import.
    assert said["peft first"] == ["unknown 'S2FT'", "S2FTConfig", ""]


_HOOK = """
import sys, types
sys.path.insert(0, sys.argv[1])
before = list(sys.meta_path)
import leantune
calls = []
methods = types.ModuleType("leantune.methods")
methods.names = lambda: calls.append("peft" in sys.modules and hasattr(sys.modules["peft"], "get_peft_model"))
sys.modules["leantune.methods"] = methods
import peft
import peft.inner
import importlib.resources
print(calls, sys.meta_path == before, type(peft.__loader__).__name__, type(peft.__spec__.loader).__name__)
print(importlib.reload(peft) is peft, importlib.resources.files("peft").name, calls)
"""


def test_the_hook_registers_once_and_leaves_peft_as_it_is(tmp_path: Path) -> None:
    """With a stand-in for PEFT, which takes seconds to import."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("def get_peft_model(): pass\n", encoding="utf-8")
    (tmp_path / "peft" / "inner.py").write_text("", encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", _HOOK, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[True] True SourceFileLoader SourceFileLoader", "True peft [True]"], (
        done.stderr
    )


def test_importing_leantune_alone_is_light() -> None:
    heavy = "[m for m in ('torch', 'peft', 'transformers', 'numpy') if m in sys.modules]"
    out, error = run(f"import sys, leantune; print({heavy})").communicate()
    assert out.strip() == "[]", error
