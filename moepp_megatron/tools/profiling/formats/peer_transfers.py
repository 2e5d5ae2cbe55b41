"""Reconstructs all-to-alls from sends and receives.

NCCL runs an all-to-all as one send and one receive per peer in a group, and reports only these to
profilers. torch leaves out peers that get nothing (csrc/cuda/nccl.cpp,
`all2all_single_unequal_split`), so that a call has between 0 and 2 n of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from moepp_megatron.tools.profiling.collective import Collective, Operation

# A pipeline stage exchanges with two neighbours, and never with itself.
_NEIGHBOURS = 2


@dataclass(frozen=True, kw_only=True)
class PeerTransfer:
    """One send or receive of a rank; microseconds.

    Attributes:
        is_send: Whether it is a send.
        peer: The other rank, within the group.
        size: Bytes.
        start_us: When it began; 0 where unknown.
        end_us: When it ended; the time it took where the beginning is unknown.
        issued_us: When the host began to issue it; None where unknown.
        returned_us: When the host had issued it, with all others of its group; None where unknown.
    """

    is_send: bool
    peer: int
    size: int
    start_us: float
    end_us: float
    issued_us: float | None = None
    returned_us: float | None = None


def split_calls(transfers: Iterable[PeerTransfer], own_rank: int) -> list[list[PeerTransfer]]:
    """Parts a rank's transfers, in the order in which NCCL scheduled them, into grouped calls.

    A call ends where the next transfer repeats a peer and direction, where a send to itself follows
    (the first round of NCCL's schedule, src/init.cc, p2pSchedule), or where the host had already
    returned from issuing the call: NCCL opens the events of a group before its launch and closes
    them after it (src/enqueue.cc, ncclProfilerStartTaskEvents).

    Args:
        transfers: The transfers.
        own_rank: This rank's place in the group.
    """
    calls: list[list[PeerTransfer]] = []
    seen: set[tuple[bool, int]] = set()
    returned = float("inf")
    for transfer in transfers:
        key = (transfer.is_send, transfer.peer)
        later = transfer.issued_us is not None and transfer.issued_us > returned
        if not calls or key in seen or key == (True, own_rank) or later:
            calls.append([])
            seen, returned = set(), float("inf")
        calls[-1].append(transfer)
        seen.add(key)
        if transfer.returned_us is not None:
            returned = min(returned, transfer.returned_us)
    return calls


def join_transfers(
    call: Sequence[PeerTransfer], own_rank: int, base: Collective
) -> list[Collective]:
    """The collectives of one grouped call.

    It is an all-to-all if the rank sends to itself or exchanges with more than two others. An
    all-to-all of two or three ranks in which a rank keeps no row of its own is therefore taken for
    sends and receives.

    Args:
        call: Sends and receives.
        own_rank: This rank's place in the group.
        base: What they have in common: rank, group, its ranks and size, placed.

    Returns:
        One ALL_TO_ALL, from the first start to the last end; or a SEND or RECEIVE for each.
    """
    peers = {transfer.peer for transfer in call}
    if own_rank in peers or len(peers) > _NEIGHBOURS:
        sides = [[one for one in call if one.is_send is sends] for sends in (True, False)]
        sent, received = (_by_peer(side, base.group_size) for side in sides)
        return [
            replace(
                base,
                operation=Operation.ALL_TO_ALL,
                size=max(sum(one.size for one in side) for side in sides),
                sent=sent,
                received=received,
                start_us=min(one.start_us for one in call),
                end_us=max(one.end_us for one in call),
            )
        ]
    return [
        replace(
            base,
            operation=Operation.SEND if one.is_send else Operation.RECEIVE,
            sequence=None,
            size=one.size,
            pair=(own_rank, one.peer) if one.is_send else (one.peer, own_rank),
            start_us=one.start_us,
            end_us=one.end_us,
        )
        for one in call
    ]


def _by_peer(transfers: Iterable[PeerTransfer], ranks: int) -> tuple[int, ...] | None:
    """Bytes for each rank of the group; None where its size is unknown."""
    sizes = [0] * ranks
    for transfer in transfers:
        if not 0 <= transfer.peer < ranks:
            return None
        sizes[transfer.peer] += transfer.size
    return tuple(sizes)
