"""What a run has used: tokens, padding, time, memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from leantune.data.packing import DOCUMENTS
from leantune.train.loss import IGNORED

_COUNTS = ("rows", "cells", "tokens", "loss_tokens")


@dataclass
class Meter:
    """Counts of the batches trained on.

    Attributes:
        rows: rows seen, a row of each epoch counted again.
        cells: positions computed, padding included.
        tokens: positions that are no padding.
        loss_tokens: tokens that carried loss.
        started: monotonic time at which training began.
        ended: the same for its end, None while it goes on.
        earlier: seconds of training before the checkpoint that this run went on from.
        preparing: seconds spent before training began, in all sessions.
    """

    rows: int = 0
    cells: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    ended: float | None = None
    earlier: float = 0.0
    preparing: float = 0.0

    def start(self) -> None:
        """Training begins now."""
        self.started, self.ended = time.perf_counter(), None

    def stop(self) -> None:
        """Training ends now."""
        self.ended = time.perf_counter()

    def add(self, batch: dict[str, Any]) -> None:
        """Count a batch; of a packed one the rows, not the packs."""
        labels = batch["labels"]
        if DOCUMENTS in batch:
            documents = batch[DOCUMENTS]
            real, rows = documents >= 0, int(documents.max()) + 1
        else:
            # An image counts as one token.
            real = batch.get("attention_mask", torch.ones_like(labels) if labels.dim() == 1 else None)
            rows = len(labels)
        self.rows += rows
        self.cells += real.numel()
        self.tokens += int(real.sum())
        if labels.dim() > 1:
            # The first token never carries loss, nor is it ever hidden.
            self.loss_tokens += int((labels[:, 1:] != IGNORED).sum())

    @property
    def counts(self) -> list[int]:
        """Rows, cells, tokens and loss tokens."""
        return [getattr(self, name) for name in _COUNTS]

    def join(self, counts: list[int]) -> None:
        """Add the counts of batches that were counted elsewhere, in other processes too."""
        for name, count in zip(_COUNTS, counts, strict=True):
            setattr(self, name, getattr(self, name) + count)

    @property
    def seconds(self) -> float:
        """Time since training began, or that it took, over all sessions of the run."""
        return self.earlier + self.session_seconds

    @property
    def session_seconds(self) -> float:
        """The same, since this process began to train."""
        return (time.perf_counter() if self.ended is None else self.ended) - self.started

    @property
    def total_seconds(self) -> float:
        """Time of the whole run until now: preparing, training, and what came after it."""
        return self.preparing + self.earlier + time.perf_counter() - self.started

    def state(self) -> dict[str, float]:
        """The counts, for a checkpoint."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {**counts, "seconds": self.seconds, "preparing": self.preparing}

    def go_on(self, state: dict[str, Any]) -> None:
        """Count on from the counts of a checkpoint."""
        for name in _COUNTS:
            setattr(self, name, int(state[name]))
        self.earlier, self.preparing = float(state["seconds"]), float(state["preparing"])

    @property
    def padding(self) -> float:
        """Share of the computed positions that were padding."""
        return 1 - self.tokens / self.cells if self.cells else 0.0


def reset_peak_memory() -> None:
    """Start measuring the peak from here, where the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        # Linux: 5 resets the high-water mark of this process's resident set.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes: of the allocator on a GPU, of the resident set on a CPU; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return _rusage_peak()
    return _rusage_peak()


def _rusage_peak() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    import sys

    # Kilobytes everywhere but on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
