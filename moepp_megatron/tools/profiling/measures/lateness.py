"""Separates waiting for late ranks from the transfer itself.

A collective takes as long as its slowest member needs to join. The same call on all ranks of its
group has the same number in the group. The last rank to start does not wait; every other rank waits
from its own start to that rank's. The rest is the transfer.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from moepp_megatron.tools.profiling.trace import Collective, Operation

# Rank and place in its list of collectives.
CallKey = tuple[int, int]


class Lateness(NamedTuple):
    """Waiting of one call on one rank, in microseconds, and the rank that started last."""

    wait_us: float
    last_rank: int


def lateness(collectives: Mapping[int, list[Collective]]) -> dict[CallKey, Lateness]:
    """Split every call that all ranks of its group have recorded, by rank and place in its list."""
    same: dict[tuple[object, ...], list[CallKey]] = defaultdict(list)
    for rank, calls in collectives.items():
        for place, call in enumerate(calls):
            if call.sequence is not None and call.group_ranks:
                # A receive is the other end of a send.
                receives = call.operation is Operation.RECEIVE
                kind = Operation.SEND if receives else call.operation
                name = (call.group, call.group_ranks, call.pair, kind, call.sequence)
                same[name].append((rank, place))
    by_call: dict[CallKey, Lateness] = {}
    for keys in same.values():
        calls = [collectives[rank][place] for rank, place in keys]
        members = 2 if calls[0].pair is not None else len(calls[0].group_ranks)
        if len({rank for rank, _ in keys}) == len(keys) == members:
            last = max(calls, key=lambda call: call.start_us)
            for key, call in zip(keys, calls, strict=True):
                wait = min(call.duration_us, last.start_us - call.start_us)
                by_call[key] = Lateness(wait, last.rank)
    return by_call
