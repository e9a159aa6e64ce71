"""Checks of the adapter file: saved and loaded, here and in a fresh process; and of the LoRA form."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from leantune.adapters.layer import adapted_modules, delta_weight, lora_factors
from leantune.testing.closeness import assert_close, assert_differs, assert_same, assert_same_state
from leantune.testing.subject import Subject, Wrapped, layers_of, no_grad_logits, only_when, tokens


def _same_output(model: Wrapped, loaded: Wrapped, plain: Tensor) -> None:
    expected = no_grad_logits(model, tokens())
    assert_differs(expected, plain, "logits of the started model")
    assert_same(no_grad_logits(loaded, tokens()), expected, "logits after loading")


def save_and_load(subject: Subject) -> None:
    """A saved adapter loads to the same bits, with and without ``low_cpu_mem_usage``, under another name too."""
    plain = no_grad_logits(subject.base(torch.float32), tokens())
    model = subject.wrap(subject.base(torch.float32))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if not subject.method.is_adapter:
            loaded = type(model).from_pretrained(folder).eval()
            _same_output(model, loaded, plain)
            return
        expected = get_peft_model_state_dict(model)
        for lean in (False, True):
            loaded = PeftModel.from_pretrained(subject.base(torch.float32), folder, low_cpu_mem_usage=lean).eval()
            assert_same_state(get_peft_model_state_dict(loaded), expected, "adapter state")
            _same_output(model, loaded, plain)
        other = PeftModel.from_pretrained(subject.base(torch.float32), folder, adapter_name="other").eval()
        _same_output(model, other, plain)
        again = subject.wrap(subject.base(torch.float32), started=False)
        again.load_adapter(folder, "second")
        again.set_adapter("second")
        _same_output(model, again.eval(), plain)


def save_and_load_over_bfloat16(subject: Subject) -> None:
    """Over a bfloat16 base the file keeps every bit of the float32 adapter."""
    only_when(subject.method.is_adapter, "the method saves a whole model")
    plain = no_grad_logits(subject.base(torch.bfloat16), tokens())
    model = subject.wrap(subject.base(torch.bfloat16))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(subject.base(torch.bfloat16), folder).eval()
        assert_same_state(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model), "adapter state")
        _same_output(model, loaded, plain)


def save_and_load_modules_to_save(subject: Subject) -> None:
    """A module trained whole beside the adapter is in the file."""
    only_when(subject.method.is_adapter, "the method saves a whole model")
    model = subject.wrap(subject.base(torch.float32), modules_to_save=["lm_head"])
    plain = no_grad_logits(subject.wrap(subject.base(torch.float32)), tokens())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _same_output(model, PeftModel.from_pretrained(subject.base(torch.float32), folder).eval(), plain)


def file_holds_the_adapter_alone(subject: Subject) -> None:
    """The adapter file is safetensors and holds no weight of the base."""
    only_when(subject.method.is_adapter, "the method saves a whole model")
    base = subject.base(torch.float32)
    weights = {name: value.detach().clone() for name, value in base.named_parameters()}
    model = subject.wrap(base)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        names = {path.name for path in Path(folder).iterdir()} - {"README.md"}
        if names != {"adapter_config.json", "adapter_model.safetensors"}:
            raise AssertionError(f"the adapter folder holds {sorted(names)}")
        for name, value in load_file(Path(folder) / "adapter_model.safetensors").items():
            plain = name.removeprefix("base_model.model.")
            if plain in weights or "base_layer" in name or "_original_" in name:
                raise AssertionError(f"{name}: a weight of the base in the adapter file")
            if any(value.shape == weight.shape and torch.equal(value, weight) for weight in weights.values()):
                raise AssertionError(f"{name}: a copy of a base weight in the adapter file")


def config_survives_its_file(subject: Subject) -> None:
    """The config written to a folder and read again has every field as it was, and is JSON."""
    only_when(subject.method.is_adapter, "the method has no config file")
    model = subject.wrap_perceptron()
    config = model.peft_config["default"]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        read = type(config).from_pretrained(folder)
    # Saving marks the copy in the file as one for inference.
    for field in dataclasses.fields(config):
        before, after = getattr(config, field.name), getattr(read, field.name)
        if field.name != "inference_mode" and before != after:
            raise AssertionError(f"{field.name}: {before!r} became {after!r}")


def options_explain_themselves(subject: Subject) -> None:
    """Every option of the method carries its help text."""
    from peft import PeftConfig

    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    for field in dataclasses.fields(subject.method.config):
        if field.name not in inherited and field.init and not field.metadata.get("help"):
            raise AssertionError(f"{subject.method.config.__name__}.{field.name}: no metadata['help']")


def lora_form_equals_the_delta(subject: Subject) -> None:
    """``B A`` of each layer is its delta, and a stock PEFT LoRA with these factors is the same model."""
    only_when(subject.method.lora_form, "the method has no exact LoRA form")
    base = subject.base()
    plain = no_grad_logits(base, tokens())
    model = subject.wrap(base)
    factors = {path: lora_factors(path, layer, "default") for path, layer in adapted_modules(model, "default")}
    for path, layer in adapted_modules(model, "default"):
        B, A = factors[path]
        assert_close(B @ A, delta_weight(layer, "default").double(), torch.float64, 4, 1, what=f"{path}, B A")
    lora = _stock_lora(subject.base(), factors)
    exact = no_grad_logits(model, tokens())
    assert_close(no_grad_logits(lora, tokens()), exact, torch.float64, 64, 8, wrong=(plain,), what="LoRA logits")


def _stock_lora(base: nn.Module, factors: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    ranks = {path: A.shape[0] for path, (_, A) in factors.items()}
    top = max(ranks.values())
    config = LoraConfig(
        r=top,
        lora_alpha=top,
        # Anchored: a bare path would also match one that ends with it.
        target_modules="|".join(path.replace(".", r"\.") for path in ranks),
        rank_pattern={f"^{path}": rank for path, rank in ranks.items()},
        alpha_pattern={f"^{path}": rank for path, rank in ranks.items()},
        fan_in_fan_out=any(type(base.get_submodule(path)).__name__ == "Conv1D" for path in ranks),
        task_type="CAUSAL_LM",
    )
    lora = get_peft_model(base, config)
    with torch.no_grad():
        for path, layer in layers_of(lora).items():
            B, A = factors[path]
            layer.lora_A["default"].weight.copy_(A)
            layer.lora_B["default"].weight.copy_(B)
    return lora.eval()


def write_fresh_case(subject: Subject, folder: Path) -> None:
    """Write what a fresh process needs to load this subject's adapter, and what it must then compute."""
    base: Any = subject.base(torch.float32)
    base.save_pretrained(folder / "base")
    ids = tokens()
    plain = no_grad_logits(base, ids)
    model = subject.wrap(base)
    expected = no_grad_logits(model, ids)
    assert_differs(expected, plain, "logits of the started model")
    model.save_pretrained(folder / "saved")
    save_file({"ids": ids, "logits": expected}, folder / "expected.safetensors")
    facts = {"is_adapter": subject.method.is_adapter, "module": subject.method.config.__module__}
    (folder / "case.json").write_text(json.dumps(facts), encoding="utf-8")


