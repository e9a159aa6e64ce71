"""What ``leantune export`` and ``leantune merge`` do with a run: load, write, prove.

The numbers go into the run's run.json, also when they do not hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leantune.adapters import conversion as converting
from leantune.adapters import folder as adapter_folder
from leantune.adapters import merging, parity, record, skeleton, verification
from leantune.adapters.recompression import require_exact
from leantune.adapters.truncation import keep_rounds
from leantune.core.atomic import new_folder, write_json
from leantune.core.errors import AdapterError, LeantuneError, describe, did_you_mean
from leantune.methods._factor_file import RECOMPUTED, SHARED, STORED

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

    from leantune.models import BaseModel

# Where the frozen factors of lora-xs and lora-sb go: into the folder, nowhere, or into a file above it.
FACTOR_FORMATS = {"native": STORED, "lora-xs": RECOMPUTED, "shared-factors": SHARED}
FORMATS = ("lora", *FACTOR_FORMATS)
ONTO = ("trained", "original")
DEFAULT_NEW_TOKENS = 32

Progress = Callable[[str], None]


def export_run(
    run: str | Path,
    out_dir: str | Path,
    *,
    format: str = "lora",
    prompts: Sequence[str] | None = None,
    new_tokens: int = DEFAULT_NEW_TOKENS,
    pad_rank: bool | str = True,
    dtype: str | None = None,
    rank: int | None = None,
    exact: bool = False,
    rounds: int | None = None,
    base: BaseModel | str | None = None,
    overwrite: bool = False,
    note: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export a run's adapter: as plain LoRA, proven to give the same answers in stock PEFT, or in its own form.

    Args:
        run: a run folder, an adapter folder or a Hub id.
        out_dir: where to.
        format: ``"lora"``; or in its own form, with the frozen factors of ``lora-xs`` and ``lora-sb`` in the folder
            (``"native"``), recomputed on loading (``"lora-xs"``), or in a file above it (``"shared-factors"``).
        prompts: texts to compare on; default: the first rows of the run's own data, else built-in texts.
        new_tokens: length of the greedy continuations that are compared.
        pad_rank: see :func:`leantune.convert_to_lora`.
        dtype: see :func:`leantune.convert_to_lora`.
        rank: recompress to this rank. Where that leaves something out, parity is measured and recorded, not demanded.
        exact: refuse a rank that leaves something out.
        rounds: of a boosted adapter, only its first so many rounds.
        base: the base model, where the record does not tell.
        overwrite: replace a non-empty ``out_dir``.
        note: add the numbers to run.json.
        progress: told what happens, in words.

    Returns:
        ``format``, ``folder``, and of plain LoRA ``conversion`` and ``parity``, of its own form the ``bytes`` (native,
        written, shared), ``factor_file`` and ``factor_error``; as JSON, also appended to ``exports`` of run.json.

    Raises:
        AdapterError: the adapter has no such form.
        ParityError: the exported adapter behaves differently; ``out_dir`` is not written, run.json has the numbers.
    """
    if format not in FORMATS:
        raise AdapterError(describe("format", repr(format), did_you_mean(format, FORMATS), "choose one"))
    if format in FACTOR_FORMATS and (rank is not None or dtype is not None):
        raise AdapterError(describe("rank, dtype", f"given with format {format!r}", "format 'lora'", "leave them out"))
    target = Path(out_dir)
    converting.refuse_occupied(target, overwrite)
    say = progress or (lambda _: None)
    source = adapter_of(run)
    say("loading the trained model")
    base_model, model = _open(source, base)
    keep_rounds(model, rounds, drop=True)
    if format in FACTOR_FORMATS:
        say("writing it, and reading it back")
        result = {"rounds": rounds, **_write_own_form(source, base_model, model, target, format)}
        if note:
            _note(source, result)
        return result
    facts = adapter_folder.describe_adapter(model, "default", base_model)
    with new_folder(target) as temporary:
        say("writing the LoRA form")
        conversion = converting.write_lora(
            model, temporary, "default", facts, pad_rank=pad_rank, dtype=dtype, rank=rank
        )
        left_out = conversion.recompression
        if left_out is not None and exact:
            require_exact(left_out, f"LoRA export of {source}")
        converting.copy_tokenizer(None, source, temporary)
        auto_class = skeleton.auto_class_for(model.get_base_model(), facts["task_type"])
        where, options = skeleton.location(base_model.name, base_model.revision)
        if base_model.quantisation is not None:
            # The same packed weights on both sides: stock transformers packs them itself.
            options["quantization_config"] = json.loads(base_model.model.config.quantization_config.to_json_string())
        measured = parity.compare(
            model,
            parity.Exported(where, str(temporary), auto_class, options),
            parity.prompt_ids(prompts or _run_prompts(source, base_model.encoder), base_model.encoder),
            new_tokens=new_tokens if auto_class == "AutoModelForCausalLM" else 0,
            stop=parity.stop_ids(base_model.encoder),
            progress=progress,
        )
        converting.write_lora_record(temporary, facts, conversion, measured.to_dict())
        result = {
            "format": format,
            "folder": str(target),
            "rounds": rounds,
            "conversion": {**conversion.to_dict(), "folder": str(target)},
            "parity": measured.to_dict(),
        }
        if note:
            _note(source, result)
        if left_out is None or left_out.is_exact:
            measured.require(f"LoRA export of {source}")
    return result


