"""The result of a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.workbench.planning.simulation.schedule import Node

Values = NDArray[np.float64]


Kind = Literal["forward", "backward", "both"]


@dataclass(frozen=True)
class Bar:
    """One pass in a timeline.

    Attributes:
        rank: Pipeline rank.
        chunk: Model chunk, of the forward pass where two run together.
        kind: Kind of pass, or a forward and a backward pass together.
        start: Seconds from the step's start.
        end: Seconds from the step's start to its end, the message included.
    """

    rank: int
    chunk: int
    kind: Kind
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One column of pipeline ranks in the first step: the one that ended last.

    Attributes:
        bars: Its passes.
        total: The step, seconds.
    """

    bars: tuple[Bar, ...]
    total: float

    @classmethod
    def of(cls, graph: Sequence[Node], starts: Values, ends: Values, total: float) -> Timeline:
        """The timeline of a played step."""
        bars = tuple(
            Bar(
                node.rank,
                node.works[0].chunk,
                _kind(node),
                float(start),
                float(end),
            )
            for node, start, end in zip(graph, starts, ends, strict=True)
        )
        return cls(bars, float(total))


def _kind(node: Node) -> Kind:
    if len(node.works) > 1:
        return "both"
    return "backward" if node.works[0].is_backward else "forward"


@dataclass(frozen=True)
class Simulated:
    """Simulated steps; times in seconds.

    Attributes:
        totals: Time of each step [steps].
        work: Passes of the slowest pipeline rank in the column that ends last, mean.
        transfers: Time for which messages between stages hold it up.
        bubble: Time that it waits for other stages and columns.
        data: Exposed data-parallel communication.
        optimizer: Time of the optimizer on the largest rank.
        loads: Mean over micro-batches and groups of the fullest rank over the mean; a value for
            every step and MoE layer.
        columns: Number of simulated columns.
        ranks_per_column: Ranks of a column in one pipeline stage.
        passes: Simulated passes per step.
        held_up: Share of the columns' stages that a slow node holds up.
        timeline: Timeline of one column.
    """

    totals: Values
    work: float
    transfers: float
    bubble: float
    data: float
    optimizer: float
    loads: Values
    columns: int
    ranks_per_column: int
    passes: int
    held_up: float
    timeline: Timeline

    def quantile(self, share: float) -> float:
        """Step time that this share of the steps stays under."""
        return float(np.quantile(self.totals, share))

    @property
    def median(self) -> float:
        """Median step."""
        return self.quantile(0.5)
