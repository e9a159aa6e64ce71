"""Loading without other packages' chatter: their progress bars and advice, held back for the length of a block."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*, bars: bool = False, stderr: bool = False) -> Iterator[None]:
    """Transformers says errors only inside the block, and is as talkative as before after it.

    Args:
        bars: leave the progress bars on (a download wants them).
        stderr: swallow what is written to stderr as well (the GGUF reader's bar has no switch of its own).
    """
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if had_bars and not bars:
        logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()) if stderr else contextlib.nullcontext():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars and not bars:
            logging.enable_progress_bar()
