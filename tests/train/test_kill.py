"""A kill at any moment leaves the last good result, and nothing that only looks like one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_whatever_is_there_after_a_kill_loads(llama_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    victim = Path(__file__).with_name("victim.py")
    command = [sys.executable, str(victim), str(llama_folder), str(rows_file), str(tmp_path / "run"), "12", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = done.stdout.split("\n")[:-1]
    assert len(found) == 12
    assert found[-1].startswith("adapter"), "in twelve rounds some run was completed"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(
    llama_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    survivor = Path(__file__).with_name("survivor.py")
    command = [sys.executable, str(survivor), str(llama_folder), str(rows_file), str(tmp_path), "3"]
    paths = os.pathsep.join([str(survivor.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    killed = re.fullmatch(r"killed (\d+) times, the same bits\n", done.stdout)
    assert killed is not None, done.stdout
    assert int(killed[1]) >= 1
