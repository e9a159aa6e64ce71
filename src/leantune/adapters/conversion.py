"""Any adapter whose change is ``B A`` as one plain LoRA that every server reads, exactly.

The file is the most portable one: scaling folded into ``B`` (``lora_alpha == r``), one rank for all modules (rows and
columns of zeros fill up), leaf names as targets, nothing but ``lora_A`` and ``lora_B`` inside.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft import __version__ as peft_version
from safetensors.torch import save_file
from torch import Tensor

from leantune import __version__
from leantune.adapters import card as model_card
from leantune.adapters import folder as adapter_folder
from leantune.adapters import layer as layers
from leantune.adapters import record, skeleton, verification
from leantune.adapters.recompression import Recompression, recompress_all
from leantune.core.atomic import new_folder, write_json, write_text
from leantune.core.errors import AdapterError, describe, raise_all
from leantune.methods._factor_file import RECOMPUTED

if TYPE_CHECKING:
    from leantune.models import BaseModel

# What vLLM accepts as --max-lora-rank (read in its 2026-09 sources).
SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

# Initialisations that change the base weights too; over the untouched base such an adapter means something else.
_MUTATING_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Conversion:
    """What an export holds and what it costs.

    Attributes:
        folder: where it lies.
        max_abs_error: largest ``|delta - B A|`` over all weights of all modules, computed in float64 from the numbers
            in the file against the layer's own delta.
        native_bytes: the native adapter's tensors.
        lora_bytes: the exported ``adapter_model.safetensors``.
        rank: the largest rank a module needs.
        padded_rank: the rank in the file (the largest, when modules keep their own).
        modules: how many modules it changes.
        target_modules: how the config names them.
        advice: when another way is wiser, else ``None``.
        recompression: what a smaller rank left out, layer by layer; ``None`` where none was asked for.
    """

    folder: Path
    max_abs_error: float
    native_bytes: int
    lora_bytes: int
    rank: int
    padded_rank: int
    modules: int
    target_modules: list[str]
    advice: str | None
    recompression: Recompression | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        left_out = None if self.recompression is None else self.recompression.to_dict()
        return {**asdict(self), "folder": str(self.folder), "recompression": left_out}


def convert_to_lora(
    model_or_dir: PeftModel | str | Path,
    out_dir: str | Path,
    *,
    adapter_name: str = "default",
    base: BaseModel | str | None = None,
    pad_rank: bool | str = True,
    dtype: str | torch.dtype | None = None,
    rank: int | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Conversion:
    """Write an adapter as plain LoRA.

    Args:
        model_or_dir: a model with the adapter, or an adapter or run folder (the base weights are not loaded then).
        out_dir: where to.
        adapter_name: which adapter of the model.
        base: the base model, where the adapter's record does not tell (well enough).
        pad_rank: ``True``: one rank for all modules, the largest; ``"server"``: that, raised to the next rank that
            vLLM takes as a limit; ``False``: each module its own (``rank_pattern``; vLLM and llama.cpp misread it).
        dtype: of the file; ``None`` keeps the factors' own, in which the export is exact.
        rank: recompress every module to this rank or less, the error of each reported; ``None``: exact.
        tokenizer: saved beside it; from a folder its tokenizer files are copied.
        overwrite: replace a non-empty ``out_dir``.

    Raises:
        AdapterError: the adapter is more than ``B A`` (whole modules, biases, variants), or cannot be read.
    """
    target = Path(out_dir)
    refuse_occupied(target, overwrite)
    model, facts, source = open_adapter(model_or_dir, adapter_name, base)
    if source is not None:
        adapter_name = "default"
    with new_folder(target) as temporary:
        conversion = write_lora(model, temporary, adapter_name, facts, pad_rank=pad_rank, dtype=dtype, rank=rank)
        copy_tokenizer(tokenizer, source, temporary)
    return Conversion(**{**vars(conversion), "folder": target})


def refuse_occupied(target: Path, overwrite: bool) -> None:
    """Raise when ``target`` exists with something in it and may not be replaced."""
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not overwrite):
        raise AdapterError(
            describe(str(target), "already there", "a new or empty folder", "choose another, or pass overwrite=True")
        )


def open_adapter(
    model_or_dir: PeftModel | str | Path, adapter_name: str, base: BaseModel | str | None
) -> tuple[PeftModel, dict[str, Any], Path | None]:
    """A model that carries the adapter, the adapter's record, and its folder when it came from one."""
    if isinstance(model_or_dir, PeftModel):
        if adapter_name not in model_or_dir.peft_config:
            known = ", ".join(model_or_dir.peft_config)
            raise AdapterError(describe(f"adapter '{adapter_name}'", "not on this model", f"one of {known}", "name it"))
        given = None if isinstance(base, str) else base
        facts = adapter_folder.describe_adapter(model_or_dir, adapter_name, given)
        if isinstance(base, str):
            facts["base"]["name"] = base
        return _in_plain_layout(model_or_dir, adapter_name), facts, None
    source = adapter_folder.resolve(model_or_dir)
    config = verification.read_config(source)
    known_base = dict(record.read(source).get("base") or {})
    if base is not None and not isinstance(base, str):
        known_base = record.base_facts(base, base.model)
    name = base if isinstance(base, str) else known_base.get("name") or config.base_model_name_or_path
    if not name:
        raise AdapterError(describe(str(source), "does not name its base model", "one", "pass base=..."))
    if name != known_base.get("name"):
        known_base = {"name": name}
    bare = skeleton.build(config, name)
    if getattr(config, "factors", None) == RECOMPUTED:
        # The one kind of file that cannot be read without the weights.
        bare = adapter_folder.recorded_base(source, name).model
    model = adapter_folder.attach(bare, source, plain_layout=True)
    facts = adapter_folder.describe_adapter(model, "default", None)
    facts["base"] = known_base
    return model, facts, source


