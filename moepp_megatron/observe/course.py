"""The course of numbers that training moves slowly: a line through the newest steps."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float64]


def forecast(steps: NDArray[np.float64], rows: Row, step: float) -> tuple[Row, float]:
    """What the line of least squares through known rows gives at a further step.

    Args:
        steps: [N] step numbers of the rows, at least two of them different.
        rows: [N, D].
        step: The step to look at.

    Returns:
        [D] the forecast, and the standard deviation of what a step differs from it by, over that of
        a step from the true line: the square root of 1 + 1/N + (step - mean)^2 / sum of squares.
    """
    centre = steps.mean()
    around = steps - centre
    squares = float(around @ around)
    ahead = step - centre
    weights = 1.0 / len(steps) + around * (ahead / squares)
    return weights @ rows, math.sqrt(1.0 + 1.0 / len(steps) + ahead * ahead / squares)
