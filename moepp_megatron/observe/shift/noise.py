"""Learns how much steps of the same data differ, and how unusual a larger difference is.

Batches of one text differ far more than independent tokens would, and in some directions more than
in others: a style of writing moves many experts together. So a difference is measured against those
of the steps before, in each direction by its own variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.shift.detector import ROWS, Numbers, steps_remembered

# Without some differences to compare with, a distance would be of another kind than later ones.
_FEWEST = 4
# A few alike distances must not make a limit that the next one passes by chance: of a chi-square
# with d degrees of freedom the logarithm has the standard deviation sqrt(2 / d), and this is that
# of 800.
_LEAST_SPREAD = 0.05
_RECENT = 12
# A loss that moves by less, in nats, has not moved.
_LEAST_LOSS_SPREAD = 0.01
# Differences beyond so many spreads are not remembered: one step of a shift that is not yet
# suspect would make its direction usual, and so hide the steps after it. Their distances
# are: where training makes all steps differ more, these become usual.
_DOUBTFUL = 3.0
_DECIMALS = 6


class UsageNoise:
    """Differences of usual steps, and their distances.

    The distance of a difference x of d numbers is the squared Mahalanobis distance with a ridge,
    `x' (R'R / n + v I)^-1 x / d`, of the n differences R before it, with their mean variance v, or
    1 if that is more, which is the variance by chance alone. Directions in which nothing has
    differed yet count with v.

    How unusual a distance is follows from its logarithm: how many spreads it is above the median of
    those before.
    """

    def __init__(self, settings: ShiftSection) -> None:
        self._memory = steps_remembered(settings)
        self._differences: list[Numbers] = []
        self._log_distances: list[float] = []

    def log_distance(self, difference: Numbers) -> float | None:
        """Logarithm of a difference's distance; None while there is too little to compare with."""
        count = len(self._differences)
        if count < _FEWEST:
            return None
        known = np.stack(self._differences) / math.sqrt(count)
        ridge = max(float(np.square(known).sum()) / len(difference), 1.0)
        # Woodbury's identity: a system of `count` equations instead of one of the profile's size.
        inner = known @ known.T + ridge * np.eye(count)
        along = known @ difference
        distance = difference @ difference - along @ np.linalg.solve(inner, along)
        return math.log(max(float(distance) / ridge / len(difference), 1e-12))

    def score(self, log_distance: float | None) -> float | None:
        """Spreads above the median; None before there are enough distances."""
        if log_distance is None or len(self._log_distances) < ROWS["routing"].judged:
            return None
        # Training may make all steps differ more soon: the newest say what is usual.
        recent = float(np.median(self._log_distances[-_RECENT:]))
        return (log_distance - recent) / max(_spread(self._log_distances), _LEAST_SPREAD)

    def deviations(self) -> Numbers:
        """Standard deviation of each number of a difference, at least 1, which is by chance."""
        return np.maximum(np.sqrt(np.mean(np.square(self._differences), axis=0)), 1.0)

    def learn(self, difference: Numbers, log_distance: float | None) -> None:
        """Remember a step that is usual."""
        score = self.score(log_distance)
        if log_distance is not None:
            self._log_distances = [*self._log_distances, log_distance][-self._memory :]
        if score is None or score <= _DOUBTFUL:
            # Rounded, so that a checkpoint holds short numbers that are these to the bit.
            rounded = np.round(difference, _DECIMALS)
            self._differences = [*self._differences, rounded][-self._memory :]

    def as_json(self) -> dict[str, Any]:
        """The noise as JSON, for `from_json`."""
        return {
            "differences": [difference.tolist() for difference in self._differences],
            "log_distances": list(self._log_distances),
        }

    @classmethod
    def from_json(cls, values: Any, settings: ShiftSection, size: int) -> UsageNoise:
        """Undo `as_json` of differences of this size; the newest are kept.

        Raises:
            ValueError: If it is not a result of `as_json`.
        """
        noise = cls(settings)
        try:
            differences = np.asarray(values["differences"], dtype=np.float64).reshape(-1, size)
            logs = np.asarray(values["log_distances"], dtype=np.float64)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError("noise is no differences of this size with distances") from error
        if logs.ndim != 1 or not (np.isfinite(differences).all() and np.isfinite(logs).all()):
            raise ValueError("noise is not of finite numbers")
        noise._differences = list(differences)[-noise._memory :]
        noise._log_distances = logs.tolist()[-noise._memory :]
        return noise


class LossNoise:
    """Residuals of the loss of usual steps.

    Args:
        memory: Steps that are remembered.
        judged: Residuals that make a spread, at least.
        by_tokens: Whether steps differ in their tokens: the spread of a step's loss is then
            `sqrt(s^2 / tokens + 0.01^2)`, where s is that of residuals times the root of theirs.
    """

    def __init__(self, memory: int, judged: int, by_tokens: bool = False) -> None:
        self._memory, self._judged, self._by_tokens = memory, judged, by_tokens
        self._residuals: list[float] = []

    @property
    def is_known(self) -> bool:
        """Whether there are enough residuals."""
        return len(self._residuals) >= self._judged

    def score(self, residual: float, tokens: float = 1.0) -> float | None:
        """Spreads from the line; None where it is no number, or before there are enough."""
        if not self.is_known or not math.isfinite(residual):
            return None
        spread = _spread(self._residuals)
        if self._by_tokens:
            return residual / math.hypot(spread / math.sqrt(tokens), _LEAST_LOSS_SPREAD)
        return residual / max(spread, _LEAST_LOSS_SPREAD)

    def learn(self, residual: float, tokens: float = 1.0) -> None:
        """Remember a step that is usual."""
        if math.isfinite(residual):
            scaled = residual * math.sqrt(tokens) if self._by_tokens else residual
            self._residuals = [*self._residuals, scaled][-self._memory :]

    def as_json(self) -> list[float]:
        """The residuals, for `load`."""
        return list(self._residuals)

    def load(self, residuals: Sequence[float]) -> None:
        """Undo `as_json`; of more than are remembered the newest are kept."""
        self._residuals = [float(value) for value in residuals][-self._memory :]


def _spread(values: Sequence[float]) -> float:
    """The standard deviation of a normal distribution with this median absolute deviation."""
    known = np.asarray(values)
    return 1.4826 * float(np.median(np.abs(known - np.median(known))))
