"""Planted faults: each one must turn the suite red.

python tests/mutants/run.py                 all of them
python tests/mutants/run.py --only NAME     those whose name holds NAME
python tests/mutants/run.py --list          what they are
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from harness import HarnessError, Project, Verdict, run
from mutant import FAULTS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = Project(root=ROOT, source=ROOT / "src", package="leantune")


def line(verdict: Verdict) -> str:
    """One row of the table."""
    mark = {"caught": "caught  ", "survived": "SURVIVED", "error": "ERROR   "}[verdict.state]
    detail = verdict.detail.rpartition("/")[2] if verdict.state == "caught" else verdict.detail
    return f"{mark}  {verdict.fault.name:44} {verdict.seconds:4.0f} s  {detail}"


def main(arguments: list[str] | None = None) -> int:
    """Judge the faults; 0 when every one is caught."""
    parser = argparse.ArgumentParser(description="Planted faults; each must turn the suite red.")
    parser.add_argument("--only", default="", help="only faults whose name holds this text")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="copies tested side by side")
    parser.add_argument("--list", action="store_true", help="print the faults and what each would do, and stop")
    options = parser.parse_args(arguments)
    faults = [fault for fault in FAULTS if options.only in fault.name]
    if options.list:
        for fault in faults:
            print(f"{fault.name}\n    {fault.file}: {fault.why}")
        return 0
    if not faults:
        print(f"no fault has '{options.only}' in its name; --list prints them", file=sys.stderr)
        return 1
    start = time.monotonic()
    try:
        verdicts = run(PROJECT, faults, jobs=options.jobs, report=lambda verdict: print(line(verdict), flush=True))
    except HarnessError as error:
        print(error, file=sys.stderr)
        return 1
    caught = sum(verdict.state == "caught" for verdict in verdicts)
    print(f"{caught} of {len(verdicts)} planted faults caught, {time.monotonic() - start:.0f} s")
    return int(caught != len(verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
