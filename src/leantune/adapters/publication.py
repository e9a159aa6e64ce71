"""The folder that goes to the Hub: plain LoRA at its root, which opens everywhere, and the native adapter in `native/`.

    adapter_config.json, adapter_model.safetensors   plain LoRA, proven to give the same answers
    README.md                                         the model card, with metadata and evaluation
    tokenizer files, chat_template.jinja              as training saw them
    leantune.json                                     the record, with the sha256 of every file
    native/                                           the adapter as it was trained, its record, and the run's

Nothing in it names a path of the machine it comes from, and its base is named by a Hub id only where the very weights
of that id were the base.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from leantune.adapters import card as model_card
from leantune.adapters import export, factor_file, record, verification
from leantune.adapters import folder as adapter_folder
from leantune.core.atomic import write_json, write_text
from leantune.core.errors import AdapterError, describe

NATIVE = "native"
EMBEDDED_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
RUN_RECORD = "run.json"
# What a run's record tells of the machine and of later copies.
_PRIVATE = ("environment", "exports")
_KEPT_OF_ENVIRONMENT = ("versions", "python")

Progress = Callable[[str], None]


def prepare(
    run: str | Path,
    repo_id: str,
    folder: Path,
    *,
    card: dict[str, Any] | None = None,
    base_id: str | None = None,
    prompts: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fill an empty folder with what goes to the Hub.

    Args:
        run: a run folder or an adapter folder.
        repo_id: where it will go, ``owner/name``.
        folder: to fill.
        card: parts of the model card, see :func:`leantune.adapters.card.render`.
        base_id: Hub id of the base, where the run names a folder: used when its weights are those of the base.
        prompts: to prove the LoRA form on; default: the run's own data.
        progress: told what happens, in words.

    Returns:
        ``files`` (path -> bytes), ``base`` (its public facts), ``conversion`` and ``parity`` of the LoRA form.

    Raises:
        AdapterError: the adapter has no LoRA form, or ``base_id`` has other weights.
        ParityError: the LoRA form behaves differently.
    """
    source = export.adapter_of(run)
    known = record.read(source).get("base") or {}
    if base_id is not None:
        known = _confirmed(source, known, base_id, progress)
    base = public_base(known)
    result = export.export_run(run, folder, prompts=prompts, overwrite=True, note=False, progress=progress)
    native = folder / NATIVE
    native.mkdir()
    for name in (verification.CONFIG_NAME, verification.WEIGHTS_NAME, record.RECORD_NAME):
        if (source / name).is_file():
            shutil.copyfile(source / name, native / name)
    for outside in factor_file.files_of(source, verification.read_config(source)):
        shutil.copyfile(outside, native / outside.name)
    for place in (folder, native):
        _name_base(place, base)
    summary = _read(source.parent / RUN_RECORD) if source.name == "adapter" else {}
    if summary:
        write_json(native / RUN_RECORD, public_run(summary, base))
    facts = {**_read(folder / record.RECORD_NAME), "base": base}
    parts = {**(card or {}), "model_index": model_index(summary, repo_id)}
    parts["tags"] = [*(parts.get("tags") or ()), str(facts.get("converted_from"))]
    parts["sections"] = {
        **(parts.get("sections") or {}),
        "The trained form": _native_text(facts, repo_id, base),
        **({} if base.get("source") == "hub" else {"The base": _base_text(base)}),
    }
    write_text(folder / "README.md", model_card.render(facts, parts).replace("THIS_FOLDER", repo_id))
    facts["files"] = {path: _sha256(folder / path) for path in _files(folder) if path != record.RECORD_NAME}
    record.write(folder, facts)
    sizes = {path: (folder / path).stat().st_size for path in _files(folder)}
    return {"files": sizes, "base": base, "conversion": result["conversion"], "parity": result["parity"]}


def public_base(base: dict[str, Any]) -> dict[str, Any]:
    """What may be said of a base in public: a Hub id where it has one, else its name without its path."""
    name = base.get("hub_id") if base.get("source") == "hub" else base.get("name")
    return {**base, "name": _basename(name) if isinstance(name, str) else None}


