"""Plants faults in a copy of the source tree and asks whether the tests notice; the working tree is never touched.

A fault is a small change of text. Its old text must stand exactly once in its file, so that the list keeps in step
with the code. A suite that is green on the sound copy must turn red, by a failing test, on each faulty one: a file that
can no longer be imported, tests that cannot be collected, or a run that hangs proves nothing and is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 1200
TESTS_FAILED = 1


@dataclass(frozen=True)
class Fault:
    """One planted fault.

    Attributes:
        name: a few words, unique.
        file: below the source folder, with forward slashes.
        old: text that stands there exactly once.
        new: what takes its place.
        why: what goes wrong in the world when nobody notices.
        tests: files or node ids, relative to the project, that must notice.
        keyword: an expression for pytest's ``-k`` that narrows them.
    """

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]
    keyword: str = ""


@dataclass(frozen=True)
class Verdict:
    """What became of one fault: ``caught``, ``survived``, or ``error`` with its ``detail``."""

    fault: Fault
    state: str
    detail: str
    seconds: float


class HarnessError(Exception):
    """The faults do not fit the code, or the sound code is not green: nothing can be concluded."""


@dataclass(frozen=True)
class Project:
    """Where the code and its tests are.

    Attributes:
        root: the folder in which pytest runs.
        source: the folder that goes to ``PYTHONPATH``, e.g. ``src``.
        package: the package in it, to check that the copy is what gets imported.
    """

    root: Path
    source: Path
    package: str


def check(project: Project, faults: Sequence[Fault]) -> None:
    """Check that each fault still fits the code and has tests.

    Raises:
        HarnessError: all misfits, one a line.
    """
    problems = []
    names = [fault.name for fault in faults]
    problems += [f"{name}: two faults have this name" for name in sorted({n for n in names if names.count(n) > 1})]
    for fault in faults:
        path = project.source / fault.file
        found = path.read_text(encoding="utf-8").count(fault.old) if path.is_file() else None
        if found is None:
            problems.append(f"{fault.name}: {fault.file} is not there; give the file where that code lives now")
        elif found != 1:
            problems.append(
                f"{fault.name}: its text stands {found} times in {fault.file}, not once; bring it up to date"
            )
        if fault.old == fault.new:
            problems.append(f"{fault.name}: it changes nothing")
        for test in fault.tests:
            if not (project.root / test.partition("::")[0]).exists():
                problems.append(f"{fault.name}: no test {test}")
    if problems:
        raise HarnessError("\n".join(problems))


def run_tests(project: Project, tests: Sequence[str], keyword: str = "", fault: Fault | None = None) -> tuple[int, str]:
    """Run tests against a fresh copy of the source, with the fault planted; the exit code and the output.

    Raises:
        HarnessError: another copy than ours would be imported.
        subprocess.TimeoutExpired: the tests hang.
    """
    with tempfile.TemporaryDirectory(prefix="mutant-") as scratch:
        copy = Path(scratch) / "source"
        shutil.copytree(project.source, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        if fault is not None:
            path = copy / fault.file
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        # A bytecode file is matched by second and size: a planted fault can share both with the sound file.
        environment = os.environ | {
            "PYTHONPATH": str(copy),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": scratch,
        }
        _check_import(project, copy, environment)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
        command += [*(["-k", keyword] if keyword else []), *tests]
        done = subprocess.run(
            command,
            cwd=project.root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr


def _check_import(project: Project, copy: Path, environment: dict[str, str]) -> None:
    code = f"import importlib.util as u; print(u.find_spec({project.package!r}).origin)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project.root, env=environment, capture_output=True, text=True, check=False
    )
    origin = Path(done.stdout.strip() or ".").resolve()
    if not origin.is_relative_to(copy.resolve()):
        raise HarnessError(
            f"{project.package} would be imported from {origin}, not from the copy; {done.stderr.strip()}"
        )


def judge(project: Project, fault: Fault) -> Verdict:
    """Plant one fault and see whether its tests fail."""
    start = time.monotonic()
    try:
        code, output = run_tests(project, fault.tests, fault.keyword, fault)
    except subprocess.TimeoutExpired:
        return Verdict(fault, "error", f"still running after {TIMEOUT_S} s", time.monotonic() - start)
    seconds = time.monotonic() - start
    if code == 0:
        return Verdict(fault, "survived", "no test noticed", seconds)
    failed = re.search(r"^FAILED (\S+)", output, flags=re.MULTILINE)
    if code != TESTS_FAILED or failed is None:
        last = "\n".join(output.strip().splitlines()[-15:])
        return Verdict(fault, "error", f"pytest ended with {code}, without a failing test:\n{last}", seconds)
    return Verdict(fault, "caught", failed.group(1), seconds)


def run(
    project: Project, faults: Sequence[Fault], *, jobs: int = 1, report: Callable[[Verdict], None] = lambda _: None
) -> list[Verdict]:
    """Check the faults, see the sound copy green, then judge each fault.

    Args:
        project: the code and its tests.
        faults: what to plant, one at a time.
        jobs: how many copies are tested side by side.
        report: called with each verdict as it comes.

    Raises:
        HarnessError: a fault does not fit, or the sound copy is not green.
    """
    check(project, faults)
    verdicts = []
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        list(pool.map(lambda suite: _see_green(project, *suite), _suites(faults, jobs)))
        for verdict in pool.map(lambda fault: judge(project, fault), faults):
            report(verdict)
            verdicts.append(verdict)
    return verdicts


def _suites(faults: Sequence[Fault], jobs: int) -> list[tuple[list[str], str]]:
    """Every test that the faults name, each once, in about ``jobs`` equal runs; narrowed ones by their keyword."""
    plain = sorted({test for fault in faults for test in fault.tests if not fault.keyword})
    narrowed = sorted({(fault.tests, fault.keyword) for fault in faults if fault.keyword})
    shares = [plain[first::jobs] for first in range(jobs)]
    return [(share, "") for share in shares if share] + [(list(tests), keyword) for tests, keyword in narrowed]


def _see_green(project: Project, tests: list[str], keyword: str) -> None:
    try:
        code, output = run_tests(project, tests, keyword)
    except subprocess.TimeoutExpired as error:
        raise HarnessError(f"the sound code is still being tested after {TIMEOUT_S} s: {' '.join(tests)}") from error
    if code != 0:
        last = "\n".join(output.strip().splitlines()[-25:])
        raise HarnessError(f"the sound code is not green (pytest ended with {code}); mend that first\n{last}")
