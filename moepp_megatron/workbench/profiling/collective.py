"""One collective operation on one rank, the common form of all sources.

Sizes follow nccl-tests (doc/PERFORMANCE.md): `size` is the bytes of the larger of the two buffers
of a rank, so that algorithm and bus bandwidth are `size / time` and `size / time * factor`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Operation(StrEnum):
    """What a collective does."""

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


def bus_factor(operation: Operation, ranks: int) -> float:
    """Bus over algorithm bandwidth in a group of `ranks` (nccl-tests, doc/PERFORMANCE.md)."""
    if operation is Operation.ALL_REDUCE:
        return 2.0 * (ranks - 1) / ranks
    shared = (
        Operation.ALL_GATHER,
        Operation.REDUCE_SCATTER,
        Operation.ALL_TO_ALL,
        Operation.GATHER,
        Operation.SCATTER,
    )
    return (ranks - 1) / ranks if operation in shared else 1.0


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One call on one rank.

    Attributes:
        operation: What it does.
        rank: Global rank that recorded it.
        group: Name of the process group, as its backend gives it; "" where unknown.
        description: What the group is for, as it was given to torch (`group_desc`) or NCCL
            (`commName`); "" where unknown.
        group_ranks: Global ranks of the group, in order; empty where unknown.
        group_size: Ranks in the group; 0 where unknown.
        size: Bytes, by nccl-tests' convention (see the top of the file); None where unknown.
        dtype: Data type as the source names it; "" where unknown.
        sent: Bytes to each rank of the group, in its order; None where the source does not say or
            has cut the list short.
        received: Bytes from each rank of the group, in the form of `sent`.
        sequence: Number of the call among those of its group (NCCL: those of its group and
            operation), to find the same call on other ranks; None where the source does not say.
        start_us: When the transfer (or, on a host backend, the call) began, in microseconds, by the
            clock of this rank's file; `merge` brings ranks onto one clock.
        end_us: When it had finished, in microseconds.
        pair: Ranks of the group that a send or receive goes from and to; None for what all ranks
            do. `sequence` then counts within the pair.
        row_bytes: Bytes of a row, the unit in which an all-to-all is split; None where unknown.
        stream: CUDA stream or host thread.
        source: Which format it was read from: kineto, inspector, flight_recorder.
        scopes: Names of the profiler ranges it lies in, outermost first.
        synthetic: True if read from a sample written from documentation.
        placed: False where the source gives no time of the transfer, only how long it took:
            `start_us` is then 0, or when the host issued the call; no place on a timeline.
    """

    operation: Operation
    rank: int
    group: str = ""
    description: str = ""
    group_ranks: tuple[int, ...] = ()
    group_size: int = 0
    size: int | None = None
    dtype: str = ""
    sent: tuple[int, ...] | None = None
    received: tuple[int, ...] | None = None
    sequence: int | None = None
    start_us: float = 0.0
    end_us: float = 0.0
    pair: tuple[int, int] | None = None
    row_bytes: int | None = None
    stream: str = ""
    source: str = ""
    scopes: tuple[str, ...] = field(default=())
    synthetic: bool = False
    placed: bool = True

    @property
    def duration_us(self) -> float:
        """Microseconds from start to end, waiting for late ranks included."""
        return self.end_us - self.start_us

    @property
    def algorithm_bandwidth(self) -> float | None:
        """GB/s (1e9 bytes) by nccl-tests' `algbw`; None where size or time is unknown."""
        if self.size is None or self.duration_us <= 0:
            return None
        return self.size / self.duration_us / 1e3

    @property
    def bus_bandwidth(self) -> float | None:
        """GB/s by nccl-tests' `busbw`; None where size, time or group is unknown."""
        algorithm = self.algorithm_bandwidth
        if algorithm is None or self.group_size < 1:
            return None
        return algorithm * bus_factor(self.operation, self.group_size)
