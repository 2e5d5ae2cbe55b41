"""The interface of sinks for records, and a sink that retries on a full disk."""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from moepp_megatron.observe.metrics import StepMetrics

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Receives the record of every logged step. One rank of a run owns the sinks."""

    def write(self, record: StepMetrics) -> None:
        """Receive one record."""

    def go_back(self, step: int) -> None:
        """Note that the run went back to the state after `step`: later records do not count."""

    def close(self) -> None:
        """End the sink; nothing is written after it."""


class RetryingSink:
    """Passes records to a sink on a disk, in order, without loss while the process lives.

    A full disk must not end a training run that could continue; at the end of the run it must not
    pass unnoticed either.

    Args:
        sink: The sink; it raises OSError for a record that it could not write, and is then
            unchanged.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._waiting: deque[Callable[[], None]] = deque()

    def write(self, record: StepMetrics) -> None:
        """Write one record; prints a message each time that records have to wait."""
        self._take(functools.partial(self._sink.write, record), record.step)

    def go_back(self, step: int) -> None:
        """Note that the run went back; waiting records are written before that."""
        self._take(functools.partial(self._sink.go_back, step), step)

    def close(self) -> None:
        """Write waiting records and close the sink.

        Raises:
            OSError: If the disk still fails; the waiting records are lost.
        """
        try:
            self._write_waiting()
        finally:
            self._sink.close()

    def _take(self, entry: Callable[[], None], step: int) -> None:
        self._waiting.append(entry)
        try:
            self._write_waiting()
        except OSError as error:
            logger.error(
                "step %d: %d records of metrics wait for the disk: %s",
                step,
                len(self._waiting),
                error,
            )

    def _write_waiting(self) -> None:
        while self._waiting:
            self._waiting[0]()
            self._waiting.popleft()
