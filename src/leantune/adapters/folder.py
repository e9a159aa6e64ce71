"""The adapter folder: written whole or not at all, and verified before it is believed.

``load`` is ``PeftModel.from_pretrained`` with the questions asked first: is the config readable, is the method known,
is every tensor there, of the right shape and finite, and is this the base model it was trained on.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from leantune import __version__, methods
from leantune.adapters import card as model_card
from leantune.adapters import factor_file, record, verification
from leantune.adapters import layer as layers
from leantune.adapters.restoration import native_errors
from leantune.core.atomic import new_folder, recover, write_text
from leantune.core.errors import AdapterError, LeantuneError, describe, did_you_mean, raise_all
from leantune.methods._factor_file import STORED, in_file
from leantune.methods._initialization import start_from_file

if TYPE_CHECKING:
    from leantune.models import BaseModel

TASKS_NAME = "tasks.json"
"""In the folder of a run's adapters: which tasks there are."""


def save(
    model: PeftModel,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    base: BaseModel | None = None,
    tokenizer: Any = None,
    card: dict[str, Any] | None = None,
    state_dict: dict[str, Any] | None = None,
    factors: str = STORED,
) -> Path:
    """Write one adapter as a folder that stock PEFT reads; an older adapter folder there is replaced in one step.

    Args:
        model: the model with the adapter.
        folder: where to; always flat, whatever the adapter is called.
        adapter_name: which of the model's adapters.
        base: the base it was trained on; its content hash is stored and checked when loading.
        tokenizer: saved beside it with its chat template, so that serving sees what training saw.
        card: extra parts of the model card, see :func:`leantune.adapters.card.render`.
        state_dict: the model's state in whole tensors, where the model itself is sharded over processes.
        factors: where the frozen factors of ``lora-xs`` and ``lora-sb`` go: ``"stored"`` here; ``"recomputed"``
            nowhere, to be decomposed from the base weights again (``lora-xs`` alone); ``"shared"`` in a file above
            the folder, once for all adapters that have the same.

    Raises:
        AdapterError: the adapter holds a value that is not finite, or ``folder`` holds something else.
    """
    target = Path(folder)
    factor_file.require_form(factors)
    if adapter_name not in model.peft_config:
        near = did_you_mean(adapter_name, model.peft_config)
        raise AdapterError(describe(f"adapter '{adapter_name}'", "not on this model", near, "pass adapter_name=..."))
    recover(target)
    if target.is_dir() and any(target.iterdir()) and not (target / verification.CONFIG_NAME).exists():
        raise AdapterError(
            describe(str(target), "a folder of other files", "a new, empty or adapter folder", "choose another name")
        )
    with new_folder(target) as temporary:
        with native_errors(target):
            _write(model, temporary, adapter_name, state_dict)
        problems = verification.not_finite(verification.read_tensors(temporary))
        if problems:
            raise_all([f"{problem} (training diverged: lower the learning rate)" for problem in problems], AdapterError)
        if tokenizer is not None:
            with native_errors(target):
                tokenizer.save_pretrained(temporary)
        facts = describe_adapter(model, adapter_name, base)
        if factors != STORED:
            with native_errors(target):
                facts |= factor_file.shrink(model, temporary, adapter_name, factors)
        record.write(temporary, facts)
        if said := factor_file.section(facts):
            card = {**(card or {}), "sections": {**((card or {}).get("sections") or {}), **said}}
        write_text(temporary / "README.md", model_card.render(facts, card))
    return target


def _write(model: PeftModel, folder: Path, adapter_name: str, state_dict: dict[str, Any] | None) -> None:
    # Base weights never enter an adapter file, so embeddings are not saved "to be sure"; that also spares PEFT's
    # question to the Hub whether the vocabulary was resized.
    model.save_pretrained(
        str(folder), selected_adapters=[adapter_name], save_embedding_layers=False, state_dict=state_dict
    )
    nested = folder / adapter_name
    if adapter_name != "default" and nested.is_dir():
        for path in nested.iterdir():
            shutil.move(str(path), str(folder / path.name))
        nested.rmdir()


