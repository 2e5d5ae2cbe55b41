"""Rows that the FFN experts of each rank computed: the lateness that routing explains.

Ranks of an expert-parallel group meet in every all-to-all, so in every pass through a layer the
rank with most rows sets the pace, whichever it is. Rows are counted from the routing, so neither a
busy machine nor the recording affects them. A rank that computes longer than its rows explain is
slow by itself: its cores, clock, or neighbours.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from moepp_megatron.tools.profiling.measures.exposure import MeasuredStepTime
from moepp_megatron.tools.profiling.trace import RankTrace

# megatron-core's description of the group that an all-to-all of experts spans.
_GROUP = "EXPERT_MODEL_PARALLEL_GROUP"
# Times of ranks with equal work differ by less on a machine with nothing else to do.
_SLOW = 1.25


@dataclass(frozen=True)
class ExpertLoad:
    """Rows of FFN experts by step and rank, in forward passes; a repeated one is not counted again.

    `busiest` is the rank with most rows over all steps, `busiest_over_mean` the rows of the busiest
    rank of each pass over those of the mean rank, all passes added: 1 for an even load, EP if one
    rank does everything.
    """

    rows: dict[tuple[int, int], int]
    busiest: int
    busiest_over_mean: float


def expert_load(traces: Iterable[RankTrace], steps: Iterable[int]) -> ExpertLoad | None:
    """Count the rows of the ranks of all groups that were recorded completely.

    None without expert parallelism or counted passes, and where expert tensor ranks share rows.
    """
    wanted = list(steps)
    # By group, step, layer and number of the pass: each member's selections for each rank.
    passes: dict[tuple[tuple[int, ...], int, int, int], list[list[int]]] = defaultdict(list)
    for trace in traces:
        members = _expert_group(trace)
        if len(members) > 1 and trace.about.layout.get("etp", 1) == 1:
            for step in wanted:
                numbers: Counter[int] = Counter()
                for passed in trace.passes(step):
                    if not passed.recomputed and len(passed.to_ranks) == len(members):
                        key = (members, step, passed.layer, numbers[passed.layer])
                        passes[key].append(passed.to_ranks)
                        numbers[passed.layer] += 1
    rows: Counter[tuple[int, int]] = Counter()
    most = mean = 0.0
    for (members, step, *_), sent in passes.items():
        if len(sent) == len(members):
            received = [sum(column) for column in zip(*sent, strict=True)]
            most += max(received)
            mean += sum(received) / len(members)
            rows.update({(step, rank): n for rank, n in zip(members, received, strict=True)})
    if not mean:
        return None
    total: Counter[int] = Counter()
    for (_, rank), count in rows.items():
        total[rank] += count
    return ExpertLoad(dict(rows), max(sorted(total), key=lambda passed: total[passed]), most / mean)


def _expert_group(trace: RankTrace) -> tuple[int, ...]:
    """Ranks of this rank's expert-parallel group; empty where it has none."""
    groups = (group.ranks for group in trace.groups.values() if group.description == _GROUP)
    return next(groups, ())


class SlowRank(NamedTuple):
    """The rank whose time its rows explain least, with ratios to the mean of its group's others."""

    rank: int
    time_ratio: float  # of computing time
    rows_ratio: float  # of rows of FFN experts


def slow_rank(
    traces: Iterable[RankTrace],
    times: Mapping[int, Mapping[int, MeasuredStepTime]],
    load: ExpertLoad | None,
) -> SlowRank | None:
    """The rank that others wait for because it is slow, not because it has more rows; or None.

    All of a rank's work may be in its experts, so additional time in proportion to additional rows
    counts as explained; fewer rows explain no time. `times` are by step and rank.
    """
    if load is None:
        return None
    compute = {(step, rank): t.compute_us for step, own in times.items() for rank, t in own.items()}
    candidates = []
    for group in {_expert_group(trace) for trace in traces}:
        for rank in group:
            others = [other for other in group if other != rank]
            ratios = [_ratio(numbers, rank, others) for numbers in (compute, load.rows)]
            if ratios[0] > _SLOW * max(1.0, ratios[1]):
                candidates.append(SlowRank(rank, *ratios))
    return max(candidates, key=lambda candidate: candidate.time_ratio, default=None)


def _ratio(numbers: Mapping[tuple[int, int], float], rank: int, others: list[int]) -> float:
    """A rank's sum over steps, divided by the others' mean; 0 if theirs is unknown."""
    own_sum = sum(value for (_, of), value in numbers.items() if of == rank)
    rest = sum(value for (_, of), value in numbers.items() if of in others)
    return own_sum * len(others) / rest if rest else 0.0
