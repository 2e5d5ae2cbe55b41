"""The data that the detector of shifts keeps from a step, and its result after the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.observe.course import Row

Cause = Literal["data", "router", "optimizer", "source"]


@dataclass(frozen=True)
class ShiftReading:
    """What is known after a step.

    Attributes:
        routing: Evidence that the use of the experts has changed, over its limit; above 1 is a
            shift.
        loss: The same of the loss.
        cause: What they together say: the data move loss and routing, or make sequences differ, or
            have other token ids; a router moves the routing alone, an optimizer the loss.
        tokens: The same as `routing` of the token ids.
        source: The same of the loss of the data source that has moved most.

    The last two are None where they are not judged (yet), the first two then NaN.
    """

    routing: float
    loss: float
    cause: Cause
    tokens: float | None = None
    source: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """What is known, by the names of metrics."""
        found = {
            "routing_shift": self.routing,
            "loss_shift": self.loss,
            "token_shift": self.tokens,
            "source_shift": self.source,
        }
        return {
            name: value
            for name, value in found.items()
            if value is not None and not math.isnan(value)
        }

    @property
    def is_shift(self) -> bool:
        """Whether any is above its limit."""
        return any(value > 1.0 for value in self.metrics.values())


@dataclass(frozen=True, eq=False)
class ShiftFinding:
    """What has moved in the steps that are kept apart.

    Attributes:
        reading: The newest reading.
        steps: How many steps these are.
        chance: Steps in which chance alone gives as much evidence once.
        before: [L, E] shares of the experts as forecast, mean over these steps.
        after: [L, E] the shares.
        surprise: [L, E] the change of the square roots, in standard deviations of a usual step's.
        loss_before: Loss as forecast, mean over these steps, nats.
        loss_after: The loss.
    """

    reading: ShiftReading
    steps: int
    chance: float
    before: NDArray[np.float64]
    after: NDArray[np.float64]
    surprise: NDArray[np.float64]
    loss_before: float
    loss_after: float


@dataclass(frozen=True, eq=False)
class Step:
    """A step as the detector keeps it.

    Attributes:
        number: Steps before it, and itself.
        roots: [L E] square roots of the shares.
        totals: [L] selections.
        losses: [2] loss, and logarithm of its spread over the sequences.
    """

    number: int
    roots: Row
    totals: Row
    losses: Row

    def as_json(self) -> list[Any]:
        """The step as JSON, exactly; None for NaN, because saving compares ranks."""
        losses = [None if math.isnan(value) else value for value in self.losses.tolist()]
        return [self.number, self.roots.tolist(), self.totals.tolist(), losses]

    @classmethod
    def from_json(cls, values: list[Any]) -> Step:
        """Undo `as_json`."""
        number, *rows = values
        return cls(int(number), *(np.array(row, dtype=np.float64) for row in rows))


def square_roots(experts: NDArray[np.int64]) -> NDArray[np.float64]:
    """[L, E] square roots of the shares of each layer's selections; 0 where there are none."""
    counts = experts.astype(np.float64)
    return np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0))
