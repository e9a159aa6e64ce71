"""The adapter written into a copy of the base weights: a plain transformers folder, proven against the trained model.

The trained model is not touched: each adapted layer is copied, the copy merged and thrown away, so memory grows by the
merged weights and one layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from leantune import __version__
from leantune.adapters import card as model_card
from leantune.adapters import folder as adapter_folder
from leantune.adapters import layer as layers
from leantune.adapters import parity, record, skeleton
from leantune.adapters.conversion import refuse_occupied
from leantune.core import packed_weight
from leantune.core.atomic import new_folder, write_text
from leantune.core.errors import AdapterError, describe, raise_all
from leantune.models.quantisation import weight_reader

if TYPE_CHECKING:
    from leantune.models import BaseModel


def merge(
    model: PeftModel,
    out_dir: str | Path,
    *,
    adapter_name: str = "default",
    tokenizer: Any = None,
    base: BaseModel | None = None,
    onto: nn.Module | None = None,
    prompts: Sequence[str] | Sequence[list[int]] | None = None,
    new_tokens: int = 32,
    verify: bool = True,
    overwrite: bool = False,
    card: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write the base with the adapter merged in, as a plain transformers folder in the base's dtype.

    Args:
        model: the trained model; it stays exactly as it is.
        out_dir: where to.
        adapter_name: which of its adapters.
        tokenizer: saved beside the model.
        base: the base model, for the card and the record.
        onto: over a quantised base, the same model unquantised: its weights then take the place of the dequantised
            ones. Training never met these, so parity is measured and recorded and not demanded.
        prompts: texts (with a tokenizer) or token ids to compare on; default: a few built-in texts.
        new_tokens: length of the greedy continuations that are compared.
        verify: compare with the unmerged model in a process without leantune; nothing is written when it differs.
        overwrite: replace a non-empty ``out_dir``.
        card: extra parts of the model card.
        progress: told what happens, in words.

    Returns:
        ``folder``, ``bytes``, ``dtype``, ``modules`` and ``parity`` (or ``None``), as JSON.

    Raises:
        AdapterError: the adapter cannot be merged.
        ParityError: the merged model does not behave as the trained one.
    """
    target = Path(out_dir)
    refuse_occupied(target, overwrite)
    refuse_unmergeable(model, adapter_name)
    facts = adapter_folder.describe_adapter(model, adapter_name, base)
    with new_folder(target) as temporary:
        result = fill(model, temporary, adapter_name, facts, tokenizer, card, onto)
        if verify:
            measured = compare(model, temporary, adapter_name, tokenizer, prompts, new_tokens, progress)
            if onto is None:
                measured.require(f"merged model of {facts['base'].get('name')}")
            result["parity"] = measured.to_dict()
            write_record(temporary, {**facts, **result}, card)
    return {"folder": str(target), **result}


def fill(
    model: PeftModel,
    folder: Path,
    adapter_name: str,
    facts: dict[str, Any],
    tokenizer: Any,
    card: dict[str, Any] | None,
    onto: nn.Module | None = None,
) -> dict[str, Any]:
    """Fill an empty folder with the merged model; ``bytes``, ``dtype``, ``modules``, and ``parity`` not yet known."""
    _write(model, adapter_name, folder, onto)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    result = {"bytes": weight_bytes, "dtype": facts["base"]["dtype"], "modules": facts["modules"], "parity": None}
    if facts["base"].get("quantization"):
        result["merged_onto"] = "the dequantised base" if onto is None else "the original base, before quantisation"
    write_record(folder, {**facts, **result}, card)
    return result


def write_record(folder: Path, facts: dict[str, Any], card: dict[str, Any] | None) -> None:
    """The record and the card of a merged model."""
    merged = {**facts, "leantune": __version__, "kind": "merged"}
    record.write(folder, merged)
    write_text(folder / "README.md", model_card.render(merged, card))


def refuse_unmergeable(model: PeftModel, adapter_name: str) -> None:
    """Raise when an adapter cannot be written into its base, with every reason."""
    if adapter_name not in model.peft_config:
        known = ", ".join(model.peft_config)
        raise AdapterError(describe(f"adapter '{adapter_name}'", "not on this model", f"one of {known}", "name it"))
    config = model.peft_config[adapter_name]
    inner = model.get_base_model()
    where = f"adapter '{adapter_name}'"
    problems = []
    if reason := adapter_folder.no_change_of_weights(config):
        problems.append(describe(where, reason, "a change of weights", "keep the adapter beside the base"))
    marked = getattr(inner, "hf_quantizer", None) is not None or getattr(inner, "is_quantized", False)
    if marked and not any(map(packed_weight.is_packed, inner.modules())):
        problems.append(
            describe(
                where,
                "its base is quantised in a way that nothing here dequantises",
                "a base in plain numbers, or quantised by bitsandbytes or torchao",
                "load the base without quantisation and the adapter on top, then merge",
            )
        )
    if any(module.merged for _, module in layers.adapted_modules(model, adapter_name)):
        problems.append(describe(where, "merged in memory already", "not merged", "call unmerge_adapter() first"))
    raise_all(problems, AdapterError)


