"""The one way to a run's numbers over its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moepp_megatron.observe.metrics import StepMetrics


class Series(NamedTuple):
    """A number over steps, finite everywhere.

    Attributes:
        x: Steps, or another axis, [n] float64.
        y: Values, [n] float64.
    """

    x: np.ndarray
    y: np.ndarray


def values(records: Sequence[StepMetrics], key: str, name: str | None = None) -> np.ndarray:
    """A number of each record, [n] float64; NaN where it was not recorded.

    Args:
        name: Of the number, where the key holds numbers by name, such as that of a data source.
    """
    found = (getattr(record, key) for record in records)
    if name is not None:
        found = ((row or {}).get(name) for row in found)
    return np.array([math.nan if v is None else v for v in found], dtype=np.float64)


def series(records: Sequence[StepMetrics], key: str, name: str | None = None) -> Series:
    """The finite ones of these numbers, with their steps."""
    return finite(values(records, "step"), values(records, key, name))


def finite(x: np.ndarray, y: np.ndarray) -> Series:
    """The points of which both numbers are finite."""
    kept = np.isfinite(x) & np.isfinite(y)
    return Series(x[kept], y[kept])
