"""Learns how much usage differs between windows of the same data; judges larger differences.

Windows of one text differ far more than independent tokens would, and in some directions more than
in others: a style of writing moves many experts together, and training pushes them one way. So a
difference is measured against those of the windows before, in each direction by its own variance.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.config.schema.routing_guard import ShiftSection

# Without some differences to compare with, a distance would be of another kind than later ones.
_FEWEST = 4
# A few alike distances must not make a limit that the next one passes by chance: of a chi-square
# with d degrees of freedom the logarithm has the standard deviation sqrt(2 / d), and this is that
# of 800.
_LEAST_SPREAD = 0.05
# Differences beyond so many spreads are not remembered: one window of a shift that is not quite
# beyond the limit would make its direction usual, and so hide the windows after it. Their distances
# are: where training makes all windows differ more, these become usual.
_DOUBTFUL = 3.0
_DECIMALS = 6


class UsageNoise:
    """Differences of windows without a shift, and their distances.

    The distance of a difference x of d numbers is the squared Mahalanobis distance with a ridge,
    `x' (R'R / n + v I)^-1 x / d`, of the n differences R before it, with their mean variance v, or
    1 if that is more, which is the variance by chance alone. Directions in which nothing has
    differed yet count with v.

    A distance is beyond the limit where its logarithm is above `median + threshold * spread` of
    those before, where the spread is 1.4826 times the median absolute deviation: the standard
    deviation of a normal distribution, which a few outliers hardly change.

    Args:
        settings: Settings `memory`, `warmup` and `threshold` of the configuration.
    """

    def __init__(self, settings: ShiftSection) -> None:
        self._settings = settings
        self._differences: list[NDArray[np.float64]] = []
        self._log_distances: list[float] = []

    def log_distance(self, difference: NDArray[np.float64]) -> float | None:
        """Logarithm of a difference's distance; None while there is too little to compare with."""
        count = len(self._differences)
        if count < _FEWEST:
            return None
        known = np.stack(self._differences) / math.sqrt(count)
        ridge = max(float(np.square(known).sum()) / len(difference), 1.0)
        # Woodbury's identity: a system of `count` equations instead of one of the usage's size.
        inner = known @ known.T + ridge * np.eye(count)
        along = known @ difference
        distance = difference @ difference - along @ np.linalg.solve(inner, along)
        return math.log(max(float(distance) / ridge / len(difference), 1e-12))

    def over_limit(self, log_distance: float) -> float | None:
        """The distance divided by the limit; above 1 is a shift. None before `warmup` distances."""
        if not self._is_warm():
            return None
        median, spread = self._usual()
        return math.exp(log_distance - median - self._settings.threshold * spread)

    def learn(self, difference: NDArray[np.float64], log_distance: float | None) -> None:
        """Remember a window that is not beyond the limit."""
        memory = self._settings.memory
        is_doubtful = False
        if log_distance is not None:
            if self._is_warm():
                median, spread = self._usual()
                is_doubtful = log_distance > median + _DOUBTFUL * spread
            self._log_distances = [*self._log_distances, log_distance][-memory:]
        if not is_doubtful:
            # Rounded, so that a checkpoint holds short numbers that are these to the bit.
            rounded = np.round(difference, _DECIMALS)
            self._differences = [*self._differences, rounded][-memory:]

    def _is_warm(self) -> bool:
        return len(self._log_distances) >= self._settings.warmup

    def _usual(self) -> tuple[float, float]:
        """Median and spread of the logarithms of the distances."""
        logs = np.asarray(self._log_distances)
        median = float(np.median(logs))
        deviation = 1.4826 * float(np.median(np.abs(logs - median)))
        return median, max(deviation, _LEAST_SPREAD)

    def as_json(self) -> dict[str, Any]:
        """The noise as JSON, for `from_json`."""
        return {
            "differences": [difference.tolist() for difference in self._differences],
            "log_distances": list(self._log_distances),
        }

    @classmethod
    def from_json(cls, values: Any, settings: ShiftSection, size: int) -> UsageNoise:
        """Undo `as_json`.

        Args:
            values: Result of `as_json`.
            settings: Same as in the constructor; if there are more than `memory`, the newest are
                kept.
            size: Size of each difference.

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
        noise._differences = list(differences)[-settings.memory :]
        noise._log_distances = logs.tolist()[-settings.memory :]
        return noise
