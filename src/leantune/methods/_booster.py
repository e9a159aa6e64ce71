"""The boosters of one adapter in one layer: those that are finished, side by side, and the one in training."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor, nn

from leantune.methods._booster_start import aligned_share
from leantune.methods._selection import seeded

NO_ROUND = -1
Span = tuple[int, int]
"""Rounds ``[first, end)``, as XGBoost's ``iteration_range``."""


class Booster(nn.Module):
    """``sum of kept_B kept_A + scaling B A``; only ``A (r, in)`` and ``B (out, r)`` train.

    Attributes:
        A: of the booster in training.
        B: of the booster in training; zero at its start.
        kept_A: the finished ones, a row for each rank, ``(k, in)``.
        kept_B: the finished ones, ``(out, k)``, with everything that scales them inside.
        kept_round: the round in which each of the ``k`` was trained, ascending, int64.
        round: the round that the booster in training belongs to, ``(1,)``; -1 outside of a round.
        scaling: of the booster in training, ``alpha / r``.
        resting: another block trains in this round: the booster in training is zero and stays so.
        aligns: the booster in training takes its ``A`` from the gradient that it meets first.
        span: the rounds that count; None means all.
        working: ``W0 + kept_B kept_A`` in the base's dtype, where finished boosters are folded.
    """

    kept_A: Tensor
    kept_B: Tensor
    kept_round: Tensor
    round: Tensor
    working: Tensor | None

    def __init__(self, out_features: int, in_features: int, r: int, scaling: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(r, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, r))
        self.register_buffer("kept_A", torch.zeros(0, in_features))
        self.register_buffer("kept_B", torch.zeros(out_features, 0))
        self.register_buffer("kept_round", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("round", torch.tensor([NO_ROUND]))
        self.register_buffer("working", None, persistent=False)
        self.scaling = scaling
        self.resting = False
        self.aligns = False
        self._moved = False
        self.span: Span | None = None
        self._counting: slice | None = None
        self._current = True

    @property
    def rank(self) -> int:
        """The rank of the finished boosters together."""
        return len(self.kept_round)

    @property
    def next_round(self) -> int:
        """The first round that none of the finished ones here reaches."""
        return int(self.kept_round[-1]) + 1 if self.rank else 0

    @torch.no_grad()
    def start(self, seed: int, path: str, number: int) -> None:
        """Make the booster in training a fresh one: LoRA's start, ``A`` uniform in ``+-1/sqrt(in)`` and ``B`` zero.

        Args:
            seed: of the adapter.
            path: of the module; with seed and round it decides the numbers.
            number: the round.
        """
        noise = torch.rand(self.A.shape, generator=seeded("xgblora", "A", seed, path, number), dtype=torch.float64)
        self.A.copy_((2 * noise - 1) / self.A.shape[1] ** 0.5)
        self.B.zero_()
        self._moved = False

    @torch.no_grad()
    def keep(self, number: int, factor: float) -> None:
        """Append the booster in training, times a factor, to the finished ones; it is zero then.

        Args:
            number: the round in which it was trained.
            factor: shrinkage and the like, beside ``scaling``.
        """
        self.kept_A = torch.cat([self.kept_A, self.A.detach()])
        self.kept_B = torch.cat([self.kept_B, self.B.detach() * (self.scaling * factor)], 1)
        self.kept_round = torch.cat([self.kept_round, self.kept_round.new_full((len(self.A),), number)])
        self.rest()
        self.count(self.span)

    @torch.no_grad()
    def rest(self) -> None:
        """Take the booster out of training: zero, in no round, with no gradient left."""
        self.resting = True
        self.round.fill_(NO_ROUND)
        self.B.zero_()
        for parameter in (self.A, self.B):
            parameter.requires_grad_(False)
            parameter.grad = None

    def train_in(self, number: int) -> None:
        """Put the booster into training, in a round."""
        self.resting = False
        self.round.fill_(number)
        for parameter in (self.A, self.B):
            parameter.requires_grad_(True)
        self.count(self.span)

    def count(self, span: Span | None) -> None:
        """Let the rounds of a span count, or all (None); the place of their ranks is looked up once, here."""
        self.span = span
        self._counting, self._current = None, True
        if span is not None:
            rounds = self.kept_round.tolist() if self.rank else []
            self._counting = slice(bisect_left(rounds, span[0]), bisect_left(rounds, span[1]))
            self._current = not self.round.is_meta and span[0] <= int(self.round) < span[1]

    def used(self) -> tuple[Tensor, Tensor]:
        """``(kept_B, kept_A)`` of the rounds that count, contiguous: the same bits whatever stands beside them."""
        if self._counting is None:
            return self.kept_B, self.kept_A
        return self.kept_B[:, self._counting].contiguous(), self.kept_A[self._counting].contiguous()

    @property
    def current_counts(self) -> bool:
        """Whether the booster in training takes part."""
        return self._current and not self.resting

    def factors(self) -> tuple[Tensor, Tensor]:
        """``(B, A)`` of all that counts together, scaling inside ``B``."""
        B, A = self.used()
        if self.current_counts and (self.B.any() or not len(A)):
            B = torch.cat([B, self.B.detach() * self.scaling], 1)
            A = torch.cat([A, self.A.detach()])
        if not len(A):
            # No rank at all is nothing that a LoRA file can hold.
            return B.new_zeros(len(B), 1), A.new_zeros(1, A.shape[1])
        return B, A

    def share(self, x: Tensor, *, folded: bool = False) -> Tensor | None:
        """What the boosters add to the output, with ``folded`` the one in training alone; None for nothing."""
        x = x.to(self.A.dtype)
        B, A = self.used()
        kept = None
        if len(A) and not folded:
            kept = nn.functional.linear(nn.functional.linear(x, A), B)
        if not self.current_counts:
            return kept
        if self._meets_first_gradient():
            own = aligned_share(x, self)
        else:
            own = nn.functional.linear(nn.functional.linear(x, self.A), self.B) * self.scaling
        return own if kept is None else kept + own

    def _meets_first_gradient(self) -> bool:
        if not self.aligns or self._moved or not self.training or not torch.is_grad_enabled():
            return False
        # Not asked again once the answer is yes: it would have a GPU waited for in every forward.
        self._moved = bool(self.B.any())
        return not self._moved

    @torch.no_grad()
    def fold(self, weight: Tensor) -> None:
        """Build the working weight from the base's own and the float32 sum of what counts; the base is only read.

        Args:
            weight: the base weight, ``(out, in)``.
        """
        B, A = self.used()
        self.working = (weight.to(B.dtype) + B @ A).to(weight.dtype) if len(A) else None

    def drop(self) -> None:
        """Forget the rounds that do not count."""
        if self.span is None:
            return
        counts = (self.kept_round >= self.span[0]) & (self.kept_round < self.span[1])
        self.kept_A, self.kept_B = self.kept_A[counts], self.kept_B[:, counts].contiguous()
        self.kept_round = self.kept_round[counts]
        self.count(None)

    def copy_kept(self, other: Booster) -> None:
        """Take over the finished boosters of another one."""
        self.kept_A, self.kept_B = other.kept_A.clone(), other.kept_B.clone()
        self.kept_round, self.round = other.kept_round.clone(), other.round.clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        stored = state_dict.get(prefix + "kept_round")
        # How many there are, only the file knows.
        if stored is not None:
            count = stored.numel()
            self.kept_A = self.kept_A.new_zeros(count, self.kept_A.shape[1])
            self.kept_B = self.kept_B.new_zeros(self.kept_B.shape[0], count)
            self.kept_round = self.kept_round.new_zeros(count)
        self.working, self._moved = None, False
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.count(self.span)
