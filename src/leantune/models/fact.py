"""What a base model is, without reading its weights: ``leantune inspect model``."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leantune.core.errors import ModelError, describe
from leantune.models import gguf
from leantune.models.base import note_of, read_config, read_tokenizer, reading
from leantune.models.embedded import Progress, say
from leantune.models.location import Location, first_line, locate
from leantune.models.quiet import quiet

# safetensors dtype -> (the name torch uses, bytes of one value)
_SAFETENSORS_TYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


def facts(
    name: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress = say,
) -> dict[str, Any]:
    """Everything about a base model that can be known from its config, tokenizer and file headers.

    Args:
        name: as for :func:`leantune.models.load_base`.
        trust_remote_code: run code that the model's repository brings along.
        revision: branch, tag or commit on the Hub.
        progress: called with one line of text when something takes long.

    Returns:
        A dict that JSON can hold: ``name``, ``source``, ``note``, ``architecture``, ``model_type``, ``layers``,
        ``hidden``, ``intermediate``, ``heads``, ``kv_heads``, ``head_dim``, ``vocab``, ``max_length`` (tokens),
        ``image_size`` and ``patch_size`` (pixels), ``parameters`` (tied weights once), ``tied_embeddings``,
        ``file_bytes`` (dtype or GGUF type -> bytes; empty where the Hub does not tell), ``float32_bytes`` (in memory),
        ``chat_template``, ``pad_token``, ``pad_note``, and ``modules``: the linear modules by leaf name, each
        ``{name, kind, count, out, in, bias, parameters}``. A number that the config does not have is None, and so is
        what a tokenizer would tell of a model that has none, as of one that sees images.

    Raises:
        ModelError: the model cannot be found or read.
    """
    location = locate(name, revision=revision, progress=progress)
    with reading(location, progress):
        config = read_config(location, trust_remote_code)
        tokenizer = pad_note = None
        if not _sees_images(config):
            tokenizer, pad_note = read_tokenizer(location, trust_remote_code)
    skeleton = _skeleton(config, location, trust_remote_code)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    return {
        "name": location.name,
        "source": location.source,
        "note": note_of(location),
        "architecture": type(skeleton).__name__,
        **_dimensions(config),
        "parameters": parameters,
        "tied_embeddings": _has_tied_embeddings(skeleton),
        "file_bytes": _file_bytes(location),
        "float32_bytes": 4 * parameters,
        "chat_template": None if tokenizer is None else bool(getattr(tokenizer, "chat_template", None)),
        "pad_token": None if tokenizer is None else tokenizer.pad_token,
        "pad_note": pad_note,
        "modules": linear_modules(skeleton),
    }


def _sees_images(config: Any) -> bool:
    """Whether a model reads images and no text: it has no tokenizer."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    has_words = getattr(config.get_text_config(), "vocab_size", None) is not None
    return config.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES and not has_words


def bare_model(
    name: str | os.PathLike[str],
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress = say,
) -> nn.Module:
    """A base model on the meta device: every module and shape, no weight. Arguments as for :func:`facts`.

    Raises:
        ModelError: the model cannot be found, or its config builds none.
    """
    location = locate(name, revision=revision, progress=progress)
    with reading(location, progress):
        config = read_config(location, trust_remote_code)
    return _skeleton(config, location, trust_remote_code)


def _skeleton(config: Any, location: Location, trust_remote_code: bool) -> nn.Module:
    """The model on the meta device: every module and shape, no memory."""
    import transformers

    named = getattr(transformers, (config.architectures or [""])[0], None)
    try:
        with quiet(), torch.device("meta"):
            if named is not None:
                model: nn.Module = named._from_config(config)
            else:
                auto = transformers.AutoModelForCausalLM
                model = auto.from_config(config, trust_remote_code=trust_remote_code)
            model.tie_weights()  # type: ignore[operator]
    except Exception as error:
        got = f"its config builds no model ({type(error).__name__}: {first_line(error)})"
        raise ModelError(
            describe(location.name, got, "an architecture of transformers", "check its config.json")
        ) from error
    return model


def _dimensions(config: Any) -> dict[str, Any]:
    text = config.get_text_config()

    def number(name: str) -> int | None:
        value = getattr(text, name, None)
        return int(value) if isinstance(value, int | float) else None

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    return {
        "model_type": config.model_type,
        "layers": number("num_hidden_layers"),
        "hidden": hidden,
        "intermediate": number("intermediate_size") or number("n_inner"),
        "heads": heads,
        "kv_heads": number("num_key_value_heads") or heads,
        "head_dim": number("head_dim") or (hidden // heads if hidden and heads else None),
        "vocab": number("vocab_size"),
        "image_size": number("image_size"),
        "patch_size": number("patch_size"),
        "max_length": number("max_position_embeddings"),
    }


def _has_tied_embeddings(model: Any) -> bool:
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return output is not None and embedding is not None and output.weight is embedding.weight


def linear_modules(model: nn.Module) -> list[dict[str, Any]]:
    """The linear modules of a model by leaf name and shape, in the order of their first appearance.

    ``Conv1D`` of GPT-2 counts: it is a linear layer whose weight is stored as (in, out).
    """
    from transformers.pytorch_utils import Conv1D

    rows: Counter[tuple[str, str, int, int, bool]] = Counter()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            rows_out, columns = module.weight.shape
        elif isinstance(module, Conv1D):
            columns, rows_out = module.weight.shape
        else:
            continue
        leaf = path.rpartition(".")[2]
        rows[leaf, type(module).__name__, rows_out, columns, module.bias is not None] += 1
    return [
        {
            "name": leaf,
            "kind": kind,
            "count": count,
            "out": rows_out,
            "in": columns,
            "bias": bias,
            "parameters": count * (rows_out * columns + (rows_out if bias else 0)),
        }
        for (leaf, kind, rows_out, columns, bias), count in rows.items()
    ]


def _file_bytes(location: Location) -> dict[str, int]:
    """Bytes of the stored weights by dtype, largest first."""
    if location.source == "gguf" and location.path is not None:
        sizes: Counter[str] = Counter()
        for tensor in gguf.read(location.path).tensors:
            sizes[tensor.type] += tensor.size
        return dict(sizes.most_common())
    if location.path is not None:
        return _header_bytes(sorted(location.path.glob("*.safetensors")))
    return _hub_bytes(location)


def _header_bytes(files: list[Path]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for path in files:
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > path.stat().st_size:
                    raise ValueError("its header runs past its end")
                header = json.loads(file.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    sizes[_SAFETENSORS_TYPES.get(entry["dtype"], (entry["dtype"], 1))[0]] += end - start
        except (OSError, ValueError, KeyError, TypeError) as error:
            got = f"unreadable ({first_line(error)})"
            raise ModelError(describe(str(path), got, "a complete safetensors file", "fetch the file again")) from error
    return dict(sizes.most_common())


def _hub_bytes(location: Location) -> dict[str, int]:
    from huggingface_hub import HfApi

    try:
        counts = HfApi().get_safetensors_metadata(location.target, revision=location.revision).parameter_count
    except Exception:  # offline, or no safetensors index there: a fact that is missing, not a failure
        return {}
    sizes: Counter[str] = Counter()
    for kind, count in counts.items():
        label, width = _SAFETENSORS_TYPES.get(kind, (kind, 1))
        sizes[label] += count * width
    return dict(sizes.most_common())
