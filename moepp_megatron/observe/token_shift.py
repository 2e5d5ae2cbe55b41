"""Detects shifts of the data by the token ids of each batch: a multivariate EWMA.

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
from moepp_megatron.observe.course import Row
from moepp_megatron.observe.usage_noise import least_steps

GROUPS = 64
"""Groups of token ids; the number is that of `group_of`."""

# Weight of the newest step. Smaller finds smaller changes later.
_NEWEST = 0.1
# Usual steps before spreads are good enough for distances, and distances for a judgement.
_FEWEST, _FEWEST_JUDGED = 20, 80
# Usual steps that mean and spread look back on: a slow change of the data is followed.
_MEMORY = 500
# A group of few tokens differs by less than chance says, in units of what chance gives a large one.
_LEAST_SPREAD = 0.5
# A step counts for no more than so many standard deviations of usual distances above their mean,
# so that a single odd batch is no alarm.
_MOST = 4.0
# Evidence over its limit from which steps are not learnt from until they prove to be usual.
_SUSPECT = 0.75


def group_of(token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """[...] group of each token id: the upper bits of its product with 2^32 / golden ratio.

    Neighbouring ids, which tokenizers give to alike tokens, are in different groups (Knuth, The Art
    of Computer Programming 3, 6.4).
    """
    return (token_ids * 2654435769 & 0xFFFFFFFF) >> 26


class TokenShift:
    """Judges one step's token ids after the other.

    A step is the square roots of its groups' shares (Hellinger), times twice the square root of
    its tokens: by chance alone each number has the standard deviation 1, whatever the share. Mean
    and spread of each are learnt from the run's usual steps. The squared length of the EWMA of
    standardised steps, over the variance that the EWMA of independent steps has, is distributed as
    a multiple of a chi-square; which one follows from mean and variance of usual steps' own
    distances, because groups of real texts move together.

    Steps under suspicion are kept apart. They are learnt from once the evidence is gone, unless
    there was an alarm; an alarm that has lasted for `memory` windows is over, and the steps since
    are what is usual.

    Args:
        settings: Settings `false_alarm_steps`, `memory` and `window` of the configuration.

    Attributes:
        over_limit: Evidence over its limit, at least 0; above 1 is a shift; NaN before there is
            enough to compare with.
    """

    def __init__(self, settings: ShiftSection) -> None:
        self._patience = least_steps(settings)
        self._rare = NormalDist().inv_cdf(1.0 - 1.0 / settings.false_alarm_steps)
        self._usual, self._distances = _Moments(GROUPS), _Moments(1)
        self._apart: list[Row] = []
        self._is_shift = False
        self._forget()

    def _forget(self) -> None:
        self.over_limit = math.nan
        self._ewma, self._variance = np.zeros(GROUPS), 0.0

    @property
    def steps(self) -> int:
        """Newest steps that are under suspicion."""
        return len(self._apart)

    @property
    def moved(self) -> float:
        """Share of the tokens apart that are in other groups than usual ones: total variation."""
        before = np.square(self._usual.mean)
        after = np.mean([counts / counts.sum() for counts in self._apart], axis=0)
        return float(np.abs(after - before / before.sum()).sum()) / 2.0

    def add(self, counts: NDArray[np.float64]) -> float:
        """Judge a step and learn from it.

        Args:
            counts: [GROUPS] tokens of each group, over all ranks.

        Returns:
            `over_limit`.
        """
        if counts.sum() == 0:
            return self.over_limit
        is_odd = self._judge(counts)
        self._is_shift = self._is_shift or self.over_limit > 1.0
        if is_odd or self.over_limit > _SUSPECT:
            self._apart.append(counts)
            if len(self._apart) < self._patience:
                return self.over_limit
            if self._is_shift:
                self._begin_anew()
            self._settle()
        else:
            self._settle()
            self._learn(counts)
        return self.over_limit

    def _begin_anew(self) -> None:
        """The steps apart are what is usual from now on."""
        self._usual, self._distances, self._is_shift = _Moments(GROUPS), _Moments(1), False
        self._forget()

    def _settle(self) -> None:
        """Learn from the steps apart, but not from those of a shift that is over."""
        apart, self._apart = self._apart, []
        for counts in apart:
            if not self._is_shift and not self._odd(self._standardised(counts)) > 1.0:
                self._learn(counts)
        self._is_shift = False

    def _standardised(self, counts: Row) -> Row:
        """[GROUPS] deviation from the mean, in spreads of usual steps from the true mean."""
        total = counts.sum()
        away = 2.0 * (np.sqrt(counts) - math.sqrt(total) * self._usual.mean)
        return away / np.maximum(np.sqrt(self._usual.variance), _LEAST_SPREAD)

    def _odd(self, step: Row) -> float:
        """How far a standardised step is, over the most that counts; 0 before that is known."""
        if self._distances.count + _FEWEST < _FEWEST_JUDGED:
            return 0.0
        mean, spread = self._usual_distance()
        return math.sqrt(float(step @ step) / (mean + _MOST * spread))

    def _usual_distance(self) -> tuple[float, float]:
        """Mean and spread of usual steps' squared distances.

        The spread is at least that of groups which move independently, and the mean is above 0: all
        steps may be the same.
        """
        mean = max(float(self._distances.mean[0]), 1.0)
        return mean, max(math.sqrt(self._distances.variance[0]), mean * math.sqrt(2.0 / GROUPS))

    def _judge(self, counts: Row) -> bool:
        """Add a step's evidence; whether it is too far from usual ones to be learnt from."""
        if self._distances.count + _FEWEST < _FEWEST_JUDGED:
            return False
        step, (mean, spread) = self._standardised(counts), self._usual_distance()
        odd = self._odd(step)
        self._ewma = (1.0 - _NEWEST) * self._ewma + _NEWEST * step / max(odd, 1.0)
        self._variance = (1.0 - _NEWEST) ** 2 * self._variance + _NEWEST**2
        # The mean is that of so many steps only.
        known = self._variance + 1.0 / self._usual.count
        found = float(self._ewma @ self._ewma) / known / mean
        limit = _quantile(self._rare, spread / mean)
        self.over_limit = max(found - 1.0, 0.0) / (limit - 1.0)
        return odd > 1.0

    def _learn(self, counts: Row) -> None:
        if self._usual.count >= _FEWEST:
            step = self._standardised(counts)
            # As if the mean were exact.
            self._distances.learn(np.array([step @ step]) / (1.0 + 1.0 / self._usual.count))
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
            "over_limit": None if math.isnan(self.over_limit) else self.over_limit,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._usual.load(state["usual"])
        self._distances.load(state["distances"])
        self._ewma, self._variance = np.array(state["ewma"]), float(state["variance"])
        self._apart = [np.array(counts, dtype=np.float64) for counts in state["apart"]]
        self._is_shift, over_limit = bool(state["is_shift"]), state["over_limit"]
        self.over_limit = math.nan if over_limit is None else float(over_limit)


def _quantile(deviations: float, spread: float) -> float:
    """What a multiple of a chi-square exceeds as rarely as a normal number so many deviations.

    Its mean is 1 and its standard deviation `spread`; the cube root is nearly normal (Wilson and
    Hilferty 1931).
    """
    part = spread * spread / 9.0
    return (1.0 - part + deviations * math.sqrt(part)) ** 3


class _Moments:
    """Running mean and variance of rows, which look back on `_MEMORY` of them (West 1979).

    Args:
        size: Numbers of a row.

    Attributes:
        count: Rows, at most `_MEMORY`.
        mean: [size].
        variance: [size] of a row from the true mean, times its weight.
    """

    def __init__(self, size: int) -> None:
        self.count, self.mean, self.variance = 0, np.zeros(size), np.zeros(size)

    def learn(self, row: Row, weight: float = 1.0) -> None:
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
        """Go on from `state`."""
        self.count = int(state[0])
        self.mean, self.variance = (np.array(row, dtype=np.float64) for row in state[1:])
