"""PEFT's own hub-free tests, from its source distribution at the installed version, on every adapter method of ours.

    python tests/conformance/run.py              every registered adapter method that is not PEFT's own
    python tests/conformance/run.py --control    stock LoRA through the same machinery: it must pass too
    python tests/conformance/run.py --update     write down which tests are selected (after a change of PEFT or cases)

Nothing of PEFT's is kept here: its tests are fetched into ``build/conformance`` and unpacked anew each time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "conformance"
LIST = HERE / "selected.txt"
LEAST_SELECTED = 300
MOST_PRINTED = 40
CONTROL = "lora"

PYTEST_INI = """\
[pytest]
markers =
    single_gpu_tests: of PEFT
    multi_gpu_tests: of PEFT
    regression: of PEFT
    bitsandbytes: of PEFT
"""
"""In the place of PEFT's own settings, which ask for coverage and make errors of other libraries' deprecations."""


class ConformanceError(Exception):
    """The tests cannot be fetched or run, or did not do what they must."""


@dataclass(frozen=True)
class Outcome:
    """What one run of PEFT's tests on one method came to."""

    method: str
    exit_code: int
    selected: list[str]
    outcomes: dict[str, str]
    skips: dict[str, int]
    seconds: float
    log: Path

    def count(self, state: str) -> int:
        """How many tests ended as ``state``: passed, skipped or failed."""
        return sum(each == state for each in self.outcomes.values())

    def line(self) -> str:
        """The counts in one line."""
        counts = "   ".join(f"{state} {self.count(state)}" for state in ("passed", "skipped", "failed"))
        return f"{self.method:12} selected {len(self.selected)}   {counts}   {self.seconds:.0f} s"


def fetch(peft_version: str) -> Path:
    """PEFT's source distribution, from the cache in ``build`` or by pip."""
    name = f"peft-{peft_version}.tar.gz"
    cached = BUILD / name
    if cached.exists():
        return cached
    BUILD.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(BUILD), f"peft=={peft_version}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0 or not cached.exists():
        raise ConformanceError(
            f"{name}: pip could not fetch it; PEFT's tests are only in its source distribution; "
            f"connect to a package index or pass --sdist PATH\n{done.stderr.strip()}"
        )
    return cached


@contextmanager
def prepare(sdist: Path, peft_version: str) -> Iterator[Path]:
    """A folder of this run alone, removed in the end, from which PEFT's tests run; the archive writes nowhere else."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="stage-", dir=BUILD, ignore_cleanup_errors=True) as folder:
        stage = Path(folder)
        unpack(sdist, peft_version, stage)
        yield stage


def unpack(sdist: Path, peft_version: str, stage: Path) -> None:
    """Unpack PEFT's tests, with settings of our own, into an empty folder."""
    root = f"peft-{peft_version}/"
    with tarfile.open(sdist) as archive:
        members = [each for each in archive.getmembers() if each.name.startswith(root + "tests/")]
        if not members:
            raise ConformanceError(
                f"{sdist}: no {root}tests in it; the tests of the installed PEFT {peft_version} are wanted; "
                "pass the source distribution of that version"
            )
        for member in members:
            member.name = member.name.removeprefix(root)
            archive.extract(member, stage, filter="data")
    (stage / "tests" / "__init__.py").touch()
    (stage / "pytest.ini").write_text(PYTEST_INI, encoding="utf-8")


def run(method: str, stage: Path) -> Outcome:
    """PEFT's tests on one method, in a process of its own that finds no Hub."""
    report, log = stage / f"{method}.json", BUILD / f"{method}.log"
    # Asking the Hub must fail at once and visibly, not wait for a connection.
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(HERE / "plugin.py"), str(stage), method, str(report)]
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            command, cwd=stage, env=os.environ | offline, stdout=stream, stderr=subprocess.STDOUT, check=False
        )
    if not report.exists():
        raise ConformanceError(f"{method}: no report (exit code {done.returncode}); see {log}\n{tail(log)}")
    seen = json.loads(report.read_text(encoding="utf-8"))
    return Outcome(method, **seen, seconds=time.monotonic() - start, log=log)


