"""Evidence of a change that adds up over steps: the one-sided CUSUM (Page 1954)."""

from __future__ import annotations

import math

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
