"""The data split: weights of the train, validation and test parts."""

from __future__ import annotations

import math

# Of a corpus that has none of its own.
DEFAULT_SPLIT = "98,2,0"


def parse_split(text: str) -> tuple[float, float, float] | None:
    """Weights of `train,validation,test`, or None unless they are three numbers of 0 or more."""
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    if len(weights) != 3 or any(not math.isfinite(w) or w < 0 for w in weights):
        return None
    return weights[0], weights[1], weights[2]