def _in_plain_layout(model: PeftModel, adapter_name: str) -> PeftModel:
    """The model itself; where its base was reordered in memory, the same adapter on a skeleton in the plain order."""
    if not getattr(model.peft_config[adapter_name], "permute", False):
        return model
    with tempfile.TemporaryDirectory(prefix="leantune-layout-") as scratch:
        saved = adapter_folder.save(model, Path(scratch) / "adapter", adapter_name=adapter_name)
        plain = skeleton.like(model.get_base_model())
        return adapter_folder.attach(plain, saved, adapter_name=adapter_name, plain_layout=True)


def write_lora(
    model: PeftModel,
    folder: Path,
    adapter_name: str,
    facts: dict[str, Any],
    *,
    pad_rank: bool | str,
    dtype: str | torch.dtype | None,
    rank: int | None = None,
) -> Conversion:
    """Fill an empty folder with the LoRA form of an adapter (all but the tokenizer)."""
    modules = layers.adapted_modules(model, adapter_name)
    _refuse_more_than_lora(model, adapter_name, modules)
    factors = {path: layers.lora_factors(path, module, adapter_name) for path, module in modules}
    left_out = None
    if rank is not None:
        factors, left_out = recompress_all(factors, rank)
    ranks = {path: A.shape[0] for path, (_, A) in factors.items()}
    largest = max(ranks.values())
    common = _padded_rank(largest, pad_rank)
    file_dtype = _file_dtype(factors, dtype)
    tensors: dict[str, Tensor] = {}
    error = 0.0
    for path, module in modules:
        B, A = (factor.to("cpu", file_dtype) for factor in factors.pop(path))
        # A convolution is linear in patches: its factors stand for the unfolded kernel.
        error = max(error, _max_abs_error(layers.delta_weight(module, adapter_name).flatten(1), B, A))
        B, A = _pad(B, A, common if pad_rank else ranks[path])
        if kernel := layers.kernel_of(module):
            B, A = B[:, :, None, None], A.view(len(A), -1, *kernel)
        tensors[f"base_model.model.{path}.lora_A.weight"] = A
        tensors[f"base_model.model.{path}.lora_B.weight"] = B
    # The header is part of the format: some readers refuse a file that does not say "pt".
    save_file(tensors, str(folder / verification.WEIGHTS_NAME), metadata={"format": "pt"})
    targets = _target_modules([path for path, _ in modules], layers.plain_module_names(model))
    conv1d = any(layers.is_conv1d(module) for _, module in modules)
    config = _config(facts, common, targets, conv1d, {} if pad_rank else ranks)
    write_json(folder / verification.CONFIG_NAME, config)
    native = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    native_bytes = sum(tensor.numel() * tensor.element_size() for tensor in native.values())
    lora_bytes = (folder / verification.WEIGHTS_NAME).stat().st_size
    conversion = Conversion(
        folder=folder,
        max_abs_error=error,
        native_bytes=native_bytes,
        lora_bytes=lora_bytes,
        rank=largest,
        padded_rank=common,
        modules=len(modules),
        target_modules=targets,
        advice=_advice(modules, common, lora_bytes, native_bytes),
        recompression=left_out,
    )
    write_lora_record(folder, facts, conversion, None)
    return conversion


def write_lora_record(
    folder: Path, facts: dict[str, Any], conversion: Conversion, parity: dict[str, Any] | None
) -> None:
    """The record and the card of an export."""
    numbers = {key: value for key, value in conversion.to_dict().items() if key != "folder"}
    export = {**facts, **numbers, "leantune": __version__, "kind": "lora", "method": "lora"}
    export |= {"peft_type": "LORA", "converted_from": facts.get("method"), "parity": parity}
    record.write(folder, export)
    write_text(folder / "README.md", model_card.render(export))


