"""Stopping on request: finish the step, save, leave with a status that means "run again"."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this run was asked to stop.

    The first SIGTERM or SIGUSR1 is remembered and the step goes on; a second one ends the process
    at once.
    """

    def __init__(self) -> None:
        self._signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals inside the block; the handlers before are put back afterwards."""
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any rank was asked; every rank must call, and all get the same answer.

        A launcher does not reach all ranks between the same two steps: one that stopped alone
        would leave the others waiting for it.
        """
        asked = torch.tensor([self._signal is not None], dtype=torch.int32)
        asked = asked.to(torch.cuda.current_device())
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            # Without cleaning up: whoever asks twice does not want to wait.
            os._exit(128 + number)
        self._signal = number
