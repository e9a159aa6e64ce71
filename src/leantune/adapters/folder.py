"""The adapter folder: written whole or not at all, and verified before it is believed.

``load`` is ``PeftModel.from_pretrained`` with the questions asked first: is the config readable, is the method known,
is every tensor there, of the right shape and finite, and is this the base model it was trained on.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from leantune import __version__, methods
from leantune.adapters import card as model_card
from leantune.adapters import layer as layers
from leantune.adapters import record
from leantune.core.atomic import new_folder, recover, write_text
from leantune.core.errors import AdapterError, LeantuneError, describe, did_you_mean, raise_all

if TYPE_CHECKING:
    from leantune.models import BaseModel

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


def save(
    model: PeftModel,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    base: BaseModel | None = None,
    tokenizer: Any = None,
    card: dict[str, Any] | None = None,
) -> Path:
    """Write one adapter as a folder that stock PEFT reads; an older adapter folder there is replaced in one step.

    Args:
        model: the model with the adapter.
        folder: where to; always flat, whatever the adapter is called.
        adapter_name: which of the model's adapters.
        base: the base it was trained on; its content hash is stored and checked when loading.
        tokenizer: saved beside it with its chat template, so that serving sees what training saw.
        card: extra parts of the model card, see :func:`leantune.adapters.card.render`.

    Raises:
        AdapterError: the adapter holds a value that is not finite, or ``folder`` holds something else.
    """
    target = Path(folder)
    if adapter_name not in model.peft_config:
        near = did_you_mean(adapter_name, model.peft_config)
        raise AdapterError(describe(f"adapter '{adapter_name}'", "not on this model", near, "pass adapter_name=..."))
    recover(target)
    if target.is_dir() and any(target.iterdir()) and not (target / CONFIG_NAME).exists():
        raise AdapterError(
            describe(str(target), "a folder of other files", "a new, empty or adapter folder", "choose another name")
        )
    with new_folder(target) as temporary:
        _write(model, temporary, adapter_name)
        problems = _not_finite(read_tensors(temporary))
        if problems:
            raise_all([f"{problem} (training diverged: lower the learning rate)" for problem in problems], AdapterError)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        facts = describe_adapter(model, adapter_name, base)
        record.write(temporary, facts)
        write_text(temporary / "README.md", model_card.render(facts, card))
    return target


def _write(model: PeftModel, folder: Path, adapter_name: str) -> None:
    # Base weights never enter an adapter file, so embeddings are not saved "to be sure"; that also spares PEFT's
    # question to the Hub whether the vocabulary was resized.
    model.save_pretrained(str(folder), selected_adapters=[adapter_name], save_embedding_layers=False)
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
    parameters = sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
    target_weights = sum(out * into for out, into in (layers.shape_of(module) for _, module in modules))
    return {
        "leantune": __version__,
        "kind": "adapter",
        "method": method_name(config),
        "peft_type": str(getattr(config.peft_type, "value", config.peft_type)),
        "task_type": task_type(model, config),
        "base": record.base_facts(base, model.get_base_model()),
        "parameters": parameters,
        "target_weights": target_weights,
        "achieved_ratio": getattr(config, "achieved_ratio", None),
        "modules": len(modules),
    }


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
    config = read_config(path)
    tensors = read_tensors(path)
    problems = _not_finite(tensors)
    known = record.read(path).get("base") or {}
    model, given_hash = _base_module(base_model, known, path)
    difference = _base_difference(path, known, model, given_hash) if verify_base else None
    if difference:
        if force:
            warnings.warn(difference, stacklevel=2)
        else:
            problems.append(difference)
    config.inference_mode = not trainable
    undo = _Undo(model, adapter_name)
    try:
        wrapped = _wrap(model, config, adapter_name, path)
        expected = get_peft_model_state_dict(wrapped, adapter_name=adapter_name, save_embedding_layers=False)
        problems += _differences(expected, tensors, wrapped, path)
        raise_all(problems, AdapterError)
        wrapped.load_adapter(str(path), adapter_name=adapter_name, is_trainable=trainable)
        raise_all(_wrong_indices(wrapped, adapter_name, path), AdapterError)
    except BaseException:
        undo()
        raise
    if trainable and wrapped is model:
        wrapped.set_requires_grad(adapter_name)
    return wrapped


class _Undo:
    """Takes a half-loaded adapter off its base again."""

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.model = model
        self.adapter_name = adapter_name
        self.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self.training = model.training
        self.had = set(getattr(model, "peft_config", {}))

    def __call__(self) -> None:
        if isinstance(self.model, PeftModel):
            if self.adapter_name in self.model.peft_config and self.adapter_name not in self.had:
                self.model.delete_adapter(self.adapter_name)
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
    except LeantuneError as error:
        raise error if isinstance(error, AdapterError) else AdapterError(f"{path}: {error}") from error
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
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
        if (candidate / CONFIG_NAME).is_file():
            return candidate
    if path.is_dir():
        names = ", ".join(sorted(entry.name for entry in path.iterdir())[:12]) or "nothing"
        raise AdapterError(
            describe(str(path), f"holds {names}", f"an adapter folder with {CONFIG_NAME}", "give the adapter's folder")
        )
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        return _download(str(folder))
    raise AdapterError(describe(str(path), "not a folder", "an adapter or run folder, or a Hub id", "check the path"))


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
    if not (path / CONFIG_NAME).is_file():
        raise AdapterError(describe(hub_id, f"has no {CONFIG_NAME}", "an adapter", "check the Hub id"))
    return path


def read_config(folder: Path) -> PeftConfig:
    """The config of an adapter folder.

    Raises:
        AdapterError: unreadable, or of a method that nobody registered.
    """
    methods.names()
    path = folder / CONFIG_NAME
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(
            describe(str(path), f"cannot be read ({error.strerror})", "the adapter's config", "copy the folder again")
        ) from error
    except ValueError as error:
        raise AdapterError(
            describe(str(path), f"not JSON ({error})", "the adapter's config", "copy the folder again")
        ) from error
    peft_type = value.get("peft_type") if isinstance(value, dict) else None
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = [str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING]
        raise AdapterError(
            describe(
                str(path),
                f"peft_type {peft_type!r} is a method that nothing here knows",
                did_you_mean(str(peft_type).upper(), known),
                "import the package that registers it, or update leantune and peft",
            )
        )
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, LeantuneError) as error:
        raise AdapterError(describe(str(path), str(error), f"a config of {peft_type}", "mend that field")) from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an adapter folder, by its key.

    Raises:
        AdapterError: no safetensors file, only a pickle, or a torn file.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        if (folder / PICKLE_NAME).exists():
            raise AdapterError(
                describe(
                    str(folder / PICKLE_NAME),
                    "a pickle, which can run code when it is read",
                    WEIGHTS_NAME,
                    "convert it where you trust it: load it with torch.load(weights_only=True), save as safetensors",
                )
            )
        raise AdapterError(describe(str(path), "missing", "the adapter's tensors", "copy the folder again"))
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        raise AdapterError(
            describe(str(path), f"torn or no safetensors file ({size} bytes: {error})", "a whole one", "copy it again")
        ) from error


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    problems = []
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            problems.append(describe(key, f"{bad} of {tensor.numel()} values are not finite", "numbers", "train again"))
    return problems


def _differences(
    expected: dict[str, Tensor], found: dict[str, Tensor], model: PeftModel, path: Path
) -> list[str]:
    problems = []
    weights = path / WEIGHTS_NAME
    for key, tensor in expected.items():
        got = found.get(key)
        if got is None:
            near = did_you_mean(key, [name for name in found if name not in expected]) if len(found) < 2000 else ""
            hint = near if near.startswith("did") else "save the adapter again"
            problems.append(describe(f"{weights}: {key}", "missing", f"shape {tuple(tensor.shape)}", hint))
        elif got.shape != tensor.shape:
            problems.append(
                describe(
                    f"{weights}: {key}",
                    f"shape {tuple(got.shape)}",
                    f"{tuple(tensor.shape)} on this base",
                    "load the base it was trained on",
                )
            )
        elif got.is_floating_point() != tensor.is_floating_point():
            problems.append(describe(f"{weights}: {key}", f"{got.dtype}", f"{tensor.dtype}", "save the adapter again"))
    base_keys = set(model.state_dict())
    for key in found:
        if key not in expected:
            kind = "a weight of the base model" if key in base_keys else "belongs to no module of this adapter"
            problems.append(describe(f"{weights}: {key}", kind, "the adapter's own tensors", "remove it from the file"))
    return problems


def _wrong_indices(model: PeftModel, adapter_name: str, path: Path) -> list[str]:
    """Stored indices must name entries that exist, each once: a wrong one would change another weight, silently."""
    problems = []
    for name, module in layers.adapted_modules(model, adapter_name):
        if not hasattr(module, "delta_region"):
            continue
        _, dim, index = module.delta_region(adapter_name)
        if dim is None or index is None or not index.numel():
            continue
        size = layers.shape_of(module)[dim]
        low, high = int(index.min()), int(index.max())
        where = f"{path / WEIGHTS_NAME}: indices of {name}"
        if low < 0 or high >= size:
            problems.append(describe(where, f"{low} to {high}", f"0 to {size - 1}", "save the adapter again"))
        elif index.unique().numel() != index.numel():
            problems.append(describe(where, "an entry twice", "each entry once", "save the adapter again"))
    return problems


def _base_module(
    base_model: nn.Module | BaseModel | str | None, known: dict[str, Any], path: Path
) -> tuple[nn.Module, str | None]:
    if isinstance(base_model, nn.Module):
        return base_model, None
    if base_model is None or isinstance(base_model, str):
        name = base_model or known.get("name")
        if not name:
            raise AdapterError(describe(str(path), "does not name its base model", "one", "pass the base model"))
        from leantune.models import load_base

        base_model = load_base(str(name), dtype=known.get("dtype") or "float32")
    return base_model.model, base_model.content_hash


def _base_difference(path: Path, known: dict[str, Any], model: nn.Module, given_hash: str | None) -> str | None:
    wanted = known.get("content_hash")
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    # The hash is of the bytes, so it can only be compared in the dtype it was taken in.
    if not wanted or record.model_dtype(inner) != known.get("dtype", record.model_dtype(inner)):
        return None
    if given_hash is None:
        from leantune.models import content_hash

        given_hash = content_hash(inner)
    if given_hash == wanted:
        return None
    return describe(
        str(path),
        f"trained on {known.get('name')} ({wanted[:19]}...), loaded over another base ({given_hash[:19]}...)",
        "the same weights",
        "load that base, or pass force=True if the difference is meant",
    )
