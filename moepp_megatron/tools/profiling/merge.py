"""Brings ranks onto one clock.

Each file has the clock of its process or host. Their differences follow from collectives that every
rank of a group leaves together, because none can end before the last has begun (barrier,
all-reduce, all-gather, reduce-scatter; all-to-all where there is nothing better): the median over
many calls of how much later one rank ends than another. What remains is how unevenly ranks leave
them: microseconds with NCCL, tens of them with gloo on one host. Clocks that drift apart within a
recording are not corrected: 10 ppm, a poor crystal, are 10 us in a second.
"""

from __future__ import annotations

import heapq
import logging
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from moepp_megatron.tools.profiling.collective import Collective, Operation

logger = logging.getLogger(__name__)

_LEFT_TOGETHER = frozenset(
    {Operation.BARRIER, Operation.ALL_REDUCE, Operation.ALL_GATHER, Operation.REDUCE_SCATTER}
)
# Times the median absolute deviation: the standard deviation of normally distributed values.
_MAD = 1.4826
# A single clock reading is no finer; keeps the path over exact copies from being free.
_RESOLUTION_US = 0.01


class _RankClock(NamedTuple):
    """Offset of one rank's clock to another's; of a rank, what to add to its times.

    Attributes:
        offset_us: Microseconds.
        spread_us: Standard deviation of single calls about it, by the median absolute deviation,
            summed over the ranks in between.
        calls: Calls that were compared, the fewest on the path; 0 for the reference.
    """

    offset_us: float
    spread_us: float
    calls: int

    @property
    def variance(self) -> float:
        """Variance of the median, to choose the best path between two ranks."""
        return max(self.spread_us, _RESOLUTION_US) ** 2 / self.calls


def find_clocks(by_rank: Mapping[int, Sequence[Collective]]) -> dict[int, _RankClock | None]:
    """The clock of each rank, against that of the lowest.

    Args:
        by_rank: Collectives of each rank, by its own clock.

    Returns:
        Clocks by rank; None, with a warning, for ranks without common calls.
    """
    if not by_rank:
        return {}
    reference = min(by_rank)
    edges = _compare(same_calls(by_rank, {Operation.ALL_TO_ALL}))
    edges |= _compare(same_calls(by_rank, _LEFT_TOGETHER))
    clocks = _paths(edges, reference)
    unknown = sorted(set(by_rank) - set(clocks))
    if unknown:
        logger.warning(
            "ranks %s share no timed collective with rank %d: their times are left as they are",
            ", ".join(map(str, unknown)),
            reference,
        )
    return {rank: clocks.get(rank) for rank in sorted(by_rank)}


def same_calls(
    by_rank: Mapping[int, Sequence[Collective]], operations: Iterable[Operation]
) -> list[dict[int, Collective]]:
    """Calls that two or more ranks recorded, each with every rank's record.

    A call is known by group, operation and number; without numbers by its place among the calls of
    the same kind, if all of the group's ranks have equally many. Calls that come twice on a rank,
    and all-to-alls of which one rank sent what another did not receive, are left out.
    """
    wanted = frozenset(operations)
    calls: dict[Hashable, dict[int, Collective]] = defaultdict(dict)
    twice: set[Hashable] = set()
    for rank, collectives in by_rank.items():
        chosen = [one for one in collectives if one.placed and one.operation in wanted]
        totals = Counter(_kind(one) for one in chosen if one.sequence is None)
        seen: Counter[Hashable] = Counter()
        for one in chosen:
            key: Hashable = (*_kind(one), one.sequence)
            if one.sequence is None:
                key = (*_kind(one), "of", totals[_kind(one)], seen[_kind(one)])
                seen[_kind(one)] += 1
            if rank in calls[key]:
                twice.add(key)
            calls[key][rank] = one
    return [
        call
        for key, call in calls.items()
        if key not in twice and len(call) > 1 and _parts_agree(call)
    ]


def _kind(call: Collective) -> tuple[str, tuple[int, ...], Operation]:
    return call.group, call.group_ranks, call.operation


def _parts_agree(call: Mapping[int, Collective]) -> bool:
    """True if each rank received what the others sent to it, as far as known."""
    for sender, sent in call.items():
        for receiver, received in call.items():
            ranks = sent.group_ranks
            if sent.sent is None or received.received is None or not ranks:
                continue
            if sent.sent[ranks.index(receiver)] != received.received[ranks.index(sender)]:
                return False
    return True


def _compare(calls: Iterable[Mapping[int, Collective]]) -> dict[tuple[int, int], _RankClock]:
    """Clock differences between the lowest rank of each call and its others."""
    later: dict[tuple[int, int], list[float]] = defaultdict(list)
    for call in calls:
        first = min(call)
        for rank, collective in call.items():
            if rank != first:
                later[first, rank].append(collective.end_us - call[first].end_us)
    edges = {}
    for pair, values in later.items():
        middle = statistics.median(values)
        spread = _MAD * statistics.median(abs(value - middle) for value in values)
        edges[pair] = _RankClock(middle, spread, len(values))
    return edges


def _paths(edges: Mapping[tuple[int, int], _RankClock], reference: int) -> dict[int, _RankClock]:
    """Clocks of the ranks that calls connect with the reference, over the most certain path."""
    neighbours: dict[int, list[tuple[int, float, _RankClock]]] = defaultdict(list)
    for (first, second), edge in edges.items():
        neighbours[first].append((second, edge.offset_us, edge))
        neighbours[second].append((first, -edge.offset_us, edge))
    done: dict[int, _RankClock] = {}
    waiting = [(0.0, reference, _RankClock(0.0, 0.0, 0))]
    while waiting:
        variance, rank, clock = heapq.heappop(waiting)
        if rank in done:
            continue
        done[rank] = clock
        for other, later_us, edge in neighbours[rank]:
            if other not in done:
                combined = _RankClock(
                    offset_us=clock.offset_us - later_us,
                    spread_us=math.hypot(clock.spread_us, edge.spread_us),
                    calls=min(clock.calls or edge.calls, edge.calls),
                )
                heapq.heappush(waiting, (variance + edge.variance, other, combined))
    return done
