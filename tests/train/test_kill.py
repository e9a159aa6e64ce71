"""A kill at any moment leaves the last good result, and nothing that only looks like one."""

from __future__ import annotations

import os
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