def describe_adapter(model: PeftModel, adapter_name: str, base: BaseModel | None) -> dict[str, Any]:
    """The record of an adapter: method, base, how much of the targeted weights it trains."""
    config = model.peft_config[adapter_name]
    modules = layers.adapted_modules(model, adapter_name)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    # Frozen factors are in the file and do not train.
    frozen = {buffer.data_ptr() for buffer in model.buffers() if buffer.numel()}
    trained = [tensor for tensor in state.values() if tensor.is_floating_point() and tensor.data_ptr() not in frozen]
    parameters = sum(tensor.numel() for tensor in trained)
    target_weights = sum(out * into for out, into in (layers.shape_of(module) for _, module in modules))
    return {
        "leantune": __version__,
        "kind": "adapter",
        "method": method_name(config),
        "peft_type": str(getattr(config.peft_type, "value", config.peft_type)),
        "task_type": task_type(model, config),
        "task": task_of(model.get_base_model()),
        "base": record.base_facts(base, model.get_base_model()),
        **_head(model, config),
        "parameters": parameters,
        "target_weights": target_weights,
        "achieved_ratio": getattr(config, "achieved_ratio", None),
        "modules": len(modules),
    }


def _head(model: PeftModel, config: PeftConfig) -> dict[str, Any]:
    if task_type(model, config) != "SEQ_CLS" and task_of(model.get_base_model()) != "image-classification":
        return {}
    base_config: Any = model.get_base_model().config
    return {"num_labels": base_config.num_labels, "problem_type": base_config.problem_type}


def task_of(model: nn.Module) -> str | None:
    """Our name of the task that a base model answers, by its class; None for a kind that no task here has."""
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        config: Any = model.config
        is_number = config.problem_type == "regression" or config.num_labels == 1
        return "regression" if is_number else "classification"
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "causal-lm"
    endings = {"ForMaskedLM": "masked-lm", "ForImageClassification": "image-classification"}
    return next((task for ending, task in endings.items() if name.endswith(ending)), None)


def task_type(model: PeftModel, config: PeftConfig) -> str | None:
    """PEFT's name of the task: as configured, else ``CAUSAL_LM`` where the base is a causal language model."""
    if config.task_type:
        return str(getattr(config.task_type, "value", config.task_type))
    name = type(model.get_base_model()).__name__
    return "CAUSAL_LM" if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else None


def method_name(config: PeftConfig) -> str:
    """Our name of the method that a config belongs to, or PEFT's name in lower case."""
    try:
        return methods.of_config(config).name
    except LeantuneError:
        return str(getattr(config.peft_type, "value", config.peft_type)).lower()


def no_change_of_weights(config: PeftConfig) -> str:
    """Why an adapter of this config can neither be merged nor be a LoRA; empty where it can."""
    try:
        method = methods.of_config(config)
    except LeantuneError:
        return f"{method_name(config)} is no change of weights" if config.is_prompt_learning else ""
    return "" if method.mergeable else method.cannot_merge or f"{method.name} is no change of weights"


def load(
    base_model: nn.Module | BaseModel | str | None,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    trainable: bool = False,
    force: bool = False,
    verify_base: bool = True,
) -> PeftModel:
    """``PeftModel.from_pretrained`` with every doubt cleared first.

    Args:
        base_model: the base, a model that already carries adapters, a name for :func:`leantune.load_base`, or
            ``None`` for the base that the adapter's record names.
        folder: an adapter folder, a run folder, or a Hub id.
        adapter_name: the name it gets on the model.
        trainable: whether it goes on training.
        force: load although the base differs from the one it was trained on (a warning then, not an error).
        verify_base: compare the base's content hash with the recorded one (about a second for two gigabytes).

    Raises:
        AdapterError: every problem of the folder at once, keys named; the base is left as it was.
    """
    path = resolve(folder)
    base = recorded_base(path, base_model) if base_model is None or isinstance(base_model, str) else base_model
    model, known_hash = (base, None) if isinstance(base, nn.Module) else (base.model, base.content_hash)
    difference = verification.base_difference(path, model, known_hash) if verify_base else None
    problems = [difference] if difference and not force else []
    if difference and force:
        warnings.warn(difference, stacklevel=2)
    return attach(model, path, adapter_name=adapter_name, trainable=trainable, problems=problems)


