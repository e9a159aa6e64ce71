"""Going on with a run: from which checkpoint, and whether what follows would be what the uninterrupted run computes.

A checkpoint carries the record of its run (:func:`leantune.train.checkpoint.seal`). A resumed run is held to it:
whatever decides the numbers must be what it was. What may differ is listed in ``FREE``; any other field must be equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leantune.core.errors import RunError, describe, raise_all
from leantune.train import checkpoint
from leantune.train import folder as run_folder
from leantune.train.config import RunConfig
from leantune.train.folder import CHECKPOINTS, CONFIG
from leantune.train.record import RECORD, environment, plain

# How often something is written or shown, and where things stand; the content of model and data is compared by hash.
FREE = frozenset(
    {
        *("out", "overwrite", "save_steps", "keep_checkpoints", "log_steps", "report_to", "run_name"),
        *("model", "data", "revision", "trust_remote_code", "device", "eval_steps", "eval_data"),
    }
)
LENGTH = ("epochs", "max_steps")
# Their code decides the numbers.
DECISIVE = ("leantune", "torch", "transformers", "peft", "accelerate")
# Where a model stands is not what it is.
_PLACES = {"base_model_name_or_path", "revision", "peft_version", "inference_mode"}
_COUNTS = ("rows", "total_tokens", "loss_tokens", "truncated")


@dataclass
class Resumption:
    """A checkpoint to go on from.

    Attributes:
        path: its folder.
        step: the optimizer steps taken.
        record: run.json of the run as it began.
        meter: its counts at this step.
        anyway: go on although libraries or devices differ.
        torn: newer folders that are no checkpoints any more, with the reason.
        notes: what differs and does not forbid going on, a line each.
    """

    path: Path
    step: int
    record: dict[str, Any] = field(repr=False)
    meter: dict[str, Any] = field(repr=False, default_factory=dict)
    anyway: bool = False
    torn: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, summary: dict[str, Any], device: str) -> None:
        """Hold what was loaded to what the checkpoint was made with.

        Args:
            summary: run.json of the run as it begins now.
            device: type of the device it trains on.

        Raises:
            RunError: data, base or method are others; or the device, unless ``anyway``.
        """
        old, problems = self.record, []
        problems += _data_problems("data", old.get("data") or {}, summary.get("data") or {})
        was, now = (each.get("base", {}).get("content_hash") for each in (old, summary))
        if was != now:
            where = f"base model {summary['base']['name']}"
            got = f"other weights ({_short(now)}) than the run began with ({_short(was)}, {old['base']['name']})"
            problems.append(describe(where, got, "the same base, in the same dtype", "name it with --model"))
        problems += _method_problems(old.get("method") or {}, summary.get("method") or {})
        recorded = str(self.meter.get("device", device))
        if recorded != device:
            self._weigh(describe("device", f"{device} now, {recorded} before", "the same", _ANYWAY), problems)
        if _data_problems("eval_data", old.get("eval_data") or {}, summary.get("eval_data") or {}):
            self.notes.append("eval_data is not what it was: evaluations before and after do not compare")
        raise_all(problems, RunError)

    def check_processes(self, count: int) -> None:
        """Hold the number of processes to that of the checkpoint: it decides which rows make a batch.

        Raises:
            RunError: it differs.
        """
        before = int(self.meter.get("processes", count))
        if before != count:
            got = f"{count} now, {before} before"
            raise RunError(describe("processes", got, "as many as before", f"launch {before} of them"))

    def check_environment(self) -> None:
        """Hold libraries and machine to those of the checkpoint.

        Raises:
            RunError: a library that decides numbers has another version, unless ``anyway``.
        """
        old, new = self.record.get("environment") or {}, plain(environment())
        problems: list[str] = []
        for name in DECISIVE:
            was, now = ((each.get("versions") or {}).get(name) for each in (old, new))
            if was != now:
                self._weigh(describe(name, f"{now} now, {was} before", "the same version", _ANYWAY), problems)
        if old.get("threads") != new["threads"]:
            self.notes.append(
                f"{new['threads']} threads now, {old.get('threads')} before: sums in another order, so the last bits "
                f"may differ; OMP_NUM_THREADS={old.get('threads')} keeps them"
            )
        if old.get("cpu") and old["cpu"] != new["cpu"]:
            self.notes.append(f"CPU with {new['cpu']} now, {old['cpu']} before: the last bits may differ")
        raise_all(problems, RunError)

    def _weigh(self, problem: str, problems: list[str]) -> None:
        if self.anyway:
            self.notes.append(f"{problem.split('; ')[0]}: bits may differ from those of the uninterrupted run")
        else:
            problems.append(problem)

    def lines(self) -> Iterator[str]:
        """What to tell the user before going on."""
        for path, reason in self.torn:
            yield f"{path.name} is torn ({reason}): going on from the one before"
        yield from (f"note: {note}" for note in self.notes)
        yield f"going on from step {self.step} ({self.path})"


_ANYWAY = "restore it, or add --resume-anyway: bits may differ then"


def find(config: RunConfig, *, anyway: bool = False) -> Resumption:
    """The checkpoint from which a run goes on.

    Args:
        config: the settings, learning rate resolved; ``out`` is the run.
        anyway: allow other versions of the libraries.

    Raises:
        RunError: there is no run or no checkpoint, the run is complete, or settings or libraries differ; all
            differences at once.
    """
    folder = config.out
    if not any((folder / name).exists() for name in (CONFIG, RECORD, CHECKPOINTS)):
        got = "not a run folder" if folder.exists() else "not there"
        raise RunError(describe(str(folder), got, "a run to go on with", "check the path, or drop --resume"))
    found = _newest(folder, anyway)
    _refuse_complete(folder, config, found)
    if found is None:
        result = run_folder.result_folder(folder)
        there = f"; there is {result.name}/, a result" if result is not None and result.parent == folder else ""
        got = f"no checkpoint to go on from{there}"
        do = "train again with --overwrite; save_steps says how often checkpoints are written"
        raise RunError(describe(str(folder), got, "a checkpoint", do))
    problems = config_problems(found.record.get("config") or {}, config)
    try:
        found.check_environment()
    except RunError as error:
        problems.append(str(error))
    raise_all(problems, RunError)
    return found


def _newest(folder: Path, anyway: bool) -> Resumption | None:
    torn: list[tuple[Path, str]] = []
    for path in reversed(checkpoint.checkpoints(folder / CHECKPOINTS)):
        facts, wrong = checkpoint.unseal(path)
        if wrong is None and "run" in facts:
            return Resumption(path, int(facts["step"]), facts["run"], facts["meter"], anyway, torn)
        torn.append((path, wrong or "not of a run"))
    if torn:
        text = ", ".join(f"{path.name} ({reason})" for path, reason in torn)
        got = f"no whole checkpoint: {text}"
        raise RunError(describe(str(folder), got, "a checkpoint as it was written", "train again with --overwrite"))
    return None


def _refuse_complete(folder: Path, config: RunConfig, found: Resumption | None) -> None:
    path = folder / RECORD
    try:
        done = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return
    if done.get("status") != "complete" or not run_folder.is_record_of(folder, done):
        return
    steps = int(done.get("steps") or 0)
    if found is not None and (found.step < steps or not _same_run(found.record, done)):
        # A later attempt, into the folder of an older result.
        return
    changed = [name for name in LENGTH if _plain_config(config)[name] != (done.get("config") or {}).get(name)]
    if changed and found is not None:
        return
    raise RunError(
        describe(
            str(folder),
            f"complete: {steps} steps, result in {run_folder.result_folder(folder)}",
            "an unfinished run",
            "use it as it is; a run of constant rate without warm-up can go on with a larger max_steps",
        )
    )


def _same_run(one: dict[str, Any], other: dict[str, Any]) -> bool:
    same_config = all(
        (one.get("config") or {}).get(name) == value
        for name, value in (other.get("config") or {}).items()
        if name not in FREE
    )
    hashes = [
        ((each.get("data") or {}).get("hash"), (each.get("base") or {}).get("content_hash")) for each in (one, other)
    ]
    return same_config and hashes[0] == hashes[1]


def config_problems(recorded: dict[str, Any], config: RunConfig) -> list[str]:
    """Every setting that decides the numbers and is not what it was."""
    now, problems = _plain_config(config), []
    constant = config.schedule == "constant" and config.warmup_ratio == 0
    for name, value in now.items():
        fields = type(config).model_fields
        before = recorded[name] if name in recorded else plain(fields[name].get_default(call_default_factory=True))
        if name in FREE or value == before or (name in LENGTH and constant):
            continue
        do = f"drop {name}, or begin a new run"
        if name in LENGTH:
            do += "; steps taken stay as they were only at a constant rate (schedule constant, warmup_ratio 0)"
        problems.append(describe(name, f"{value} now, {before} in the checkpoint", "the same", do))
    return problems


def _plain_config(config: RunConfig) -> dict[str, Any]:
    values: dict[str, Any] = plain(config.model_dump(mode="json"))
    return values


def _data_problems(name: str, was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    if was.get("hash") != now.get("hash"):
        where = f"{name} {now.get('path')}"
        got = f"other rows ({_short(now.get('hash'))}) than the run began with ({_short(was.get('hash'))})"
        return [describe(where, got, "the same file", f"give it with --{name.replace('_', '-')}, or begin a new run")]
    different = [key for key in _COUNTS if was.get(key) != now.get(key)]
    if not different:
        return []
    got = ", ".join(f"{key} {now.get(key)} now, {was.get(key)} before" for key in different)
    return [describe(f"{name} {now.get('path')}", got, "the same tokens", "restore the tokenizer and its template")]


def _method_problems(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    if was.get("name") != now.get("name"):
        # Told already: method is a setting.
        return []
    old, new = was.get("config") or {}, plain(now.get("config") or {})
    different = [key for key in sorted({*old, *new} - _PLACES) if old.get(key) != new.get(key)]
    return [
        describe(
            f"method {now.get('name')}",
            f"{key} {new.get(key)} now, {old.get(key)} in the checkpoint",
            "the same",
            "restore what decides it (options, base, library)",
        )
        for key in different
    ]


def _short(digest: Any) -> str:
    return str(digest)[:19] + "..." if digest else "unknown"