def _write_own_form(source: Path, base_model: BaseModel, model: PeftModel, target: Path, format: str) -> dict[str, Any]:
    has_tokenizer = any((source / name).is_file() for name in ("tokenizer_config.json", "preprocessor_config.json"))
    tokenizer = base_model.encoder if has_tokenizer else None
    adapter_folder.save(model, target, base=base_model, tokenizer=tokenizer, factors=FACTOR_FORMATS[format])
    known = record.read(target)
    shared = known.get("factor_file")
    sizes = {
        "native": (source / verification.WEIGHTS_NAME).stat().st_size,
        "written": (target / verification.WEIGHTS_NAME).stat().st_size,
        "shared": (target.parent / shared).stat().st_size if shared else 0,
    }
    told = {"factor_file": shared, "factor_error": known.get("factor_error", 0.0)}
    return {"format": format, "folder": str(target), "bytes": sizes, **told}


def merge_run(
    run: str | Path,
    out_dir: str | Path,
    *,
    prompts: Sequence[str] | None = None,
    new_tokens: int = DEFAULT_NEW_TOKENS,
    base: BaseModel | str | None = None,
    onto: str = "trained",
    rounds: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merge a run's adapter into its base, as a plain transformers folder, and prove that it gives the same answers.

    Args:
        run: a run folder, an adapter folder or a Hub id.
        out_dir: where to.
        prompts: texts to compare on; default: the first rows of the run's own data, else built-in texts.
        new_tokens: length of the greedy continuations that are compared.
        base: the base model, where the record does not tell.
        onto: ``trained``: the base as it was trained on, dequantised where it was packed, and the merged model must
            give the same answers; ``original``: of a run on a quantised base, the base before quantisation, which
            training never met: parity is measured and said, and not demanded.
        rounds: of a boosted adapter, only its first so many rounds.
        overwrite: replace a non-empty ``out_dir``.
        progress: told what happens, in words.

    Returns:
        What :func:`leantune.adapters.merge` returns, and ``format``; appended to ``exports`` of run.json.

    Raises:
        AdapterError: the adapter cannot be merged.
        ParityError: the merged model behaves differently; ``out_dir`` is not written, run.json has the numbers.
    """
    target = Path(out_dir)
    converting.refuse_occupied(target, overwrite)
    if onto not in ONTO:
        raise AdapterError(describe("onto", repr(onto), did_you_mean(onto, ONTO), "choose one"))
    say = progress or (lambda _: None)
    source = adapter_of(run)
    say("loading the trained model")
    base_model, model = _open(source, base)
    keep_rounds(model, rounds, drop=True)
    tokenizer = base_model.encoder
    merging.refuse_unmergeable(model, "default")
    original = _original(source, base_model, base) if onto == "original" else None
    facts = adapter_folder.describe_adapter(model, "default", base_model)
    with new_folder(target) as temporary:
        say("merging")
        result = merging.fill(model, temporary, "default", facts, tokenizer, None, original)
        chosen = prompts or _run_prompts(source, tokenizer)
        measured = merging.compare(model, temporary, "default", tokenizer, chosen, new_tokens, progress)
        result["parity"] = measured.to_dict()
        merging.write_record(temporary, {**facts, **result}, None)
        result = {"format": "merged", "folder": str(target), "rounds": rounds, **result}
        _note(source, result)
        if original is None:
            measured.require(f"merged model of {source}")
    return result


def adapter_of(run: str | Path) -> Path:
    """The adapter folder of a run, an adapter folder itself, or one on the Hub.

    Raises:
        AdapterError: there is none, or the run trained the whole model.
    """
    path = Path(run)
    if not (path / "adapter").exists() and (path / "model" / "config.json").is_file():
        raise AdapterError(
            describe(str(path), "a run that trained the whole model", "an adapter", f"use {path / 'model'} as it is")
        )
    return adapter_folder.resolve(run)


def _open(source: Path, base: BaseModel | str | None) -> tuple[BaseModel, PeftModel]:
    opened = adapter_folder.recorded_base(source, base) if base is None or isinstance(base, str) else base
    difference = verification.base_difference(source, opened.model, opened.content_hash)
    # In the checkpoint's own layout: what is written must fit the base as others have it.
    found = [difference] if difference else []
    template = source / "chat_template.jinja"
    if template.is_file() and not isinstance(opened.tokenizer.chat_template, dict):
        # The one it was trained with goes along, not the base's.
        opened.tokenizer.chat_template = template.read_text(encoding="utf-8")
    return opened, adapter_folder.attach(opened.model, source, plain_layout=True, problems=found)


def _original(source: Path, packed: BaseModel, base: BaseModel | str | None) -> nn.Module:
    """The base of a run before it was quantised."""
    if packed.quantisation is None:
        got = "a run whose base was not quantised"
        raise AdapterError(
            describe("onto", f"'original' for {got}", "'trained', which is the same here", "leave it out")
        )
    name = base if isinstance(base, str) else packed.name
    return adapter_folder.recorded_base(source, name, packed=False).model


def _run_prompts(source: Path, encoder: Any, count: int = 8) -> list[Any] | None:
    """The first prompts (or images) of the data the run was evaluated or trained on, where it can still be read."""
    run = adapter_folder.run_of(source)
    settings = (run or source.parent) / "config.yaml"
    if not settings.is_file():
        return None
    try:
        import yaml

        config = yaml.safe_load(settings.read_text(encoding="utf-8"))
        config |= (config.get("tasks") or {}).get(source.name, {})
        from leantune.data import prompt_text, read_rows
        from leantune.data.image import pixels

        for name in ("eval_data", "data"):
            if config.get(name) and Path(config[name]).exists():
                rows = read_rows(
                    Path(config[name]), format=config.get("format"), columns=config.get("columns"), limit=count
                )
                if rows[0].image is not None:
                    return [pixels(row, encoder) for row in rows]
                return [row.text if row.text is not None else prompt_text(row, encoder) for row in rows]
    except (ImportError, OSError, LeantuneError, ValueError, AttributeError):
        # The data moved or changed since: built-in prompts prove the same.
        return None
    return None


def _note(source: Path, entry: dict[str, Any]) -> None:
    """Append to ``exports`` of the run's run.json; an adapter folder without a run has none."""
    run = adapter_folder.run_of(source)
    path = run / "run.json" if run is not None else None
    if path is None or not path.is_file():
        return
    summary = json.loads(path.read_text(encoding="utf-8"))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    summary.setdefault("exports", []).append({"created": now, **entry})
    write_json(path, summary)
