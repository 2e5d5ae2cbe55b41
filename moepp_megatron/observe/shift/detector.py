"""Detects a change of one series of a run, step after step: an EWMA control chart.

A step is d numbers. Each is compared with the trend of usual steps, in spreads that usual steps
have shown, and the differences add up in an exponentially weighted mean of all d together, so that
many small ones in one direction count. Its squared length is nearly a multiple of a chi-square;
which one follows from mean and spread of the steps' own squared lengths, because the numbers of
real texts move together.

Lowry, Woodall, Champ and Rigdon, A Multivariate Exponentially Weighted Moving Average Control
Chart, Technometrics 34 (1992).
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

# A step counts for no more than so many spreads of usual squared lengths above their mean, so that
# a single outlier is no alarm.
_STEP_CAP = 4.0
# What is learnt from one step is cut at so many spreads.
_LEARNING_CAP = 3.0
# Evidence, over its limit, from which steps are not learnt from, for at most so many steps.
_SUSPECT, _PATIENCE = 0.6, 30
# Part of a change that comes within one step if it is sudden.
_SUDDEN = 0.6
# Suspect steps after which evidence without a sudden step becomes the baseline.
_DRIFT = 8
# Steps that make a spread, and steps before a slope is followed.
_FEWEST, _FEWEST_OF_SLOPE = 20, 8
# After a restart so many steps are not judged, or more while spreads are of fewer than
# `2 * _FEWEST`.
_UNJUDGED = 10


@dataclass(frozen=True)
class _ChartSettings:
    """Settings of the chart of one kind of series."""

    weight: float  # of the newest step in the mean: smaller finds smaller changes, later
    level_rate: float  # by which the level follows a step
    slope_rate: float  # part of that by which the slope follows
    memory: int  # steps that spreads look back on
    floor: float  # least spread, in units of the step's own (`Detector.add`)
    limit: float = 1.0  # factor on the limit of the evidence
    # How far out a step must be by itself for an alarm: what moves in smaller steps is training.
    sudden: float = 0.0
    warmup: int = 80  # steps before one is judged
    # Steps that spreads are worth after a restart. What the model makes of other data keeps
    # changing: it is judged later than token ids, by spreads of its own.
    kept: int = 20


CHARTS = {
    "loss": _ChartSettings(0.2, 0.1, 0.05, memory=60, floor=0.01, limit=1.2),
    # Logarithm of the spread of the sequences' losses: a further text makes them differ more.
    "spread": _ChartSettings(0.2, 0.1, 0.05, memory=60, floor=0.01, limit=1.5),
    "routing": _ChartSettings(0.3, 0.1, 0.05, memory=60, floor=1.0, limit=1.3, sudden=1.5),
    # Logarithm of the size of the logits.
    "scale": _ChartSettings(0.5, 0.3, 0.0, memory=60, floor=0.1, sudden=1.5),
    # Independent tokens have spread 1, and a group of few tokens less.
    "tokens": _ChartSettings(0.05, 0.002, 0.0, memory=500, floor=0.5, warmup=60, kept=40),
}


class Detector:
    """Judges one step of a series after the other.

    Args:
        groups: Equal parts of the d numbers that are judged by themselves as well as together.
        false_alarm_steps: Steps in which chance may give one alarm.

    Attributes:
        evidence: Of the newest step, over its limit: above 1 is a change; NaN if not judged.
        peak: How far out the farthest of the newest suspect steps is by itself.
        jump: The largest rise of that within one step.
    """

    def __init__(self, settings: _ChartSettings, false_alarm_steps: float, groups: int = 1) -> None:
        self._settings, self._groups = settings, groups
        charts = [1, *[groups] * groups] if groups > 1 else [1]
        rates = [1.0 - 1.0 / (each * false_alarm_steps) for each in charts]
        self._deviations = [NormalDist().inv_cdf(rate) for rate in rates]
        self._steps = 0
        self._level: Numbers | None = None
        self._slope, self._learnt = np.zeros(0), 1
        self._moments = [_Moments(settings.memory) for _ in range(3)]
        self._squares, self._lengths, self._charts = self._moments
        self.clear()

    def clear(self) -> None:
        """Forget the evidence."""
        self.evidence = math.nan
        self._outlier = self.peak = self.jump = 0.0
        self._mean, self._suspect_steps = np.zeros(len(self._slope)), 0

    def reset_baseline(self, values: Numbers) -> None:
        """Restart the trend at this step; keep the spreads until new ones are known."""
        self._level = np.atleast_1d(values)
        self._slope, self._learnt = np.zeros(len(self._level)), 1
        self.clear()
        for moments in self._moments:
            moments.count = min(moments.count, self._settings.kept)

    @property
    def is_suspect(self) -> bool:
        """True if the newest step is an outlier or close to an alarm."""
        return self._suspect_steps > 0

    @property
    def is_alarm(self) -> bool:
        """True if the newest step belongs to a change."""
        return self.evidence > 1.0 and self.peak >= self._settings.sudden

    @property
    def is_sudden(self) -> bool:
        """True if most of a change happened within one step."""
        return self.jump >= _SUDDEN * self.peak

    def expected(self) -> Numbers:
        """Extrapolate the trend to the next step, [d]."""
        assert self._level is not None, "no step has been seen"
        return self._level + self._slope

    def distance(self, value: float, fewest: int) -> float | None:
        """Spreads of a single number above the trend; None before so many are known."""
        if self._level is None or self._squares.count < fewest:
            return None
        return float((value - self.expected()[0]) / self._spread()[0])

    def add(self, values: Numbers, unit: Numbers | float = 1.0) -> float:
        """Judge a step, [d], and learn from it; return its `evidence`.

        `unit` is the spread that each number has by chance, [d] or one, or 1.
        """
        self._steps += 1
        values = np.atleast_1d(values)
        if self._level is None:
            self.reset_baseline(values)
            return self.evidence
        away = (values - self.expected()) / unit
        before = self._outlier
        is_outlier = self._judge(away)
        is_suspect = not math.isnan(self.evidence) and (is_outlier or self.evidence > _SUSPECT)
        self.peak = max(self.peak, self._outlier) if is_suspect else 0.0
        self.jump = max(self.jump, self._outlier - before) if is_suspect else 0.0
        self._suspect_steps = self._suspect_steps + 1 if is_suspect else 0
        if self.evidence > 1.0 and not self.is_alarm and self._suspect_steps >= _DRIFT:
            self._level, self._slope = values, np.zeros(len(values))
            self.clear()
        elif is_suspect and self._suspect_steps <= _PATIENCE:
            self._level = self.expected()
        else:
            self._learn(away, unit)
        return self.evidence

    def _spread(self) -> Numbers:
        """[d] spread of the next step around the trend."""
        usual = np.sqrt(np.maximum(self._squares.mean, self._settings.floor**2))
        return usual * math.sqrt(1.0 + 1.0 / self._learnt)

    def _lengths_of(self, numbers: Numbers) -> Numbers:
        """[1 or 1 + groups] mean square of [d] numbers, of all and of each group."""
        squares = np.square(numbers)
        if self._groups == 1:
            return squares.mean(keepdims=True)
        return np.append(squares.mean(), squares.reshape(self._groups, -1).mean(axis=1))

    def _judge(self, away: Numbers) -> bool:
        """Add a step's evidence; True if the step is an outlier by itself."""
        self.evidence = math.nan
        if self._squares.count < _FEWEST:
            return False
        scaled = away / self._spread()
        self._length = self._lengths_of(scaled)
        if self._lengths.count < _FEWEST:
            return False
        mean, spread = self._usual_lengths(len(away))
        over = np.sqrt(self._length / (mean + _STEP_CAP * spread))
        self._outlier = float(over.max())
        weight = self._settings.weight
        most = np.repeat(np.maximum(over[-self._groups :], 1.0), len(away) // self._groups)
        self._mean = (1.0 - weight) * self._mean + weight * scaled / most
        # Over the variance of a mean of many independent steps, also of few: one step after a
        # restart is no alarm.
        self._chart = self._lengths_of(self._mean) * (2.0 - weight) / weight
        # Errors of the trend make steps' differences alike, and so the weighted mean longer.
        usual = mean
        if self._charts.count >= _FEWEST and len(away) > 1:
            usual = np.maximum(mean, self._charts.mean)
        limits = [_quantile(*pair) for pair in zip(self._deviations, spread / mean, strict=True)]
        found = np.maximum(self._chart / usual - 1.0, 0.0) / (np.array(limits) - 1.0)
        known = self._learnt >= _UNJUDGED and self._lengths.count >= 2 * _FEWEST
        if known and self._steps >= self._settings.warmup:
            self.evidence = float(found.max()) / self._settings.limit
        return bool(over[0] > 1.0)

    def _usual_lengths(self, size: int) -> tuple[Numbers, Numbers]:
        """Mean and spread of usual steps' squared lengths, also if all steps are the same."""
        mean = np.maximum(self._lengths.mean, 1.0)
        sizes = np.full(len(mean), size / self._groups)
        sizes[0] = size
        independent = mean * np.sqrt(2.0 / sizes)
        # The variance of so few squares of one number is uncertain: that of a normal one.
        estimated = 0.0 if size == 1 else np.sqrt(self._lengths.variance)
        return mean, np.maximum(estimated, independent)

    def _learn(self, away: Numbers, unit: Numbers | float) -> None:
        """Update trend and spreads by a usual step."""
        known = self._squares.count >= _FEWEST
        least = np.maximum(self._squares.mean, self._settings.floor**2)
        self._learnt += 1
        rate = max(self._settings.level_rate, 1.0 / self._learnt)
        most = _LEARNING_CAP * np.sqrt(least) if known else np.inf
        change = rate * np.clip(away, -most, most) * unit
        self._level = self.expected() + change
        if self._learnt > _FEWEST_OF_SLOPE:
            self._slope = self._slope + self._settings.slope_rate * change
        if self._learnt <= 3:
            return
        if known:
            self._lengths.learn(self._length)
            if not math.isnan(self.evidence):
                self._charts.learn(self._chart)
        square = np.square(away) / (1.0 + 1.0 / self._learnt)
        self._squares.learn(np.minimum(square, 16.0 * least) if known else square)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, of plain numbers, the same on every rank."""
        vectors = (self._level, self._slope, self._mean)
        return {
            "counts": [self._steps, self._learnt, self._suspect_steps],
            "evidence": None if math.isnan(self.evidence) else self.evidence,
            "peak": [self._outlier, self.peak, self.jump],
            "numbers": [None if each is None else each.tolist() for each in vectors],
            "moments": [moments.state() for moments in self._moments],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`, to the bit."""
        self._steps, self._learnt, self._suspect_steps = state["counts"]
        self.evidence = math.nan if state["evidence"] is None else state["evidence"]
        peak = state["peak"]
        # A checkpoint of an earlier version has only the peak.
        self._outlier, self.peak, self.jump = peak if isinstance(peak, list) else (0.0, peak, peak)
        level, slope, mean = state["numbers"]
        self._level = None if level is None else np.array(level, dtype=np.float64)
        self._slope, self._mean = (np.array(each, dtype=np.float64) for each in (slope, mean))
        for each, values in zip(self._moments, state["moments"], strict=True):
            each.load(values)


def _quantile(deviations: float, spread: float) -> float:
    """Quantile of a scaled chi-square that is as rare as this many standard deviations."""
    # Of mean 1 and this spread; the cube root is nearly normal (Wilson and Hilferty 1931).
    part = spread * spread / 9.0
    return (1.0 - part + deviations * math.sqrt(part)) ** 3


class _Moments:
    """Running mean and variance of rows (West 1979), of the newest `memory` rows mostly."""

    def __init__(self, memory: int) -> None:
        self._memory, self.count = memory, 0
        self.mean, self.variance = np.zeros(1), np.zeros(1)

    def learn(self, row: Numbers) -> None:
        self.count = min(self.count + 1, self._memory)
        away = row - self.mean
        self.mean = self.mean + away / self.count
        if self.count > 1:
            squares = np.square(away) * (self.count - 1) / self.count
            self.variance = self.variance + (squares - self.variance) / (self.count - 1)

    def state(self) -> list[Any]:
        return [self.count, self.mean.tolist(), self.variance.tolist()]

    def load(self, state: list[Any]) -> None:
        self.count = int(state[0])
        self.mean, self.variance = (np.array(row, dtype=np.float64) for row in state[1:])