def copy_tokenizer(tokenizer: Any, source: Path | None, folder: Path) -> None:
    """Save the tokenizer beside an export, or copy the files of the folder it came from."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif source is not None:
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


def _refuse_more_than_lora(model: PeftModel, adapter_name: str, modules: list[tuple[str, Any]]) -> None:
    config = model.peft_config[adapter_name]
    problems = []
    where = f"adapter '{adapter_name}'"
    instead = "merge it into the base instead (leantune merge)"
    if reason := adapter_folder.no_change_of_weights(config):
        raise AdapterError(describe(where, reason, "a change of weights", "keep the adapter beside the base"))
    if whole := layers.extra_modules(model, adapter_name):
        got = f"trains whole modules beside the adapter ({', '.join(whole)})"
        problems.append(describe(where, got, "B A alone, which is all a plain LoRA can hold", instead))
    bias = getattr(config, "bias", "none")
    if bias != "none":
        state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        names = ", ".join(key for key in state if key.endswith("bias"))
        problems.append(describe(where, f"trains biases ({names})", "B A alone", instead))
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.startswith(_MUTATING_STARTS):
        got = f"init_lora_weights={start!r} changes the base weights too"
        problems.append(describe(where, got, "a change against the untouched base", instead))
    if not modules and not problems:
        problems.append(describe(where, "changes no module", "at least one linear module", "check target_modules"))
    raise_all(problems, AdapterError)


def _padded_rank(rank: int, pad_rank: bool | str) -> int:
    if pad_rank not in (True, False, "server"):
        raise AdapterError(describe("pad_rank", repr(pad_rank), "True, False or 'server'", "choose one"))
    if pad_rank != "server":
        return rank
    return next((allowed for allowed in SERVER_RANKS if allowed >= rank), rank)


def _file_dtype(factors: dict[str, tuple[Tensor, Tensor]], dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if chosen not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise AdapterError(
                describe("dtype", repr(dtype), "float32, bfloat16 or float16", "leave it out for the exact export")
            )
        return chosen
    widest = torch.float32
    for B, A in factors.values():
        widest = torch.promote_types(widest, torch.promote_types(B.dtype, A.dtype))
    return widest


def _pad(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Both factors at ``rank``, filled with zeros: the product stays the same number for number."""
    padded_B = B.new_zeros(B.shape[0], rank)
    padded_A = A.new_zeros(rank, A.shape[1])
    padded_B[:, : B.shape[1]] = B
    padded_A[: A.shape[0]] = A
    return padded_B, padded_A


def _max_abs_error(delta: Tensor, B: Tensor, A: Tensor, block_rows: int = 1024) -> float:
    """``max |delta - B A|`` in float64, in blocks of rows so that memory stays flat on wide layers."""
    if delta.shape != (B.shape[0], A.shape[1]):
        raise AdapterError(
            describe("lora_factors", f"B A of {(B.shape[0], A.shape[1])}", f"{tuple(delta.shape)}", "mend the method")
        )
    error = 0.0
    wide_A = A.double()
    for start in range(0, B.shape[0], block_rows):
        rows = slice(start, start + block_rows)
        difference = delta[rows].to("cpu", torch.float64) - B[rows].double() @ wide_A
        error = max(error, difference.abs().max().item())
    return error


def _target_modules(adapted: list[str], names: list[str]) -> list[str]:
    """The shortest path endings that PEFT matches to exactly the adapted modules; leaf names where they do."""
    wanted = set(adapted)
    longest = max(path.count(".") for path in adapted) + 1
    for depth in range(1, longest + 1):
        endings = {".".join(path.split(".")[-depth:]) for path in adapted}
        matched = {name for name in names if name in endings or name.endswith(tuple(f".{end}" for end in endings))}
        if matched == wanted:
            return sorted(endings)
    return sorted(wanted)


def _config(
    facts: dict[str, Any], rank: int, targets: list[str], conv1d: bool, ranks: dict[str, int]
) -> dict[str, Any]:
    base = facts.get("base") or {}
    pattern = {path.replace(".", r"\."): own for path, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "peft_version": peft_version,
        "task_type": facts.get("task_type"),
        "base_model_name_or_path": skeleton.stock_name(base),
        "revision": base.get("revision") if base.get("source") == "hub" else None,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets,
        "fan_in_fan_out": conv1d,
        "bias": "none",
        "lora_bias": False,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_parameters": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _advice(modules: list[tuple[str, Any]], rank: int, lora_bytes: int, native_bytes: int) -> str | None:
    parts = []
    if rank > SERVER_RANKS[-1]:
        parts.append(f"rank {rank} is above {SERVER_RANKS[-1]}, the most that vLLM serves")
    shapes = [layers.shape_of(module) for _, module in modules]
    wide = sum(rank > min(shape) / 2 for shape in shapes)
    if wide:
        parts.append(f"in {wide} of {len(shapes)} modules the rank is above half of the full rank")
    if parts:
        return "merging is wiser: " + "; ".join(parts)
    if lora_bytes > 4 * native_bytes:
        return (
            f"the LoRA form takes {lora_bytes / native_bytes:.1f} times the native bytes; "
            "keep the native folder for storage, export for serving"
        )
    return None
