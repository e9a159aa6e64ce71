"""Files of Multi-LoRA: each holds its A, tasks meet on one model only over the same A, a later task starts from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import leantune
from leantune import MultiLoraConfig
from leantune.adapters import save
from leantune.core.errors import AdapterError, ConfigError
from leantune.methods._shared_projection import replacing_shared
from leantune.testing.closeness import assert_close, assert_differs, assert_same, assert_same_state
from leantune.testing.model import language_model
from leantune.testing.subject import no_grad_logits, own_layers, start, tokens

FILE = "adapter_model.safetensors"


def made(task: str = "cola", **options: Any) -> Any:
    options = {"r": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(language_model("llama", torch.float32), MultiLoraConfig(**options), adapter_name=task)
    # Numbers of its own for each task.
    start(model, seed=sum(map(ord, task)))
    return model.eval()


def projections(model: Any) -> dict[str, Tensor]:
    return {path: layer.shared.weight.detach().clone() for path, layer in own_layers(model).items()}


def saved(model: Any, folder: Path, task: str) -> Path:
    return save(model, folder / task, adapter_name=task)


def base() -> Any:
    return language_model("llama", torch.float32)


def alone(folder: Path) -> Tensor:
    return no_grad_logits(leantune.load(base(), folder).eval(), tokens())


def test_a_folder_alone_is_the_whole_adapter(tmp_path: Path) -> None:
    model = made()
    folder = saved(model, tmp_path, "cola")
    tensors = load_file(folder / FILE)
    assert sorted({key.partition("multi_lora_")[2] for key in tensors}) == ["B.weight", "shared.weight"]
    assert len(tensors) == 8
    # Drawn with another seed before the file is read, as another version might draw it.
    config = MultiLoraConfig.from_pretrained(folder)
    config.seed = 5
    config.save_pretrained(folder)
    assert_same(alone(folder), no_grad_logits(model, tokens()), "logits")


def test_tasks_that_were_trained_apart_meet_on_one_model(tmp_path: Path) -> None:
    folders = {task: saved(made(task), tmp_path, task) for task in ("cola", "mrpc")}
    model = leantune.load(base(), folders["cola"], adapter_name="cola")
    leantune.load(model, folders["mrpc"], adapter_name="mrpc")
    rows = no_grad_logits(model.eval(), tokens(), adapter_names=["mrpc", "cola", "mrpc"])
    exact = torch.stack([alone(folders[task])[row] for row, task in enumerate(("mrpc", "cola", "mrpc"))])
    wrong = [alone(folder).double() for folder in folders.values()]
    assert_close(rows, exact.double(), torch.float32, 64, 8, wrong=wrong, what="mixed rows")


def test_a_file_with_another_a_is_refused_by_name_and_leaves_the_model(tmp_path: Path) -> None:
    cola, other = made(), made("other", seed=1)
    folder = saved(other, tmp_path, "other")
    before, names = no_grad_logits(cola, tokens()), set(cola.state_dict())
    with pytest.raises(AdapterError, match=r"adapter 'other'.*layers\.1\.self_attn\.v_proj: another shared A than"):
        leantune.load(cola, folder, adapter_name="other")
    assert set(cola.state_dict()) == names
    assert_same(no_grad_logits(cola, tokens()), before, "logits")
    with pytest.raises(AdapterError, match="another shared A"):
        cola.load_adapter(str(folder), "second")
    assert_same(no_grad_logits(cola, tokens()), before, "logits after PEFT's own loading")
    assert_differs(alone(folder), before, "the file on a model of its own")


def test_one_layer_that_differs_is_enough(tmp_path: Path) -> None:
    folder = saved(made("mrpc"), tmp_path, "mrpc")
    tensors = load_file(folder / FILE)
    key = next(key for key in tensors if "layers.1.self_attn.q_proj.multi_lora_shared" in key)
    # One bit of one entry.
    tensors[key].view(torch.int32)[0, 0] += 1
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    with pytest.raises(AdapterError) as caught:
        leantune.load(made(), folder, adapter_name="mrpc")
    assert "layers.1.self_attn.q_proj" in str(caught.value)
    assert "layers.0" not in str(caught.value)


def test_reading_all_tasks_back_replaces_their_a(tmp_path: Path) -> None:
    """What a resumed run with a trained A does: its fresh A goes, that of the checkpoint comes."""
    trained = made(train_shared=True)
    trained.add_adapter("mrpc", trained.peft_config["cola"])
    folders = [saved(trained, tmp_path, task) for task in ("cola", "mrpc")]
    fresh = get_peft_model(base(), trained.peft_config["cola"], adapter_name="cola")
    fresh.add_adapter("mrpc", trained.peft_config["cola"])
    assert_differs(next(iter(projections(fresh).values())), next(iter(projections(trained).values())))
    with pytest.raises(AdapterError, match="another shared A"):
        fresh.load_adapter(str(folders[0]), "cola", is_trainable=True)
    with replacing_shared():
        for folder in folders:
            fresh.load_adapter(str(folder), folder.name, is_trainable=True)
    assert_same_state(projections(fresh), projections(trained))
    assert all(layer.shared.weight.requires_grad for layer in own_layers(fresh).values())


def test_a_trained_a_is_in_the_file(tmp_path: Path) -> None:
    model = made(train_shared=True)
    folder = saved(model, tmp_path, "cola")
    for lean in (False, True):
        loaded = PeftModel.from_pretrained(base(), folder, low_cpu_mem_usage=lean).eval()
        assert_same_state(projections(loaded), projections(model))
        assert_same(no_grad_logits(loaded, tokens()), no_grad_logits(model, tokens()), "logits")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = leantune.load(base(), folder, trainable=True)
    assert all(layer.shared.weight.requires_grad for layer in own_layers(again).values())


@pytest.mark.parametrize("where", ["folder", "run", "file"])
def test_a_later_task_starts_from_the_a_of_another(tmp_path: Path, where: str) -> None:
    first = made(seed=3)
    folder = saved(first, tmp_path / "first", "cola")
    if where == "run":
        (tmp_path / "run").mkdir()
        folder = folder.rename(tmp_path / "run" / "adapter").parent
    source = folder / FILE if where == "file" else folder
    late = made("late", shared_from=str(source), shared_init="activation_pca")
    assert_same_state(projections(late), projections(first))
    # Its own file has its own copy and does not ask for the other's.
    own = saved(late, tmp_path, "late")
    assert MultiLoraConfig.from_pretrained(own).shared_from is None
    assert late.peft_config["late"].shared_from == str(source)
    (folder / "adapter" if where == "run" else folder).rename(tmp_path / "gone")
    assert_same(alone(own), no_grad_logits(late, tokens()), "logits")
    leantune.load(first, own, adapter_name="late")


def test_what_cannot_start_from_there_is_refused(tmp_path: Path) -> None:
    folder = saved(made(), tmp_path, "cola")
    cases = {
        r"k_proj: no shared projection": {"target_modules": ["q_proj", "k_proj"]},
        r"q_proj: A of shape \(4, 16\); \(2, 16\); set r=4": {"r": 2},
        r"shared_from: .*nowhere: no adapter there": {"shared_from": str(tmp_path / "nowhere")},
    }
    for message, options in cases.items():
        with pytest.raises((ConfigError, AdapterError), match=message):
            made("late", **{"shared_from": str(folder), **options})
    present = made("present", seed=1)
    with pytest.raises(ConfigError, match=r"q_proj: another shared A than that of the tasks on this model"):
        present.add_adapter("late", MultiLoraConfig(r=4, target_modules=["q_proj"], shared_from=str(folder)))
    present.add_adapter("late", MultiLoraConfig(r=4, target_modules=["q_proj"]))
    (folder / FILE).write_bytes(b"torn")
    with pytest.raises(AdapterError, match="a whole safetensors file"):
        made("late", shared_from=str(folder))
    save_file({"a.weight": torch.zeros(1)}, folder / FILE)
    with pytest.raises(AdapterError, match="holds no shared projection"):
        made("late", shared_from=str(folder))


def test_a_waiting_a_is_read_from_a_file(tmp_path: Path) -> None:
    """A start from data that never comes: the file of another task brings it for both."""
    folder = saved(made("mrpc"), tmp_path, "mrpc")
    config = MultiLoraConfig(r=4, target_modules=["q_proj", "v_proj"], shared_init="activation_pca")
    model = get_peft_model(base(), config, adapter_name="cola")
    leantune.load(model, folder, adapter_name="mrpc")
    assert not any(layer.waits_for_data("cola") for layer in own_layers(model).values())
    assert_same_state(projections(model), projections(made("mrpc")))


def test_each_task_exports_to_a_lora_of_its_own(tmp_path: Path) -> None:
    model = made()
    model.add_adapter("mrpc", model.peft_config["cola"])
    start(model, "mrpc", seed=7)
    for task in ("cola", "mrpc"):
        model.set_adapter(task)
        exact = no_grad_logits(model, tokens())
        leantune.convert_to_lora(model, tmp_path / f"{task}-lora", adapter_name=task)
        lora = PeftModel.from_pretrained(base(), tmp_path / f"{task}-lora").eval()
        plain = no_grad_logits(base(), tokens()).double()
        assert_close(no_grad_logits(lora, tokens()), exact.double(), torch.float32, 64, 8, wrong=[plain], what=task)
