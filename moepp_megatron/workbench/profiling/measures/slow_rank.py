"""Finds a rank that others wait for because it is slow, not because it has more rows.

Ranks of an expert-parallel group do the same work but for the rows of their FFN experts. One that
computes longer than its rows explain is slow by itself: its cores, clock, or neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moepp_megatron.workbench.profiling.measures.expert_load import ExpertLoad, expert_group
from moepp_megatron.workbench.profiling.measures.exposure import MeasuredStepTime
from moepp_megatron.workbench.profiling.trace import RankTrace

# Times of ranks with equal work differ by less on a machine with nothing else to do.
_SLOW = 1.25


@dataclass(frozen=True)
class SlowRank:
    """The rank whose time its rows explain least.

    Attributes:
        rank: Its number.
        time_ratio: Its computing time over the mean of the other ranks of its group.
        rows_ratio: Rows of its FFN experts over theirs.
    """

    rank: int
    time_ratio: float
    rows_ratio: float


def slow_rank(
    traces: Iterable[RankTrace],
    times: Mapping[int, Mapping[int, MeasuredStepTime]],
    load: ExpertLoad | None,
) -> SlowRank | None:
    """The slowest such rank, or None.

    All of a rank's work may be in its experts, so additional time in proportion to additional rows
    counts as explained; fewer rows explain no time.

    Args:
        traces: Traces of the recorded ranks.
        times: Times of each step and rank.
        load: Rows by step and rank; None gives None.
    """
    if load is None:
        return None
    compute = {
        (step, rank): time.compute_us for step, of in times.items() for rank, time in of.items()
    }
    found = []
    for group in {expert_group(trace) for trace in traces}:
        for rank in group:
            others = [other for other in group if other != rank]
            ratios = [_ratio(numbers, rank, others) for numbers in (compute, load.rows)]
            if ratios[0] > _SLOW * max(1.0, ratios[1]):
                found.append(SlowRank(rank, *ratios))
    return max(found, key=lambda one: one.time_ratio, default=None)


def _ratio(numbers: Mapping[tuple[int, int], float], rank: int, others: list[int]) -> float:
    """A rank's sum over steps, divided by the others' mean; 0 if theirs is unknown."""
    own = sum(value for (_, of), value in numbers.items() if of == rank)
    rest = sum(value for (_, of), value in numbers.items() if of in others)
    return own * len(others) / rest if rest else 0.0
