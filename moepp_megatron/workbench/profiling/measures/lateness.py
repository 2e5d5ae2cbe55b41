"""Separates waiting for late ranks from the transfer itself.

A collective takes as long as its slowest member needs to join. The same call on all ranks of its
group has the same number in the group. The last rank to start does not wait; every other rank waits
from its own start to that rank's. The rest is the transfer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moepp_megatron.workbench.profiling.collective import Collective, Operation

# Rank and place in its list of collectives.
CallKey = tuple[int, int]


@dataclass(frozen=True)
class Lateness:
    """Waiting of one call on one rank.

    Attributes:
        wait_us: Time until the last rank had started.
        last_rank: The rank that started last.
    """

    wait_us: float
    last_rank: int


def lateness(
    collectives: Mapping[int, list[Collective]],
) -> dict[CallKey, Lateness]:
    """Split every call that all ranks of its group have recorded.

    Args:
        collectives: Collectives of each rank, on one clock.

    Returns:
        Lateness by rank and place in its list; calls that cannot be matched are missing.
    """
    same: dict[tuple[object, ...], list[CallKey]] = defaultdict(list)
    for rank, calls in collectives.items():
        for place, call in enumerate(calls):
            if call.sequence is not None and call.group_ranks:
                # NCCL's own profilers number each operation of a group by itself.
                kind = _kind(call)
                name = (call.group, call.group_ranks, call.pair, kind, call.sequence)
                same[name].append((rank, place))
    found: dict[CallKey, Lateness] = {}
    for keys in same.values():
        calls = [collectives[rank][place] for rank, place in keys]
        if len(calls) == _members(calls[0]) and _are_one(calls):
            found.update(zip(keys, _split(calls), strict=True))
    return found


def _members(call: Collective) -> int:
    return 2 if call.pair is not None else len(call.group_ranks)


def _are_one(calls: Iterable[Collective]) -> bool:
    """Whether these can be one call: they are of different ranks and of one operation."""
    ranks = [call.rank for call in calls]
    kinds = {_kind(call) for call in calls}
    return len(set(ranks)) == len(ranks) and len(kinds) == 1


def _kind(call: Collective) -> Operation:
    """The operation; a receive is the other end of a send."""
    return Operation.SEND if call.operation is Operation.RECEIVE else call.operation


def _split(calls: list[Collective]) -> list[Lateness]:
    last = max(calls, key=lambda call: call.start_us)
    return [
        Lateness(min(call.duration_us, last.start_us - call.start_us), last.rank) for call in calls
    ]
