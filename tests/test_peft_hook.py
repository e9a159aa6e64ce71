"""What importing Leantune and PEFT together prints: nothing; and what it must not hold back."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from importlib.util import find_spec

import pytest

from leantune import _peft_hook

BEGINNINGS = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure"
}


def printed(script: str) -> str:
    """What a fresh interpreter, without warning options of ours, writes to stderr."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stderr


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("order", ["import leantune, peft", "import leantune; from leantune.methods import names"])
def test_importing_prints_nothing(order: str) -> None:
    assert printed(order) == ""


def test_that_line_alone_is_held_back(caplog: pytest.LogCaptureFixture) -> None:
    for name, line in BEGINNINGS.items():
        logger = logging.getLogger(name)
        logger.warning(line, "No module named 'kernels'")
        logger.warning("Failed to load %s", "libbitsandbytes_cpu.so")
        logging.getLogger("bitsandbytes").warning(line, "from elsewhere")
    assert [record.args for record in caplog.records] == [("libbitsandbytes_cpu.so",), ("from elsewhere",)]


def test_those_warnings_alone_are_held_back() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _peft_hook._quiet()
        _peft_hook._quiet()
        warnings.warn("`is_gradient_checkpointing` is deprecated and goes in 6", FutureWarning, stacklevel=1)
        warnings.warn("`broadcast_buffers` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("`is_gradient_checkpointing` is deprecated", UserWarning, stacklevel=1)
        warnings.warn("`another` is deprecated", FutureWarning, stacklevel=1)
    assert [str(each.message) for each in caught] == [
        "`is_gradient_checkpointing` is deprecated",
        "`another` is deprecated",
    ]
    assert sum(each is _peft_hook._is_news for each in logging.getLogger("bitsandbytes.backends.cpu.ops").filters) == 1