def tail(log: Path, lines: int = 40) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def read_list() -> dict[str, set[str]]:
    """The committed ids of selected tests, by method."""
    found: dict[str, set[str]] = {}
    if LIST.exists():
        for line in LIST.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                method, _, test = line.partition(" ")
                found.setdefault(method, set()).add(test)
    return found


def write_list(outcomes: list[Outcome], peft_version: str) -> None:
    """Write down the ids of the methods that ran; those of others stay."""
    known = read_list() | {each.method: set(each.selected) for each in outcomes}
    lines = [f"# PEFT {peft_version}: method and test. Written by `run.py --update`."]
    lines += [f"{method} {test}" for method in sorted(known) for test in sorted(known[method])]
    LIST.write_text("\n".join(lines) + "\n", encoding="utf-8")


def problems_of(outcome: Outcome, listed: set[str] | None) -> list[str]:
    """What is wrong with a run; empty when nothing is.

    Args:
        outcome: the run.
        listed: the committed ids, or None where none are kept: of stock PEFT, and of presets run by name.
    """
    problems = []
    if len(outcome.selected) < LEAST_SELECTED:
        problems.append(f"{len(outcome.selected)} tests selected; at least {LEAST_SELECTED} are wanted; add cases")
    if outcome.count("passed") < LEAST_SELECTED:
        problems.append(f"{outcome.count('passed')} tests passed; at least {LEAST_SELECTED} are wanted")
    failed = [test for test, state in outcome.outcomes.items() if state == "failed"]
    problems += [f"failed: {test}" for test in failed]
    unrun = set(outcome.selected) - set(outcome.outcomes)
    problems += [f"selected but not run: {test}" for test in sorted(unrun)]
    if outcome.exit_code != 0 and not failed:
        problems.append(f"pytest ended with exit code {outcome.exit_code}; see {outcome.log}\n{tail(outcome.log)}")
    if listed is not None:
        selected = set(outcome.selected)
        problems += [f"in {LIST.name} but not selected: {test}" for test in sorted(listed - selected)]
        problems += [f"selected but not in {LIST.name}: {test}" for test in sorted(selected - listed)]
    return problems


def methods_to_test() -> list[str]:
    """Registered adapter methods whose config is not PEFT's own; one name where several share a config."""
    from leantune import methods

    by_config: dict[type, str] = {}
    # A preset comes after the method whose config it shares.
    for method in sorted(map(methods.get, methods.names()), key=lambda each: len(each.options)):
        if method.is_adapter and not method.config.__module__.startswith("peft."):
            by_config.setdefault(method.config, method.name)
    return list(by_config.values())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="PEFT's own tests on the methods of leantune.")
    parser.add_argument("--sdist", type=Path, help="PEFT's source distribution; default: fetched by pip")
    parser.add_argument("--control", action="store_true", help="run stock LoRA instead of the methods of leantune")
    parser.add_argument("--method", action="append", help="only this method (repeatable)")
    parser.add_argument("--update", action="store_true", help=f"write the selected tests to {LIST.name}")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run, print the counts, and say what is wrong; 0 when nothing is."""
    options = parse(arguments)
    installed = version("peft")
    try:
        names = [CONTROL] if options.control else options.method or methods_to_test()
        outcomes = []
        with prepare(options.sdist or fetch(installed), installed) as stage:
            for name in names:
                outcomes.append(run(name, stage))
                print(outcomes[-1].line(), flush=True)
                for reason, count in outcomes[-1].skips.items():
                    print(f"{'':12} {count:4} skipped: {reason.removeprefix('Skipped: ')}")
    except ConformanceError as error:
        print(error, file=sys.stderr)
        return 1
    if options.update:
        write_list([each for each in outcomes if each.method in methods_to_test()], installed)
    committed = read_list()
    wrong = False
    for outcome in outcomes:
        listed = committed.get(outcome.method, set()) if outcome.method in methods_to_test() else None
        problems = problems_of(outcome, listed)
        wrong = wrong or bool(problems)
        for problem in problems[:MOST_PRINTED]:
            print(f"{outcome.method}: {problem}", file=sys.stderr)
        if len(problems) > MOST_PRINTED:
            print(f"{outcome.method}: and {len(problems) - MOST_PRINTED} more; see {outcome.log}", file=sys.stderr)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
