"""Cells of a long benchmark: each in a fresh process on one thread, kept in a file, so that a stopped one goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


class Cells:
    """The cells done so far, one file each, so that several processes can share the work.

    Args:
        folder: where their files are.
        script: run as ``script --cell JSON``, prints the result as its last line, one JSON object.
    """

    def __init__(self, folder: Path, script: str) -> None:
        self.folder = folder
        self.script = script
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, cell: Cell) -> Path:
        """The file of a cell, named by its values."""
        words = (f"{value:g}" if isinstance(value, float) else str(value) for value in cell.values())
        return self.folder / ("-".join(words).replace("/", "_") + ".json")

    def result(self, cell: Cell) -> dict[str, Any]:
        """The result of a cell: from its file, or from a fresh process.

        Raises:
            SystemExit: the process failed; the end of what it said is shown.
        """
        path = self.path(cell)
        if path.exists():
            return json.loads(path.read_text())["result"]  # type: ignore[no-any-return]
        print("running", cell, file=sys.stderr, flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, self.script, "--cell", json.dumps(cell)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"cell {cell} failed:\n{done.stderr[-4000:]}")
        result = json.loads(done.stdout.splitlines()[-1])
        temporary = path.with_suffix(f".tmp-{os.getpid()}")
        temporary.write_text(json.dumps({"cell": cell, "result": result}, indent=1) + "\n")
        temporary.replace(path)
        return result  # type: ignore[no-any-return]

    def restore(self, done: list[Any]) -> None:
        """Write the files of cells that a committed result holds and this folder lacks."""
        for each in done:
            path = self.path(each["cell"])
            if not path.exists():
                path.write_text(json.dumps(each, indent=1) + "\n")

    def all(self) -> list[Any]:
        """Every cell done, with its result."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]


def tune(loss_at: Callable[[float], float], rates: Sequence[float]) -> tuple[float, dict[float, float]]:
    """The rate with the lowest loss, and the loss at each rate tried.

    A winner at the edge of the grid widens it by a factor of two, until it is not at the edge.

    Args:
        loss_at: of a learning rate; infinity where training diverged.
        rates: the grid, log-spaced.
    """
    losses = {rate: loss_at(rate) for rate in rates}
    while True:
        best = min(losses, key=losses.__getitem__)
        if best not in (min(losses), max(losses)):
            return best, dict(sorted(losses.items()))
        wider = best / 2 if best == min(losses) else best * 2
        losses[wider] = loss_at(wider)


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean of values over seeds with its 95% interval by Student's t; no interval of a single one."""
    import numpy as np
    from scipy import stats

    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return {"mean": mean, "interval_95": None, "n": len(array)}
    half = float(stats.t.ppf(0.975, len(array) - 1) * stats.sem(array))
    return {"mean": mean, "interval_95": [mean - half, mean + half], "n": len(array)}
