"""The part of a run's records that a live view keeps: a few numbers, and the newest record."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any

from moepp_megatron.observe.metrics import StepMetrics

# Enough steps that one slow one (a checkpoint, an evaluation) does not move the estimate.
_RECENT = 20
_LARGEST = 2**63


class History:
    """The records so far; a record of an earlier step undoes those from that step on.

    Attributes:
        steps: Steps of the records, strictly increasing.
        loss: Language-model loss of each, nats.
        valid_loss: Validation loss of each; NaN where it was not evaluated.
        ffn_fraction: FFN share of all selections of each.
        newest: The last record; None before the first.
        latest: The newest number under each key; not every record has every key.
        latest_lists: The same for keys that hold lists, or lists by name.
        went_back: The steps from and to which the run last went back; None if it never did.
        first_bad_step: First step of the present sequence of losses that are not finite; None if
            the newest is finite.
    """

    def __init__(self) -> None:
        self._clear()
        self.went_back: tuple[int, int] | None = None
        self._step_before_rewrite: int | None = None

    def _clear(self) -> None:
        self.steps = array("q")
        self.loss = array("d")
        self.valid_loss = array("d")
        self.ffn_fraction = array("d")
        self._energy_j = array("d")
        self._gpu_hours = array("d")
        self._recent: deque[StepMetrics] = deque(maxlen=_RECENT)
        self.newest: StepMetrics | None = None
        self.latest: dict[str, float] = {}
        self.latest_lists: dict[str, list[Any] | dict[str, list[Any]]] = {}
        self.first_bad_step: int | None = None

    def start_over(self) -> None:
        """Discard all records, because their file has been replaced."""
        self._step_before_rewrite = self.newest.step if self.newest is not None else None
        self._clear()

    def finish_rewrite(self) -> None:
        """Note, after the new file is read, whether it ends earlier than the old one did."""
        before = self._step_before_rewrite
        now = self.newest.step if self.newest is not None else 0
        if before is not None and now <= before:
            self.went_back = (before, now)

    def add(self, record: StepMetrics) -> None:
        """Takes the next record of the file."""
        if self.steps and record.step <= self.steps[-1]:
            self.went_back = (self.steps[-1], record.step - 1)
            self._undo(record.step)
        self.steps.append(record.step)
        self.loss.append(record.loss)
        self.valid_loss.append(math.nan if record.valid_loss is None else record.valid_loss)
        self.ffn_fraction.append(record.ffn_fraction)
        self._energy_j.append(record.energy_j or 0.0)
        self._gpu_hours.append(record.gpu_hours or 0.0)
        self._recent.append(record)
        self.newest = record
        self.latest.update(_numbers(record))
        self.latest_lists.update((k, v) for k, v in record if isinstance(v, list | dict))
        if math.isfinite(record.loss):
            self.first_bad_step = None
        elif self.first_bad_step is None:
            self.first_bad_step = record.step

    def _undo(self, step: int) -> None:
        """Drops the records from `step` on."""
        columns: tuple[array[float] | array[int], ...] = (
            self.steps,
            self.loss,
            self.valid_loss,
            self.ffn_fraction,
            self._energy_j,
            self._gpu_hours,
        )
        keep = len(self.steps)
        while keep and self.steps[keep - 1] >= step:
            keep -= 1
        for column in columns:
            del column[keep:]
        while self._recent and self._recent[-1].step >= step:
            self._recent.pop()

    @property
    def step_time_s(self) -> float:
        """Median time of a step over the last records; NaN before the first."""
        return median(r.step_time_s for r in self._recent) if self._recent else math.nan

    @property
    def tokens_per_s(self) -> float:
        """Median throughput over the last records; NaN before the first."""
        return median(r.tokens_per_s for r in self._recent) if self._recent else math.nan

    @property
    def record_interval_s(self) -> float:
        """Training time between two of the last records; NaN before the first."""
        if not self._recent:
            return math.nan
        first, last = self._recent[0], self._recent[-1]
        gaps = max(1, len(self._recent) - 1)
        return self.step_time_s * max(1.0, (last.step - first.step) / gaps)

    @property
    def energy_j(self) -> float:
        """Energy of all records' steps, J; 0 where it is not measured."""
        return sum(self._energy_j)

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all records' steps; 0 where they are not counted."""
        return sum(self._gpu_hours)

    def last_valid_loss(self) -> tuple[int, float] | None:
        """Step and value of the last evaluation."""
        for step, value in zip(reversed(self.steps), reversed(self.valid_loss), strict=True):
            if not math.isnan(value):
                return step, value
        return None


def _numbers(record: StepMetrics) -> Iterable[tuple[str, float]]:
    for key, value in record:
        # A whole number of any size is JSON, and no float holds it.
        if isinstance(value, float) or (type(value) is int and abs(value) < _LARGEST):
            yield key, value