def attach(
    model: nn.Module,
    path: Path,
    *,
    adapter_name: str = "default",
    trainable: bool = False,
    plain_layout: bool = False,
    problems: Sequence[str] = (),
) -> PeftModel:
    """Put the adapter of a local folder on a base and verify all but the base itself.

    Args:
        model: the base; left as it was when anything is wrong.
        path: an adapter folder.
        adapter_name: the name it gets.
        trainable: whether it goes on training.
        plain_layout: leave the base's weights in the checkpoint's order, even for a method that may reorder them.
        problems: found already, to be reported together with those found here.
    """
    config = verification.read_config(path)
    tensors = verification.read_tensors(path)
    found = [*problems, *verification.not_finite(tensors)]
    config.inference_mode = not trainable
    if plain_layout and getattr(config, "permute", False):
        config.permute = False  # type: ignore[attr-defined]
    undo = _Undo(model, adapter_name)
    try:
        with start_from_file():
            wrapped = undo.wrapped = _wrap(model, config, adapter_name, path)
            expected = get_peft_model_state_dict(wrapped, adapter_name=adapter_name, save_embedding_layers=False)
        expected = in_file(wrapped, config, adapter_name, expected, tensors)
        found += verification.key_problems(expected, tensors, wrapped, adapter_name, path)
        raise_all(found, AdapterError)
        wrapped.load_adapter(str(path), adapter_name=adapter_name, is_trainable=trainable)
        raise_all(verification.wrong_indices(wrapped, adapter_name, path), AdapterError)
    except BaseException:
        undo()
        raise
    if trainable and wrapped is model:
        wrapped.set_requires_grad(adapter_name)
    return wrapped


def recorded_base(path: Path, name: str | None = None, *, packed: bool = True) -> BaseModel:
    """The base model that an adapter's record names, loaded as it was for training.

    Args:
        path: an adapter folder.
        name: another place of the same base.
        packed: quantised as it was for training; False loads it before quantisation.

    Raises:
        AdapterError: the folder names no base.
    """
    from leantune.models import load_base

    known = record.read(path)
    facts = known.get("base") or {}
    config = verification.read_config(path)
    found = name or facts.get("name") or config.base_model_name_or_path
    if not found:
        raise AdapterError(describe(str(path), "does not name its base model", "one", "name the base model"))
    options: dict[str, Any] = {"dtype": facts.get("dtype") or "float32"}
    if name is None and facts.get("revision"):
        options["revision"] = facts["revision"]
    how = facts.get("quantization")
    if how and packed:
        options |= {"quantization": f"{how['bits']}bit", "quantization_backend": how["backend"]}
    if known.get("task") == "masked-lm":
        options["task"] = "masked-lm"
    elif known.get("task") == "image-classification":
        options |= {"task": "image-classification", "num_labels": known.get("num_labels")}
    elif (known.get("task_type") or config.task_type) == "SEQ_CLS":
        if known.get("problem_type") == "regression":
            options["task"] = "regression"
        else:
            options |= {"task": "classification", "num_labels": known.get("num_labels")}
    return load_base(str(found), **options)


class _Undo:
    """Takes a half-loaded adapter off its base again."""

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.model = model
        self.adapter_name = adapter_name
        self.wrapped: PeftModel | None = None
        self.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self.training = model.training
        self.had = set(getattr(model, "peft_config", {}))

    def __call__(self) -> None:
        if isinstance(self.model, PeftModel):
            if self.adapter_name in self.model.peft_config and self.adapter_name not in self.had:
                self.model.delete_adapter(self.adapter_name)
        elif self.wrapped is not None and not self.wrapped.active_peft_config.is_prompt_learning:
            self.wrapped.unload()
        else:
            layers.strip(self.model)
            if hasattr(self.model, "peft_config"):
                del self.model.peft_config
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.requires_grad[name])
        self.model.train(self.training)


