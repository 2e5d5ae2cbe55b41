"""Loss spikes: how far a loss lies above the newest accepted ones."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

# The median absolute deviation of normally distributed values is their standard deviation / 1.4826.
MAD_TO_STD = 1.4826
# Where the losses hardly differ (a tiny data set, a constant rate) the deviation says nothing:
# at the default threshold of 10, a jump is then at least a hundredth of the loss.
SMALLEST_STD = 1e-3


def robust_z_score(loss: float, recent: Sequence[float]) -> float:
    """Distance of `loss` above the median of `recent`, in robust standard deviations.

    Median and MAD, unlike mean and standard deviation, are not moved by the spikes themselves.

    Args:
        loss: Finite, nats.
        recent: Finite losses, at least one.
    """
    median = statistics.median(recent)
    deviation = statistics.median(abs(value - median) for value in recent)
    return (loss - median) / max(MAD_TO_STD * deviation, SMALLEST_STD * abs(median), 1e-30)
