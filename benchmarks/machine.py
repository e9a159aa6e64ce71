"""What a benchmark ran on: machine and versions, for the head of every result file."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("leantune", "torch", "transformers", "peft", "trl", "accelerate", "numpy")


def machine_facts(threads: int) -> dict[str, Any]:
    """Processor, cores, threads used, operating system, and versions of the packages that decide a number."""
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        models = [line.partition(":")[2].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def status_bytes(field: str) -> int:
    """A size that Linux knows of this process: ``VmRSS`` (resident now), ``VmHWM`` (the most so far).

    Raises:
        SystemExit: there is no such field, or no Linux.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"{status} has no {field}: this benchmark reads memory on Linux only")
