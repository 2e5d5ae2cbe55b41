"""Stopping on request: finish the step, save, leave with a status that means "resume later"."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.runtime.stop_signals import (
    REPEATED,
    SAME_INTERRUPT_S,
    acknowledge,
    heeded_signals,
)
from moepp_megatron.training.step_sums import shared_sum

# One request reaches a rank by several ways: Slurm signals every process of a job, and the launcher
# passes on what it got.
SAME_REQUEST_S = 10.0


class StopRequest:
    """Request to stop this run; a `step_sums.Summand`.

    The first of `STOP_SIGNALS` is remembered and the step continues; one that comes more than
    `SAME_REQUEST_S` later, unless it is one of `REPEATED`, ends the process at once. A process that
    trains by itself is ended by a second Ctrl-C at once; for ranks their launcher decides that.
    `seen` is true, on all ranks alike, if any was asked before the newest step's read.
    """

    def __init__(self) -> None:
        self.seen = False
        self._requested_at: float | None = None
        self._interrupted_at: float | None = None
        self._is_single_rank = not RankEnvironment.read().is_launched

    @contextmanager
    def listening(self) -> "Iterator[StopRequest]":
        """Handle the signals inside the block; the handlers before are put back afterwards."""
        before = {number: signal.signal(number, self._receive) for number in heeded_signals()}
        # The launcher holds them back until now; one that came meanwhile arrives here.
        mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, before)
        try:
            yield self
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number, handler in before.items():
                signal.signal(number, handler)

    def ask(self) -> None:
        """Ask this run to stop, as a signal to this rank does."""
        if self._requested_at is None:
            self._requested_at = time.monotonic()

    def agreed(self) -> bool:
        """True, on all ranks alike, if any rank was asked; every rank must call."""
        # A launcher does not reach all ranks between the same two steps: one that stopped by itself
        # would leave the others waiting for it.
        self.take_sum(shared_sum(self.summand()).cpu())
        return self.seen

    def summand(self) -> Tensor:
        """[1] float64 on the device, 1 where this rank was asked."""
        asked = float(self._requested_at is not None)
        return torch.full((1,), asked, dtype=torch.float64, device=torch.cuda.current_device())

    def take_sum(self, total: Tensor) -> None:
        """Note whether any rank was asked, given their number [1]."""
        self.seen = bool(total.item() > 0)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first, same_for = self._requested_at, SAME_REQUEST_S
        if number == signal.SIGINT and self._is_single_rank:
            first, same_for = self._interrupted_at, SAME_INTERRUPT_S
        if number not in REPEATED and first is not None and now - first > same_for:
            # Without cleaning up: whoever asks again does not want to wait.
            os._exit(128 + number)
        if number == signal.SIGINT and self._interrupted_at is None:
            self._interrupted_at = now
            if self._is_single_rank:
                acknowledge()
        if self._requested_at is None:
            self._requested_at = now