def merged_state(model: PeftModel, adapter_name: str, onto: nn.Module | None = None) -> dict[str, Tensor]:
    """The state dict of the plain base model with the adapter in its weights; the model is not touched.

    A packed weight comes out as plain numbers: the dequantised ones, or those of ``onto``, plus the adapter's change.
    """
    state: dict[str, Tensor] = {}
    inner = model.get_base_model()
    read = weight_reader(inner)

    def dense(prefix: str, layer: nn.Module) -> Tensor:
        return read(layer) if onto is None else onto.get_parameter(f"{prefix}weight").detach()

    _collect(inner, "", adapter_name, state, dense)
    return state


def _collect(
    module: Any, prefix: str, adapter_name: str, state: dict[str, Tensor], dense: Callable[[str, nn.Module], Tensor]
) -> None:
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if packed_weight.is_packed(layer):
        state |= _unpacked(module, layer, prefix, adapter_name, dense)
        return
    if isinstance(module, ModulesToSaveWrapper):
        chosen = module.modules_to_save
        own = chosen[adapter_name] if adapter_name in chosen.keys() else module.original_module  # noqa: SIM118
        _collect(own, prefix, adapter_name, state, dense)
        return
    if isinstance(module, AuxiliaryTrainingWrapper):
        # Trained tokens: the wrapper holds a tuner layer around the embedding.
        _collect(module.token_adapter, prefix, adapter_name, state, dense)
        return
    if isinstance(module, BaseTunerLayer):
        if adapter_name in layers.adapters_of(module):
            module = copy.deepcopy(module)
            try:
                module.merge(safe_merge=True, adapter_names=[adapter_name])
            except ValueError as error:
                where = f"adapter '{adapter_name}', module {prefix.removesuffix('.')}"
                raise AdapterError(describe(where, str(error), "numbers", "train again")) from error
        _collect(module.get_base_layer(), prefix, adapter_name, state, dense)
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            state[prefix + name] = parameter.detach()
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            state[prefix + name] = buffer
    for name, child in module._modules.items():
        if child is not None:
            _collect(child, f"{prefix}{name}.", adapter_name, state, dense)


def _unpacked(
    module: Any, layer: Any, prefix: str, adapter_name: str, dense: Callable[[str, nn.Module], Tensor]
) -> dict[str, Tensor]:
    """A packed layer as plain tensors, with the adapter's change where it has one."""
    weight = dense(prefix, layer)
    if module is not layer and adapter_name in layers.adapters_of(module):
        layers.refuse_lora_variant(prefix.removesuffix("."), module, adapter_name)
        delta = layers.delta_weight(module, adapter_name)
        weight = (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)
        if not torch.isfinite(weight).all():
            where = f"adapter '{adapter_name}', module {prefix.removesuffix('.')}"
            raise AdapterError(describe(where, "values that are not finite", "numbers", "train again"))
    found = {f"{prefix}weight": weight}
    if layer.bias is not None:
        found[f"{prefix}bias"] = layer.bias.detach()
    return found


def _write(model: PeftModel, adapter_name: str, folder: Path, onto: nn.Module | None) -> None:
    inner: Any = model.get_base_model()
    state = merged_state(model, adapter_name, onto)
    config = copy.deepcopy(inner.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if _untied(inner, state):
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    with torch.device("meta"):
        plain = type(inner)(config)
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    if getattr(inner, "generation_config", None) is not None:
        plain.generation_config = copy.deepcopy(inner.generation_config)
    if hasattr(inner, "_weight_conversions"):
        # How from_pretrained renamed this checkpoint's keys, to be undone on saving.
        plain._weight_conversions = inner._weight_conversions
    plain.save_pretrained(folder)


def _untied(inner: Any, state: dict[str, Tensor]) -> bool:
    """Whether input and output embeddings shared one tensor and no longer do: one of the two was adapted."""
    if not getattr(inner.config.get_text_config(), "tie_word_embeddings", False):
        return False
    embeddings, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    if embeddings is None or head is None:
        return False
    paths = {}
    for name, module in inner.named_modules():
        for key, wanted in (("embeddings", embeddings), ("head", head)):
            if module is wanted:
                paths[key] = name
    if len(paths) < 2:
        return False
    first, second = (state.get(f"{_plain_path(paths[key])}.weight") for key in ("embeddings", "head"))
    return first is not None and second is not None and first.data_ptr() != second.data_ptr()


def _plain_path(path: str) -> str:
    return path.removesuffix(".base_layer").removesuffix(".token_adapter")


def compare(
    model: PeftModel,
    folder: Path,
    adapter_name: str,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[list[int]] | None,
    new_tokens: int,
    progress: Callable[[str], None] | None,
) -> parity.Parity:
    """Parity of a merged folder with the unmerged model."""
    task = adapter_folder.task_type(model, model.peft_config[adapter_name])
    auto_class = skeleton.auto_class_for(model.get_base_model(), task)
    return parity.compare(
        model,
        parity.Exported(str(folder), auto_class=auto_class),
        parity.prompt_ids(prompts, tokenizer),
        new_tokens=new_tokens if auto_class == "AutoModelForCausalLM" else 0,
        stop=parity.stop_ids(tokenizer),
        adapter_name=adapter_name,
        progress=progress,
    )