def public_run(summary: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """A run's record without what tells of its machine: absolute paths become names."""
    kept = {name: value for name, value in summary.items() if name not in _PRIVATE}
    environment = summary.get("environment") or {}
    kept["environment"] = {name: environment[name] for name in _KEPT_OF_ENVIRONMENT if name in environment}
    public: dict[str, Any] = without_paths(kept)
    public["base"] = {**(public.get("base") or {}), **base}
    public["config"] = {**(public.get("config") or {}), "model": base["name"], "out": _basename(base["name"] or "run")}
    return public


def without_paths(value: Any) -> Any:
    """A copy in which every absolute path, key or value, is its last part alone."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return _basename(value) if isinstance(value, str) else value


def _basename(text: str) -> str:
    if "\n" in text:
        return text
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(text).is_absolute() or text.startswith(("~/", "../", "./")):
            return kind(text).name
    return text


def model_index(summary: dict[str, Any], repo_id: str) -> list[dict[str, Any]] | None:
    """The Hub's ``model-index`` of a run's evaluation; None without one."""
    kinds = {
        "causal-lm": ("text-generation", "Text generation"),
        "masked-lm": ("fill-mask", "Fill-mask"),
        "image-classification": ("image-classification", "Image classification"),
    }
    results = []
    for path, found in ((summary.get("evaluation") or {}).get("files") or {}).items():
        tuned = found.get("tuned") or {}
        task, title = kinds.get(tuned.get("task", ""), ("text-classification", "Text classification"))
        metrics = [
            {"type": name, "name": score.get("title", name), "value": round(score["value"], 6)}
            for name, score in (tuned.get("metrics") or {}).items()
            if isinstance(score.get("value"), int | float)
        ]
        name = _basename(path)
        if metrics:
            dataset = {"name": name, "type": PurePosixPath(name).stem, "revision": found.get("hash")}
            results.append({"task": {"type": task, "name": title}, "dataset": dataset, "metrics": metrics})
    return [{"name": repo_id.rpartition("/")[2], "results": results}] if results else None


def _native_text(facts: dict[str, Any], repo_id: str, base: dict[str, Any]) -> str:
    arguments = model_card.load_arguments(facts, base["name"])
    size = f"{facts.get('native_bytes', 0):,} bytes of tensors where the LoRA form takes {facts.get('lora_bytes', 0):,}"
    return (
        f"`native/` holds the adapter as it was trained ({facts.get('converted_from')}), {size}; both are the same "
        f"change.\n\n```python\nimport leantune\n\nbase = leantune.load_base({arguments})\n"
        f"model = leantune.load(base, {json.dumps(repo_id)})  # takes native/\n```\n\n"
        f"`leantune pull {repo_id} --out DIR` makes a run folder of it, for `leantune generate`, `eval` and `chat`."
    )


def _base_text(base: dict[str, Any]) -> str:
    """Why the metadata names no model of the Hub."""
    from leantune.models.embedded import EMBEDDED_NAME

    if base.get("name") == EMBEDDED_NAME:
        return (
            f"`{EMBEDDED_NAME}` is a dequantised 4-bit copy of `{EMBEDDED_ORIGIN}`, not its weights, so the metadata "
            f"does not name that model. `leantune.load_base('{EMBEDDED_NAME}')` fetches the copy. Over "
            f"`{EMBEDDED_ORIGIN}` itself the adapter opens too; it was neither trained nor measured there."
        )
    return (
        f"The run named its base by a {base.get('source') or 'model object'} (`{base.get('name')}`), and no id of the "
        "Hub was shown to have the same weights, so the metadata names none. Content hash of the weights: "
        f"`{base.get('content_hash')}`."
    )


def _name_base(folder: Path, base: dict[str, Any]) -> None:
    """Config and record name the base as the public may know it."""
    config = _read(folder / verification.CONFIG_NAME)
    config["base_model_name_or_path"] = base["name"]
    config["revision"] = base.get("revision") if base.get("source") == "hub" else None
    write_json(folder / verification.CONFIG_NAME, config)
    known = _read(folder / record.RECORD_NAME)
    if known:
        record.write(folder, {**without_paths(known), "base": base})


def _confirmed(source: Path, known: dict[str, Any], base_id: str, progress: Progress | None) -> dict[str, Any]:
    """The facts of a base under a Hub id, when its weights are the very ones the adapter was trained on."""
    if progress is not None:
        progress(f"comparing the weights of {base_id} with those trained on")
    # Packed and with a head as in training: the hash is of all of that.
    opened = adapter_folder.recorded_base(source, base_id)
    if not known.get("content_hash") or opened.content_hash != known["content_hash"]:
        got = f"its weights ({opened.content_hash[:19]}...) are not those trained on ({known.get('content_hash')})"
        raise AdapterError(
            describe(f"base {base_id}", got, "the very base of the run", "leave --base out: the card then says so")
        )
    return {**known, "name": base_id, "source": "hub", "hub_id": base_id, "revision": opened.revision}


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def changed_files(folder: Path) -> list[str]:
    """What is wrong with a fetched folder's files against its record: missing, or with other bytes."""
    problems = []
    for path, wanted in (_read(folder / record.RECORD_NAME).get("files") or {}).items():
        if not (folder / path).is_file():
            problems.append(describe(path, "missing", "the file that was pushed", "pull again"))
        elif path != "README.md" and _sha256(folder / path) != wanted:
            # The card alone is meant to be edited on the Hub.
            problems.append(
                describe(path, "other bytes than were pushed", wanted[:19] + "...", "pull another revision")
            )
    return problems


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
