"""Ctrl-C ends a run after the step in progress, so that what was learnt can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override


class Interrupt(TrainerCallback):
    """A context in which the first Ctrl-C asks training to stop and the second one stops it at once.

    Args:
        say: called with one line when the first Ctrl-C arrives.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        # Only the main thread may set a handler; elsewhere Ctrl-C stays what it is.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.say("Ctrl-C: stopping after this step and saving; once more to stop at once")

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> TrainerControl:
        """A step is done: stop here if asked to."""
        if self.requested:
            control.should_training_stop = True
        return control
