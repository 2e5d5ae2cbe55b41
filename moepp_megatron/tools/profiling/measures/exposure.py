"""Measures communication that no computation hides.

On a GPU a step computes while a kernel runs that is not NCCL's: communication outside of these is
exposed. On a CPU the training thread computes unless it waits for a collective, which the recorder
marks.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from moepp_megatron.tools.profiling.trace import RankTrace, Span

# Start and end, microseconds; lists of them are disjoint and in order.
Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in disjoint intervals, in order; empty ones fall away."""
    merged: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _intersect(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """Points in both; each argument as `union` returns it."""
    common, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            common.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return common


def subtract(whole: list[Interval], part: list[Interval]) -> list[Interval]:
    """Points of `whole` outside of `part`; each argument as `union` returns it."""
    if not whole:
        return []
    first, last = whole[0][0], whole[-1][1]
    edges = [first, *(edge for interval in part for edge in interval), last]
    gaps = [(edges[i], edges[i + 1]) for i in range(0, len(edges), 2)]
    return _intersect(whole, union(gap for gap in gaps if gap[0] < gap[1]))


def length(intervals: Iterable[Interval]) -> float:
    """Total microseconds of disjoint intervals."""
    return sum(end - start for start, end in intervals)


@dataclass(frozen=True)
class MeasuredStepTime:
    """The times of one step on one rank, in microseconds."""

    step_us: float
    compute_us: float  # something computed
    communication_us: float  # a collective ran or waited
    exposed_us: float  # a collective ran or waited, and nothing computed

    @property
    def exposed_share(self) -> float:
        """Exposed communication as a share of the step."""
        return self.exposed_us / self.step_us if self.step_us > 0 else 0.0


def computing(trace: RankTrace, within: Interval) -> list[Interval]:
    """The intervals in which this rank computes."""
    if trace.on_gpu:
        return _intersect(union(trace.kernels), [within])
    return subtract([within], union(trace.waits))


def step_time(trace: RankTrace, within: Span) -> MeasuredStepTime:
    """The times of a step of this rank."""
    compute = computing(trace, within)
    busy = union((call.start_us, call.end_us) for call in trace.collectives)
    communication = _intersect(busy, [within])
    return MeasuredStepTime(
        step_us=within.end_us - within.start_us,
        compute_us=length(compute),
        communication_us=length(communication),
        exposed_us=length(subtract(communication, compute)),
    )
