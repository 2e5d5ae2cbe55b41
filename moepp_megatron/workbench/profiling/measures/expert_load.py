"""Rows that the FFN experts of each rank computed: the lateness that routing explains.

Ranks of an expert-parallel group meet in every all-to-all, so in every pass through a layer the
rank with most rows sets the pace, whichever it is. Rows are counted from the routing, so neither a
busy machine nor the recording affects them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moepp_megatron.workbench.profiling.trace import RankTrace

# megatron-core's description of the group that an all-to-all of experts spans.
_GROUP = "EXPERT_MODEL_PARALLEL_GROUP"


@dataclass(frozen=True)
class ExpertLoad:
    """Rows of FFN experts in forward passes; a repeated pass is not counted again.

    Attributes:
        rows: Rows by step and rank.
        busiest: The rank with most rows over all steps.
        busiest_over_mean: Rows of the busiest rank of each pass over those of the mean rank, all
            passes added: 1 for an even load, EP if one rank does everything.
    """

    rows: dict[tuple[int, int], int]
    busiest: int
    busiest_over_mean: float


def expert_load(traces: Iterable[RankTrace], steps: Iterable[int]) -> ExpertLoad | None:
    """Count the rows of the ranks of all groups that were recorded completely.

    Returns:
        None without expert parallelism or counted passes, and with expert tensor parallelism,
        where ranks share rows.
    """
    wanted = set(steps)
    passes: dict[tuple[Any, ...], list[list[int]]] = defaultdict(list)
    for trace in traces:
        members = expert_group(trace)
        if len(members) > 1 and trace.about.get("layout", {}).get("etp", 1) == 1:
            for key, to_ranks in _passes(trace, wanted):
                if len(to_ranks) == len(members):
                    passes[(members, *key)].append(to_ranks)
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
    return ExpertLoad(dict(rows), max(sorted(total), key=lambda one: total[one]), most / mean)


def expert_group(trace: RankTrace) -> tuple[int, ...]:
    """Ranks of this rank's expert-parallel group; empty where it has none."""
    found = (one.ranks for one in trace.groups.values() if one.description == _GROUP)
    return next(found, ())


def _passes(trace: RankTrace, steps: set[int]) -> Iterable[tuple[tuple[int, int, int], list[int]]]:
    """Step, layer and number of each forward pass, and its selections for each rank."""
    for entry in trace.about.get("steps", []):
        numbers: Counter[int] = Counter()
        for counted in entry.get("passes", []):
            if entry["step"] in steps and not counted["recomputed"]:
                layer = counted["layer"]
                yield (entry["step"], layer, numbers[layer]), counted["to_ranks"]
                numbers[layer] += 1
