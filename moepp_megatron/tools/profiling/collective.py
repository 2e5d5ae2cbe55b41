"""One collective operation on one rank, in the common form of all sources.

Sizes follow nccl-tests (doc/PERFORMANCE.md): `size` is the bytes of the larger of the two buffers
of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Operation(StrEnum):
    """Kind of collective."""

    ALL_TO_ALL = "all_to_all"
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    REDUCE = "reduce"
    BROADCAST = "broadcast"
    GATHER = "gather"
    SCATTER = "scatter"
    SEND = "send"
    RECEIVE = "receive"
    BARRIER = "barrier"
    OTHER = "other"


POINT_TO_POINT = frozenset({Operation.SEND, Operation.RECEIVE})


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One call on one rank.

    Attributes:
        operation: What it does.
        rank: Global rank that recorded it.
        group: Name of the process group in its backend; "" where unknown.
        description: What the group is for (torch's `group_desc`); "" where unknown.
        group_ranks: Global ranks of the group, in order; empty where unknown.
        group_size: Ranks in the group; 0 where unknown.
        size: Bytes, by nccl-tests' convention; None where unknown.
        sent: Bytes to each rank of the group, in its order; None where unknown.
        received: Bytes from each rank of the group.
        sequence: Number of the call in its group, by which it is found on other ranks; None where
            unknown.
        start_us: When the transfer (on a host backend, the call) began, in microseconds, by the
            clock of this rank's file.
        end_us: When it had finished.
        pair: Ranks of the group that a send or receive goes from and to, within which `sequence`
            then counts; None for what all ranks do.
        row_bytes: Bytes of a row, the unit in which an all-to-all is split; None where unknown.
        scopes: Names of the profiler ranges it lies in, outermost first.
    """

    operation: Operation
    rank: int
    group: str = ""
    description: str = ""
    group_ranks: tuple[int, ...] = ()
    group_size: int = 0
    size: int | None = None
    sent: tuple[int, ...] | None = None
    received: tuple[int, ...] | None = None
    sequence: int | None = None
    start_us: float = 0.0
    end_us: float = 0.0
    pair: tuple[int, int] | None = None
    row_bytes: int | None = None
    scopes: tuple[str, ...] = ()

    @property
    def duration_us(self) -> float:
        """Microseconds from start to end, waiting for late ranks included."""
        return self.end_us - self.start_us
