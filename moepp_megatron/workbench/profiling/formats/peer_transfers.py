"""Reconstructs all-to-alls from sends and receives.

NCCL runs an all-to-all as one send and one receive per peer in a group, and reports only these to
profilers. torch leaves out peers that get nothing (csrc/cuda/nccl.cpp,
`all2all_single_unequal_split`), so that a call has between 0 and 2 n of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from moepp_megatron.workbench.profiling.collective import Collective, Operation

# A pipeline stage exchanges with two neighbours, and never with itself.
_NEIGHBOURS = 2


@dataclass(frozen=True, kw_only=True)
class PeerTransfer:
    """One send or receive of a rank.

    Attributes:
        is_send: Whether it is a send.
        peer: The other rank, within the group.
        size: Bytes.
        start_us: When it began, in microseconds; 0 where unknown.
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


def split_calls(
    transfers: Iterable[PeerTransfer], own_rank: int | None = None
) -> list[list[PeerTransfer]]:
    """Parts a rank's transfers into grouped calls.

    Args:
        transfers: Transfers in the order in which NCCL scheduled them; with `own_rank` None in any
            order.
        own_rank: This rank's place in the group.

    A call ends where the next transfer repeats a peer and direction, where a send to itself follows
    (the first round of NCCL's schedule, src/init.cc, p2pSchedule), or where the host had already
    returned from issuing the call: NCCL opens the events of a group before its launch and closes
    them after it (src/enqueue.cc, ncclProfilerStartTaskEvents).
    """
    calls: list[list[PeerTransfer]] = []
    seen: set[tuple[bool, int]] = set()
    returned = float("inf")
    for transfer in transfers:
        key = (transfer.is_send, transfer.peer)
        opens = transfer.is_send and transfer.peer == own_rank
        later = transfer.issued_us is not None and transfer.issued_us > returned
        if not calls or key in seen or opens or later:
            calls.append([])
            seen, returned = set(), float("inf")
        calls[-1].append(transfer)
        seen.add(key)
        if transfer.returned_us is not None:
            returned = min(returned, transfer.returned_us)
    return calls


def is_all_to_all(call: Sequence[PeerTransfer], own_rank: int) -> bool:
    """Whether a grouped call is an all-to-all rather than an exchange between pipeline stages.

    It is one if the rank sends to itself or exchanges with more than two others. An all-to-all of
    two or three ranks in which a rank keeps no row of its own is therefore taken for sends and
    receives.
    """
    peers = {transfer.peer for transfer in call}
    return own_rank in peers or len(peers) > _NEIGHBOURS


def put_together(call: Sequence[PeerTransfer], own_rank: int, base: Collective) -> list[Collective]:
    """The collectives of one grouped call.

    Args:
        call: Sends and receives.
        own_rank: This rank's place in the group.
        base: Their common fields: rank, group, group_ranks, group_size, dtype, source, placed.

    Returns:
        One ALL_TO_ALL, from the first start to the last end; or a SEND or RECEIVE for each.
    """
    if is_all_to_all(call, own_rank):
        sent = _by_peer((one for one in call if one.is_send), base.group_size)
        received = _by_peer((one for one in call if not one.is_send), base.group_size)
        totals = [sum(one.size for one in call if one.is_send is sends) for sends in (True, False)]
        return [
            replace(
                base,
                operation=Operation.ALL_TO_ALL,
                size=max(totals),
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
            sent=_by_peer([one], base.group_size) if one.is_send else None,
            received=None if one.is_send else _by_peer([one], base.group_size),
            pair=(own_rank, one.peer) if one.is_send else (one.peer, own_rank),
            start_us=one.start_us,
            end_us=one.end_us,
        )
        for one in call
    ]


def _by_peer(transfers: Iterable[PeerTransfer], ranks: int) -> tuple[int, ...] | None:
    """Bytes for each rank of the group; None where its size is unknown."""
    sizes = [0] * ranks
    for one in transfers:
        if not 0 <= one.peer < ranks:
            return None
        sizes[one.peer] += one.size
    return tuple(sizes)
