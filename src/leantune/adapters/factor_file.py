"""An adapter folder without its frozen factors: written, and read back before the folder gets its name.

What such files hold, and how they are read, stands in :mod:`leantune.methods._factor_file`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save, save_file
from torch import Tensor

from leantune.adapters import verification
from leantune.core.atomic import write_bytes, write_json
from leantune.core.errors import AdapterError, describe, did_you_mean, raise_all
from leantune.methods._factor_file import (
    FORMS,
    RECOMPUTED,
    SHARED,
    STORED,
    Core,
    complete,
    content_hash,
    cores,
    find_shared,
    probe,
)

EXACT = 1e-5
"""Largest difference between the change that a file gives and the trained one, as a share of it, in any layer."""


def require_form(form: str) -> None:
    """Refuse what is no way to keep frozen factors.

    Raises:
        AdapterError: it is not.
    """
    if form not in FORMS:
        raise AdapterError(describe("factors", repr(form), did_you_mean(form, FORMS), "choose one"))


def shrink(model: PeftModel, folder: Path, adapter_name: str, form: str) -> dict[str, Any]:
    """Take the frozen factors out of a folder that was just written, and prove that reading it gives them back.

    Args:
        model: the model that the adapter is on, its base unmerged.
        folder: flat, with all factors; in the place it will have or beside it, for shared factors go above it.
        adapter_name: which adapter it is.
        form: one of :data:`leantune.methods._factor_file.FORMS`.

    Returns:
        What the adapter's record says of it: ``factors``, ``factor_file``, ``factor_error`` (the largest difference of
        a layer's change from the trained one, as a share of it).

    Raises:
        AdapterError: the method has no such factors, or these are not to be found again in the base weights.
    """
    config: Any = model.peft_config[adapter_name]
    found = list(cores(model, adapter_name))
    _refuse(config, found, adapter_name, form)
    whole = verification.read_tensors(folder)
    kept = dict(whole)
    frozen = {core.key + name: kept.pop(core.key + name) for core in found for name in ("B", "A")}
    said: dict[str, Any] = {"factors": form, "factor_file": None, "factor_hash": None}
    if form == SHARED:
        said["factor_file"], said["factor_hash"] = write_shared(frozen, folder.resolve().parent)
    else:
        for core in found:
            B, A = frozen[core.key + "B"], frozen[core.key + "A"]
            for name, part in zip(("probe_B", "probe_A"), probe(B, A, core.path), strict=True):
                kept[core.key + name] = part.to(B.dtype).contiguous()
    save_file(kept, str(folder / verification.WEIGHTS_NAME), metadata={"format": "pt"})
    path = folder / verification.CONFIG_NAME
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **said})
    error = _read_back(model, folder, adapter_name, said, whole)
    return {"factors": form, "factor_file": said["factor_file"], "factor_error": error}


def _refuse(config: Any, found: list[Core], adapter_name: str, form: str) -> None:
    where = f"adapter '{adapter_name}'"
    if not found or not hasattr(config, "factors"):
        got = f"{type(config).__name__} has no frozen factors of its own"
        raise AdapterError(describe(where, got, "an adapter of lora-xs or lora-sb", "save it as it is"))
    if any(core.layer.merged for core in found):
        raise AdapterError(describe(where, "the base has merged adapters", "its own weights", "unmerge_adapter()"))
    if form == RECOMPUTED and config.start != "weight_svd":
        got = f"its factors come from init_weights={config.init_weights!r}, not from the weight"
        do = "save them (the default), or share them with other adapters: 'shared', --format shared-factors"
        raise AdapterError(describe(where, got, "init_weights='weight_svd' (lora-xs)", do))


def _read_back(
    model: PeftModel, folder: Path, adapter_name: str, said: dict[str, Any], whole: dict[str, Tensor]
) -> float:
    """The largest error of a layer, when the folder is read as a loader would; raises where that is too much."""
    config = copy.copy(model.peft_config[adapter_name])
    for name, value in said.items():
        setattr(config, name, value)
    config.read_from = folder  # type: ignore[attr-defined]
    again = complete(model, config, adapter_name, dict(verification.read_tensors(folder)))
    errors = {}
    for core in cores(model, adapter_name):
        parts = [(state[core.key + "B"], state[core.key + "weight"], state[core.key + "A"]) for state in (again, whole)]
        errors[core.path] = relative_error(*parts)
    worst = max(errors, key=errors.__getitem__)
    problem = describe(
        f"module {worst}",
        f"its change would come back {errors[worst]:.2e} off",
        f"at most {EXACT:.0e}",
        "save it with its factors (the default)",
    )
    raise_all([problem] if not errors[worst] <= EXACT else [], AdapterError)
    return errors[worst]


def relative_error(got: tuple[Tensor, Tensor, Tensor], wanted: tuple[Tensor, Tensor, Tensor]) -> float:
    """``|B' R' A' - B R A| / |B R A|`` (Frobenius) in float64, without forming either product.

    Args:
        got: ``B' (out, r)``, ``R' (r, r)``, ``A' (r, in)``.
        wanted: ``B``, ``R``, ``A``.
    """
    (B1, R1, A1), (B2, R2, A2) = ([part.detach().double().cpu() for part in parts] for parts in (got, wanted))
    left = torch.linalg.qr(torch.cat([B1, B2], 1)).R
    right = torch.linalg.qr(torch.cat([A1, A2], 0).t()).R
    rank = len(R1)
    difference = left @ torch.block_diag(R1, -R2) @ right.t()
    size = torch.linalg.matrix_norm(left[:, rank:] @ R2 @ right[:, rank:].t())
    error = torch.linalg.matrix_norm(difference)
    return float(error / size) if size > 0 else float(error)


def write_shared(tensors: dict[str, Tensor], folder: Path) -> tuple[str, str]:
    """Put shared factors into a folder, once however many adapters have them.

    Returns:
        The name of the file, and the hash of its content.
    """
    digest = content_hash(tensors)
    path = folder / f"factors-{digest[:16]}.safetensors"
    if not _holds(path, digest):
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
        write_bytes(path, data)
    return path.name, digest


def _holds(path: Path, digest: str) -> bool:
    # One that is damaged is written again.
    if not path.is_file():
        return False
    try:
        return content_hash(verification.read_tensors(path.parent, path.name)) == digest
    except AdapterError:
        return False


def facts(folder: Path, config: Any) -> dict[str, Any]:
    """What ``leantune inspect adapter`` says of the factors of a folder; empty where the method has none."""
    form = getattr(config, "factors", None)
    if form is None:
        return {}
    if form != SHARED:
        where = "in the file" if form == STORED else "recomputed from the base weights, checked by a probe"
        return {"factors": where}
    path = find_shared(config.factor_file, folder)
    where = f"{config.factor_file}: missing" if path is None else str(path)
    return {"factors": f"shared, in {where}", "factor_bytes": None if path is None else path.stat().st_size}


def section(known: dict[str, Any]) -> dict[str, str]:
    """What the card of a folder without its factors says of them, by heading.

    Args:
        known: the adapter's record.
    """
    form = known.get("factors", STORED)
    if form == STORED:
        return {}
    text = (
        "The frozen factors are not in this folder. They are decomposed from the base weights when it is loaded, which "
        "takes a few seconds for each billion weights, and a probe tells whether they are those of the training."
        if form == RECOMPUTED
        else f"The frozen factors are in `{known['factor_file']}`, one folder up, where other adapters use them too. "
        "Keep the folders together, or copy that file into this one."
    )
    return {"Factors": f"{text} `leantune export THIS_FOLDER --out NEW --format native` writes a folder with them."}


def files_of(folder: Path, config: Any) -> list[Path]:
    """The files outside an adapter folder that it cannot do without."""
    path = find_shared(config.factor_file, folder) if getattr(config, "factors", None) == SHARED else None
    return [] if path is None else [path]
