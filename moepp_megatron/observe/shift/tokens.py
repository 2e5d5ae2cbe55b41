"""The series of the token ids of each batch: a multivariate EWMA.

A model learns a further text while evidence in its loss and routing is still adding up. The token
ids are what they are, so here evidence lasts as long as the change does.

Lowry, Woodall, Champ and Rigdon, A Multivariate Exponentially Weighted Moving Average Control
Chart, Technometrics 34 (1992).
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.shift.detector import ROWS, Detector, Numbers

GROUPS = 64
"""Groups of token ids; the number is that of `group_of`."""

# Weight of the newest step. Smaller finds smaller changes later.
_NEWEST = 0.1
# Usual steps that mean and spread look back on: a slow change of the data is followed.
_MEMORY = 500
# A group of few tokens differs by less than chance says, in units of what chance gives a large one.
_LEAST_SPREAD = 0.5
# A step counts for no more than so many standard deviations of usual distances above their mean,
# so that a single odd batch is no alarm.
_MOST = 4.0


def group_of(token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """[...] group of each token id: the upper bits of its product with 2^32 / golden ratio.

    Neighbouring ids, which tokenizers give to alike tokens, are in different groups (Knuth, The Art
    of Computer Programming 3, 6.4).
    """
    return (token_ids * 2654435769 & 0xFFFFFFFF) >> 26


class TokenDetector(Detector[Numbers, Numbers]):
    """Judges one step's token ids after the other.

    A step is the square roots of its groups' shares (Hellinger), times twice the square root of
    its tokens: by chance alone each number has the standard deviation 1, whatever the share. Mean
    and spread of each are learnt from the run's usual steps. The squared length of the EWMA of
    standardised steps, over the variance that the EWMA of independent steps has, is distributed as
    a multiple of a chi-square; which one follows from mean and variance of usual steps' own
    distances, because groups of real texts move together.
    """

    def __init__(self, settings: ShiftSection) -> None:
        super().__init__(ROWS["tokens"], settings)
        self._rare = NormalDist().inv_cdf(1.0 - 1.0 / settings.false_alarm_steps)
        self._forget()

    def _forget(self) -> None:
        self._usual, self._distances = _Moments(GROUPS), _Moments(1)
        self._over_limit = math.nan
        self._ewma, self._variance = np.zeros(GROUPS), 0.0

    @property
    def over_limit(self) -> float:
        """Evidence over its limit, at least 0; NaN before there is enough to compare with."""
        return self._over_limit

    @property
    def moved(self) -> float:
        """Share of the tokens apart that are in other groups than usual ones: total variation."""
        before = np.square(self._usual.mean)
        after = np.mean([counts / counts.sum() for counts in self._apart], axis=0)
        return float(np.abs(after - before / before.sum()).sum()) / 2.0

    def add(self, counts: Numbers) -> float:
        """Judge a step, [GROUPS] tokens of each group over all ranks, and learn from it.

        Returns:
            `over_limit`; a step without tokens changes nothing.
        """
        if counts.sum() > 0:
            self.see(counts)
        return self._over_limit

    def _compare(self, counts: Numbers) -> Numbers:
        """[GROUPS] deviation from the mean, in spreads of usual steps from the true mean."""
        total = counts.sum()
        away = 2.0 * (np.sqrt(counts) - math.sqrt(total) * self._usual.mean)
        return away / np.maximum(np.sqrt(self._usual.variance), _LEAST_SPREAD)

    @property
    def _is_known(self) -> bool:
        return self._distances.count + self._row.fewest >= self._row.judged

    def _usual_distance(self) -> tuple[float, float]:
        """Mean and spread of usual steps' squared distances, also if all steps are the same."""
        # The spread is at least that of groups which move independently.
        mean = max(float(self._distances.mean[0]), 1.0)
        return mean, max(math.sqrt(self._distances.variance[0]), mean * math.sqrt(2.0 / GROUPS))

    def _odd(self, step: Numbers) -> float:
        """How far a step is, over the most that counts."""
        mean, spread = self._usual_distance()
        return math.sqrt(float(step @ step) / (mean + _MOST * spread))

    def _is_odd(self, compared: Numbers) -> bool:
        return self._is_known and self._odd(compared) > self._row.odd

    def _judge(self, step: Numbers, compared: Numbers) -> None:
        if not self._is_known:
            return
        mean, spread = self._usual_distance()
        newest = _NEWEST * compared / max(self._odd(compared), 1.0)
        self._ewma = (1.0 - _NEWEST) * self._ewma + newest
        self._variance = (1.0 - _NEWEST) ** 2 * self._variance + _NEWEST**2
        # The mean is that of so many steps only.
        known = self._variance + 1.0 / self._usual.count
        found = float(self._ewma @ self._ewma) / known / mean
        limit = self._row.limit * _quantile(self._rare, spread / mean)
        self._over_limit = max(found - 1.0, 0.0) / (limit - 1.0)

    def _learn(self, counts: Numbers, compared: Numbers) -> None:
        if self._usual.count >= self._row.fewest:
            # As if the mean were exact.
            square = np.array([compared @ compared])
            self._distances.learn(square / (1.0 + 1.0 / self._usual.count))
        total = counts.sum()
        self._usual.learn(np.sqrt(counts / total), 4.0 * total)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, of plain numbers, the same on every rank."""
        return {
            "usual": self._usual.state(),
            "distances": self._distances.state(),
            "ewma": self._ewma.tolist(),
            "variance": self._variance,
            "apart": [counts.tolist() for counts in self._apart],
            "is_shift": self._is_shift,
            "over_limit": None if math.isnan(self._over_limit) else self._over_limit,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._usual.load(state["usual"])
        self._distances.load(state["distances"])
        self._ewma, self._variance = np.array(state["ewma"]), float(state["variance"])
        self._apart = [np.array(counts, dtype=np.float64) for counts in state["apart"]]
        self._is_shift, over_limit = bool(state["is_shift"]), state["over_limit"]
        self._over_limit = math.nan if over_limit is None else float(over_limit)


def _quantile(deviations: float, spread: float) -> float:
    """What a multiple of a chi-square exceeds as rarely as a normal number so many deviations."""
    # Of mean 1 and this spread; the cube root is nearly normal (Wilson and Hilferty 1931).
    part = spread * spread / 9.0
    return (1.0 - part + deviations * math.sqrt(part)) ** 3


class _Moments:
    """Running mean [size] of rows, and variance from the true mean times weight (West 1979)."""

    def __init__(self, size: int) -> None:
        self.count, self.mean, self.variance = 0, np.zeros(size), np.zeros(size)

    def learn(self, row: Numbers, weight: float = 1.0) -> None:
        """Learn from a row whose squared deviations are worth `weight`."""
        self.count = min(self.count + 1, _MEMORY)
        away = row - self.mean
        self.mean = self.mean + away / self.count
        if self.count > 1:
            squares = weight * np.square(away) * (self.count - 1) / self.count
            self.variance = self.variance + (squares - self.variance) / (self.count - 1)

    def state(self) -> list[Any]:
        """The state for a checkpoint."""
        return [self.count, self.mean.tolist(), self.variance.tolist()]

    def load(self, state: list[Any]) -> None:
        """Continue from `state`."""
        self.count = int(state[0])
        self.mean, self.variance = (np.array(row, dtype=np.float64) for row in state[1:])
