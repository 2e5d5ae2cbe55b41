"""Detects a shift of one series of a run, step after step.

Evidence of a change adds up over steps: the one-sided CUSUM (Page 1954).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.config.schema.routing_guard import ShiftSection

Numbers = NDArray[np.float64]

# Of every deviation so much is usual and does not count: a change of two standard deviations is
# found soonest with 1.
_ALLOWANCE = 1.0
# One step may count for no more, so that a single odd batch is no alarm.
_MOST = 6.0
# Evidence beyond this many limits is forgotten, and all of it after `QUIET` steps in a row without
# any: or the end of a long change would be reported late.
_MOST_LIMITS = 1.5
QUIET = 4
# The limit is `_OFFSET + _SLOPE ln N` for one false alarm in N steps. Normal deviations would have
# the slope 1 / (2 _ALLOWANCE) (Siegmund 1985); with a median and a spread that are learnt from 40
# steps and with the tails of real batches it is larger: docs/routing_shift.md.
_OFFSET, _SLOPE = -0.75, 0.95
# Evidence over its limit from which steps are not learnt from until they prove to be usual.
_SUSPECT = 0.75
_LEAST_MEMORY = 40


@dataclass(frozen=True)
class Row:
    """The settings of a kind of series.

    Attributes:
        fewest: Usual steps that are compared with, at least.
        judged: Usual steps whose distances must be known before a step is judged.
        limit: Factor on the limit of the evidence, as the configuration gives it.
        odd: Distance from usual steps, in the series' own unit, from which a step is not learnt
            from, whatever the evidence: it must not move what others are compared with.
        patience: Steps apart without an alarm after which they are learnt from all the same; None:
            as many as are remembered.
        after_shift: Newest of the steps apart that are learnt from when a shift is over.
        compares_again: Whether the step that ends a suspicion is compared again with what has been
            learnt from the steps apart, before it is learnt from.
        lag: Newest usual steps that are not compared with yet; None: by the configuration.
    """

    fewest: int
    judged: int
    limit: float
    odd: float
    patience: float | None
    after_shift: int
    compares_again: bool
    lag: int | None = None


ROWS = {
    # Routers change their experts by themselves, above all in the first hundreds of steps: without
    # the loss so many times the evidence is needed.
    "routing": Row(
        fewest=12, judged=20, limit=2.5, odd=4.0, patience=15, after_shift=QUIET - 1,
        compares_again=False,
    ),
    # Residuals from a line that ends earlier move together and so add up sooner. It ends earlier so
    # that the first steps of a change, which are not suspect by themselves, do not bend it.
    "source": Row(
        fewest=12, judged=30, limit=1.35, odd=4.0, patience=math.inf, after_shift=QUIET - 1,
        compares_again=True, lag=5,
    ),
    # Its distance is relative to the most that one step may count for.
    "tokens": Row(
        fewest=20, judged=80, limit=1.0, odd=1.0, patience=None, after_shift=0,
        compares_again=True,
    ),
}  # fmt: skip
"""Settings by kind of series; `routing` holds for the loss of all data, which it is judged with."""


def steps_remembered(settings: ShiftSection) -> int:
    """Steps that tell how much usual steps differ."""
    return max(settings.memory * settings.window, _LEAST_MEMORY)


def limit_for(false_alarm_steps: float) -> float:
    """The evidence, in standard deviations, that chance exceeds once in so many steps."""
    return _OFFSET + _SLOPE * math.log(false_alarm_steps)


def steps_of_chance(evidence: float) -> float:
    """Steps in which chance exceeds this evidence once; undoes `limit_for`."""
    return math.exp(min((evidence - _OFFSET) / _SLOPE, 300.0))


class Cusum:
    """Adds up deviations beyond the allowance, never below 0; above `limit` is a change."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self.evidence = 0.0
        # Steps in a row that were below the allowance.
        self._quiet = 0

    @property
    def over_limit(self) -> float:
        """The evidence over the limit."""
        return self.evidence / self._limit

    def add(self, deviation: float) -> None:
        """Add a step's deviation, in standard deviations."""
        total = self.evidence + min(deviation, _MOST) - _ALLOWANCE
        self.evidence = min(max(total, 0.0), _MOST_LIMITS * self._limit)
        self._quiet = self._quiet + 1 if deviation < _ALLOWANCE else 0
        if self._quiet >= QUIET:
            self.evidence = 0.0

    def clear(self) -> None:
        """Forget the evidence."""
        self.evidence, self._quiet = 0.0, 0

    def state(self) -> list[float]:
        """The state for a checkpoint."""
        return [self.evidence, self._quiet]

    def load(self, state: list[float]) -> None:
        """Continue from `state`; beyond a limit that has become smaller, from that."""
        self.evidence = min(float(state[0]), _MOST_LIMITS * self._limit)
        self._quiet = int(state[1])


