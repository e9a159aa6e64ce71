"""Ctrl-C, or a preemption (SIGTERM), ends a run after the step in progress, so that what was learnt can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from leantune.train import distributed


class Interrupt(TrainerCallback):
    """A context in which the first Ctrl-C asks training to stop and the second one stops it at once.

    SIGTERM asks too, however often it comes: what sends it will not wait for long anyway.

    Args:
        say: called with one line when the first signal arrives.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether training was asked to stop."""
        return self.signal is not None

    def __enter__(self) -> Interrupt:
        # Only the main thread may set a handler; elsewhere Ctrl-C stays what it is.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None stands for one that was not set from Python and cannot be put back.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signal = signal.Signals(number)
        name, more = ("Ctrl-C", "; once more to stop at once") if number == signal.SIGINT else (self.signal.name, "")
        self.say(f"{name}: stopping after this step and saving{more}")

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> TrainerControl:
        """A step is done: if asked to, write a checkpoint and stop here."""
        # A signal may reach one process and not the others, and all of them must stop after the same step.
        asked = distributed.largest(self.signal or 0, args.device)
        if asked:
            self.signal = signal.Signals(asked)
            control.should_save = True
            control.should_training_stop = True
        return control
