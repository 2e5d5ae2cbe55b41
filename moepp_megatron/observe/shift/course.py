"""The course of numbers that training moves slowly: a line through the newest steps."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


def forecast(steps: Numbers, rows: Numbers, step: float) -> tuple[Numbers, float]:
    """What the line through known rows gives at a further step.

    The line of least squares, with its slope shrunk by how sure it is: the factor is
    `max(0, 1 - 1/F)`, where F is the mean over the numbers of their slope's square over its
    variance. A slope that chance alone would give is none, so that a forecast far ahead is not led
    astray.

    Args:
        steps: [N] step numbers of the rows, N at least 3, at least two of them different.
        rows: [N, D] numbers that move together.
        step: The step to look at.

    Returns:
        [D] the forecast, and the standard deviation of what a step differs from it by, over that of
        a step from the true line.
    """
    around = steps - steps.mean()
    squares = float(around @ around)
    ahead = step - float(steps.mean())
    mean = rows.mean(axis=0)
    slope = around @ rows / squares
    rest = rows - mean - np.outer(around, slope)
    variance = np.square(rest).sum(axis=0) / (len(steps) - 2) / squares
    moves = variance > 0.0
    ratio = float(np.mean(np.square(slope[moves]) / variance[moves])) if moves.any() else math.inf
    sure = max(0.0, 1.0 - 1.0 / ratio) if ratio > 0.0 else 0.0
    spread = math.sqrt(1.0 + 1.0 / len(steps) + sure * ahead * ahead / squares)
    return mean + sure * ahead * slope, spread
