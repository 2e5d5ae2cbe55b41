"""Current phase of this rank: set by the training thread, read by the watchdog's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Of these ordinary time limits hold; whatever has another name may take long.
STEP = "step"
FIRST_STEP = "first step"


@dataclass(frozen=True)
class _Moment:
    """One entry into a phase. Replaced as a whole, so that readers need no lock."""

    step: int  # the optimizer step in work
    phase: str  # `STEP`, `FIRST_STEP` or the name of something slow ("save")
    count: int  # phases entered so far, in the same order on every rank: one with less is behind
    since: float  # `time.monotonic()` of the entry


class Activity:
    """The present phase of the training thread."""

    def __init__(self) -> None:
        self.now = _Moment(0, "start", 0, time.monotonic())

    def enter(self, phase: str, step: int | None = None) -> None:
        """Begin a phase; counts as progress."""
        before = self.now
        number = before.step if step is None else step
        self.now = _Moment(number, phase, before.count + 1, time.monotonic())

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Enter a phase in the block, then return to the one before."""
        outer = self.now.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)