def _wrap(model: nn.Module, config: PeftConfig, adapter_name: str, path: Path) -> PeftModel:
    try:
        if isinstance(model, PeftModel):
            if adapter_name in model.peft_config:
                where = f"adapter '{adapter_name}'"
                raise AdapterError(describe(where, "already on this model", "a new name", "pass adapter_name=..."))
            model.add_adapter(adapter_name, config)
            return model
        wrapper = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(config.task_type or ""), PeftModel)
        return wrapper(model, config, adapter_name)
    except AdapterError:
        raise
    except (LeantuneError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise AdapterError(
            describe(
                str(path),
                f"does not fit {type(model).__name__} ({error})",
                "the base model it was trained on",
                "load that base, or check target_modules in adapter_config.json",
            )
        ) from error


def resolve(folder: str | Path) -> Path:
    """The local adapter folder behind a path, a run folder or a Hub id.

    Raises:
        AdapterError: there is none.
    """
    path = Path(folder)
    for candidate in (path, path / "adapter"):
        recover(candidate)
        if (candidate / verification.CONFIG_NAME).is_file():
            return candidate
    tasks = tasks_of(path)
    if tasks:
        got = f"holds the adapters of {len(tasks)} tasks ({', '.join(tasks)})"
        raise AdapterError(describe(str(path), got, "one of them", "name it: --adapter TASK, or give its own folder"))
    if path.is_dir():
        names = ", ".join(sorted(entry.name for entry in path.iterdir())[:12]) or "nothing"
        wanted = f"an adapter ({verification.CONFIG_NAME})"
        raise AdapterError(describe(str(path), f"holds {names}", wanted, "give the adapter's folder"))
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        return _download(str(folder))
    raise AdapterError(describe(str(path), "not a folder", "an adapter or run folder, or a Hub id", "check the path"))


def tasks_of(run: Path) -> dict[str, Path]:
    """The adapter folders of a run with several tasks, by task; empty for any other folder."""
    root = next((each for each in (run / "adapter", run) if (each / TASKS_NAME).is_file()), None)
    if root is None:
        return {}
    return {path.name: path for path in sorted(root.iterdir()) if (path / verification.CONFIG_NAME).is_file()}


def of_task(run: str | Path, task: str | None) -> str | Path:
    """The adapter folder of one of a run's tasks; what was given when no task is named.

    Raises:
        AdapterError: the run has no such task.
    """
    if task is None:
        return run
    found = tasks_of(Path(run))
    if task not in found:
        near = did_you_mean(task, found) if found else "a run with several tasks"
        raise AdapterError(describe(str(run), f"no adapter of a task '{task}'", near, "choose one, or leave it out"))
    return found[task]


def run_of(adapter: Path) -> Path | None:
    """The run folder that an adapter folder (or one task of it) belongs to, by its place; None without one."""
    above = next((each for each in (adapter, adapter.parent) if each.name == "adapter"), None)
    return above.parent if above is not None else None


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Text and safetensors alone: a pickle is not even fetched.
        path = Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.md", "*.jinja", "*.txt"]))
    except Exception as error:
        raise AdapterError(
            describe(
                hub_id,
                f"neither a local folder nor found on the Hub ({type(error).__name__})",
                "an adapter folder or a Hub id",
                "check the spelling and the connection",
            )
        ) from error
    if not (path / verification.CONFIG_NAME).is_file():
        raise AdapterError(describe(hub_id, f"has no {verification.CONFIG_NAME}", "an adapter", "check the Hub id"))
    # Beside a plain LoRA for everyone, a push of ours has the adapter as it was trained.
    native = path / "native"
    return native if (native / verification.CONFIG_NAME).is_file() else path