def read_fresh_case(folder: Path) -> None:
    """Load a written case as a user would, and compare; runs in the fresh process."""
    import importlib

    from transformers import AutoModelForCausalLM

    facts: dict[str, Any] = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    importlib.import_module(facts["module"])
    case = load_file(folder / "expected.safetensors")
    where = "base" if facts["is_adapter"] else "saved"
    model: Wrapped = AutoModelForCausalLM.from_pretrained(folder / where)
    if facts["is_adapter"]:
        model = PeftModel.from_pretrained(model, folder / "saved")
    assert_same(no_grad_logits(model.eval(), case["ids"]), case["logits"], f"{folder.name}, logits in a fresh process")


_FRESH = """
import json, sys
from pathlib import Path
told = json.loads(sys.argv[1])
sys.path[:] = told["path"]
import leantune
import torch
torch.set_num_threads(told["threads"])
from leantune.testing.file import read_fresh_case
for folder in told["folders"]:
    read_fresh_case(Path(folder))
print("compared", len(told["folders"]))
"""


def run_fresh_process(folders: Iterable[Path]) -> None:
    """Read written cases in one fresh process; raise with its error text when one of them fails."""
    listed = [str(folder) for folder in folders]
    told = {"path": sys.path, "threads": torch.get_num_threads(), "folders": listed}
    done = subprocess.run([sys.executable, "-c", _FRESH, json.dumps(told)], capture_output=True, text=True, check=False)
    if done.returncode != 0 or f"compared {len(listed)}" not in done.stdout:
        raise AssertionError(f"in a fresh process:\n{done.stderr[-3000:]}")


def load_in_a_fresh_process(subject: Subject) -> None:
    """What was saved gives the same bits in a process that has never seen the training."""
    with tempfile.TemporaryDirectory() as folder:
        write_fresh_case(subject, Path(folder))
        run_fresh_process([Path(folder)])


CHECKS = [
    save_and_load,
    save_and_load_over_bfloat16,
    save_and_load_modules_to_save,
    file_holds_the_adapter_alone,
    config_survives_its_file,
    options_explain_themselves,
    lora_form_equals_the_delta,
    load_in_a_fresh_process,
]