class Detector[StepT, ComparedT](ABC):
    """Judges one step after the other.

    A step is compared with what is usual, which gives evidence that adds up. While there is
    evidence, steps are kept apart. They are learnt from if the evidence goes away; if a shift has
    lasted for as long as steps are remembered, they are what is usual from then on.
    """

    def __init__(self, row: Row, settings: ShiftSection) -> None:
        self._row, self._memory = row, steps_remembered(settings)
        self._patience = self._memory if row.patience is None else row.patience
        self._apart: list[StepT] = []
        # Whether there has been an alarm while they are apart.
        self._is_shift = False

    @property
    @abstractmethod
    def over_limit(self) -> float:
        """Evidence over its limit; above 1 is a shift; NaN where nothing is judged yet."""

    @property
    def has_shifted(self) -> bool:
        """Whether the newest step is one of a shift."""
        return self.over_limit > 1.0 and bool(self._apart)

    @property
    def steps(self) -> int:
        """Newest steps that are under suspicion."""
        return len(self._apart)

    def see(self, step: StepT) -> None:
        """Judge a step and learn from it."""
        compared = self._compare(step)
        self._judge(step, compared)
        self._is_shift = self._is_shift or self.over_limit > 1.0
        if self.over_limit > _SUSPECT or self._is_odd(compared):
            # Bounded, because with a fixed reference a shift may last for ever.
            self._apart = [*self._apart, step][-self._memory :]
            if not self._is_shift and len(self._apart) >= self._patience:
                self._settle()
            elif len(self._apart) >= self._memory and not self._is_fixed:
                self._accept()
            return
        self._settle()
        self._learn(step, self._compare(step) if self._row.compares_again else compared)

    def _settle(self) -> None:
        """The evidence has gone: learn from the steps apart, but not from those of a shift."""
        apart, self._apart = self._apart, []
        if self._is_shift:
            apart, self._is_shift = apart[max(len(apart) - self._row.after_shift, 0) :], False
        for step in apart:
            compared = self._compare(step)
            if not self._is_odd(compared):
                self._learn(step, compared)

    def _accept(self) -> None:
        """The steps apart are what is usual from now on."""
        apart, self._apart, self._is_shift = self._apart, [], False
        self._forget()
        for step in apart:
            self._learn(step, self._compare(step))

    @property
    def _is_fixed(self) -> bool:
        """Whether what is usual stays what it is."""
        return False

    @abstractmethod
    def _compare(self, step: StepT) -> ComparedT:
        """What the step differs from usual ones by."""

    @abstractmethod
    def _judge(self, step: StepT, compared: ComparedT) -> None:
        """Add the step's evidence."""

    @abstractmethod
    def _is_odd(self, compared: ComparedT) -> bool:
        """Whether the step must not move what others are compared with."""

    @abstractmethod
    def _learn(self, step: StepT, compared: ComparedT) -> None:
        """The step is usual."""

    @abstractmethod
    def _forget(self) -> None:
        """Nothing is usual any more, and there is no evidence."""
