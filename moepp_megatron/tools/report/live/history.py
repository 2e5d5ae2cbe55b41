"""The part of a run's records that the monitor keeps: the newest of each number."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from moepp_megatron.observe.metrics import StepMetrics

# Enough steps that one slow one (a checkpoint, an evaluation) does not move the estimate.
_RECENT = 20


class History:
    """The records so far; a record of an earlier step undoes those from that step on.

    Attributes:
        recent: The last records, steps strictly increasing.
        latest: The newest value under each key; not every record has every key.
        rolled_back: The steps from and to which the run last went back; None if it never did.
        first_bad_step: First step of the present sequence of losses that are not finite; None if
            the newest is finite.
    """

    def __init__(self) -> None:
        self._clear()
        self.rolled_back: tuple[int, int] | None = None
        self._step_before_rewrite: int | None = None

    def _clear(self) -> None:
        self.recent: deque[StepMetrics] = deque(maxlen=_RECENT)
        self.latest: dict[str, Any] = {}
        self.first_bad_step: int | None = None

    @property
    def newest(self) -> StepMetrics | None:
        """The last record; None before the first."""
        return self.recent[-1] if self.recent else None

    def start_over(self) -> None:
        """Discard all records, because their file has been replaced."""
        self._step_before_rewrite = self.newest.step if self.newest is not None else None
        self._clear()

    def finish_rewrite(self) -> None:
        """Note, after the new file is read, whether it ends earlier than the old one did."""
        before = self._step_before_rewrite
        now = self.newest.step if self.newest is not None else 0
        if before is not None and now <= before:
            self.rolled_back = (before, now)

    def add(self, record: StepMetrics) -> None:
        """Take the next record of the file."""
        if self.newest is not None and record.step <= self.newest.step:
            self.rolled_back = (self.newest.step, record.step - 1)
            while self.recent and self.recent[-1].step >= record.step:
                self.recent.pop()
        self.recent.append(record)
        self.latest.update((key, value) for key, value in record if value is not None)
        if math.isfinite(record.loss):
            self.first_bad_step = None
        elif self.first_bad_step is None:
            self.first_bad_step = record.step

    @property
    def step_time_s(self) -> float:
        """Median time of a step over the last records; NaN before the first."""
        return median(r.step_time_s for r in self.recent) if self.recent else math.nan

    @property
    def record_interval_s(self) -> float:
        """Training time between two of the last records; NaN before the first."""
        if not self.recent:
            return math.nan
        gaps = max(1, len(self.recent) - 1)
        return self.step_time_s * max(1.0, (self.recent[-1].step - self.recent[0].step) / gaps)
