"""Reads logs of NCCL Inspector, the profiler plugin in NCCL's source.

Written by plugins/profiler/inspector (ext-profiler/inspector before NCCL 2.29.7),
inspector_json.cc: files `HOST-pidN.log`, one JSON object per line, each with `header` (the
communicator), `metadata` and either `coll_perf` or, from NCCL 2.30 on, `p2p_perf`. All of them call
themselves format v4.0; fields that were added since are read where they are.

What the plugin leaves out: calls of fewer bytes than NCCL_INSPECTOR_DUMP_MIN_SIZE_BYTES (8192
unless set; per peer in an all-to-all, whose smaller parts therefore read as 0), and, unless
NCCL_INSPECTOR_DUMP_VERBOSE=1, when a call took place. Set both to 1 for a whole record.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp_megatron.tools.profiling.collective import (
    PARTED,
    POINT_TO_POINT,
    Collective,
    Operation,
)
from moepp_megatron.tools.profiling.formats.communicators import Membership, Ranks, global_ranks
from moepp_megatron.tools.profiling.formats.peer_transfers import (
    PeerTransfer,
    join_transfers,
    split_calls,
)
from moepp_megatron.tools.profiling.formats.records import MOST_RANKS, field, json_objects
from moepp_megatron.tools.profiling.trace import ProfileError

_FORMATS = ("v4.0",)
# NVIDIA/nccl 2.30.7, src/collectives.cc (ncclFuncToString); the plugin says All2All for AlltoAll.
_OPERATIONS = {
    "AllGather": Operation.ALL_GATHER,
    "AllGatherV": Operation.ALL_GATHER,
    "AllReduce": Operation.ALL_REDUCE,
    "AlltoAll": Operation.ALL_TO_ALL,
    "All2All": Operation.ALL_TO_ALL,
    "Broadcast": Operation.BROADCAST,
    "Gather": Operation.GATHER,
    "Recv": Operation.RECEIVE,
    "Reduce": Operation.REDUCE,
    "ReduceScatter": Operation.REDUCE_SCATTER,
    "Scatter": Operation.SCATTER,
    "Send": Operation.SEND,
}


@dataclass(frozen=True, slots=True)
class _Record:
    """The kept fields of one line, in bytes and microseconds; logs grow to millions of lines."""

    member: Membership
    # Of the communicator; "" where unknown.
    name: str
    operation: Operation
    # Of the call within communicator and function, or of this process's transfer.
    number: int
    size: int
    # By the GPU's clock.
    took_us: int
    # When the host saw the kernel start, began to issue the call, had issued it; None unless
    # verbose.
    kernel_us: float | None
    issued_us: float | None
    returned_us: float | None
    # Rank within the communicator; -1 for collectives.
    peer: int

    @property
    def start_us(self) -> float:
        """When the kernel started; 0 where unknown."""
        return self.kernel_us or 0.0


def read_inspector(paths: Sequence[Path]) -> list[Collective]:
    """Reads the logs of all processes of a run, one file each; also `.gz`.

    Returns:
        Collectives by rank and, where known, start. Sends and receives of one grouped call are one
        ALL_TO_ALL, which took as long as its longest part unless verbose.

    Raises:
        ProfileError: A file is damaged, lacks a field, or has an unknown format version.
    """
    records = [record for path in paths for record in _records(path)]
    ranks = global_ranks(record.member for record in records)
    transfers: dict[Membership, list[_Record]] = defaultdict(list)
    collectives = []
    for record in records:
        if record.peer >= 0 and record.operation in POINT_TO_POINT:
            transfers[record.member].append(record)
        else:
            collectives.append(_collective(record, ranks))
    for own in transfers.values():
        collectives += _exchanges(own, ranks)
    return sorted(collectives, key=lambda call: (call.rank, call.start_us))


def _records(path: Path) -> Iterator[_Record]:
    members: dict[Membership, Membership] = {}
    for place, line in json_objects(path):
        version = field(line, "metadata.inspector_output_format_version", str, place)
        if version not in _FORMATS:
            raise ProfileError(
                f"{place}: NCCL Inspector format {version[:20]}; supported: {', '.join(_FORMATS)}"
            )
        host = field(line, "metadata.hostname", str, place)
        process = field(line, "metadata.pid", int, place, least=0)
        size = field(line, "header.n_ranks", int, place, least=1)
        member = Membership(
            communicator=field(line, "header.id", str, place)[:64],
            rank=field(line, "header.rank", int, place, least=0),
            process=f"{host[:64]} pid {process:010d}",
            size=size,
        )
        if member.rank >= size or size > MOST_RANKS:
            raise ProfileError(
                f"{place}: rank {member.rank} of {size} ranks; give a log that NCCL has written"
            )
        # One object for all lines of a communicator.
        member = members.setdefault(member, member)
        name = field(line, "header.comm_name", str, place, "")
        yield _record(line, member, "" if name == "unknown" else name, place)


def _record(line: dict[str, Any], member: Membership, name: str, place: str) -> _Record:
    kind = "p2p" if "p2p_perf" in line else "coll"
    numbers = field(line, f"{kind}_perf", dict, place)
    kernel, issued, returned = _trace(numbers, kind, place)
    return _Record(
        member=member,
        name=name,
        operation=_OPERATIONS.get(field(numbers, kind, str, place), Operation.OTHER),
        number=field(numbers, f"{kind}_sn", int, place),
        size=field(numbers, f"{kind}_msg_size_bytes", int, place, least=0),
        took_us=field(numbers, f"{kind}_exec_time_us", int, place, least=0),
        kernel_us=kernel,
        issued_us=issued,
        returned_us=returned,
        peer=field(numbers, "p2p_peer", int, place, least=0) if kind == "p2p" else -1,
    )


def _trace(
    numbers: dict[str, Any], kind: str, place: str
) -> tuple[float | None, float | None, float | None]:
    """When the host saw the kernel start, and when it began and finished issuing the call."""
    if "event_trace_ts" not in numbers:
        return None, None, None
    trace = field(numbers, "event_trace_ts", dict, place)
    kernels = field(trace, "kernel_events", list, place)
    starts = [field(kernel, "kernel_start_ts", float, place) for kernel in kernels]
    issued = field(trace, f"{kind}_start_ts", float, place)
    # A channel whose kernel was not seen has 0.
    first = min((start for start in starts if start > 0), default=None)
    return first, issued, field(trace, f"{kind}_stop_ts", float, place)


def _base(record: _Record, ranks: Ranks, placed: bool) -> dict[str, Any]:
    return {
        "rank": ranks.of_process[record.member.process],
        "group": record.member.communicator,
        "description": record.name,
        "group_ranks": ranks.of_communicator[record.member.communicator],
        "group_size": record.member.size,
        "placed": placed,
    }


def _collective(record: _Record, ranks: Ranks) -> Collective:
    # NCCL's count is that of one rank's part.
    parts = record.member.size if record.operation in PARTED else 1
    return Collective(
        operation=record.operation,
        size=record.size * parts,
        sequence=None if record.peer >= 0 else record.number,
        start_us=record.start_us,
        end_us=record.start_us + record.took_us,
        **_base(record, ranks, record.kernel_us is not None),
    )


def _exchanges(records: list[_Record], ranks: Ranks) -> list[Collective]:
    """All-to-alls, sends and receives from a member's records of single peers."""
    records.sort(key=lambda record: record.number)
    # Some were lost where the numbers, which begin at 1, are not all there.
    complete = [record.number for record in records] == list(range(1, len(records) + 1))
    placed = all(record.kernel_us is not None for record in records)
    rank, collectives, number = records[0].member.rank, [], 0
    for call in split_calls((_transfer(record) for record in records), rank):
        base = Collective(
            operation=Operation.OTHER,
            sequence=number if complete else None,
            **_base(records[0], ranks, placed),
        )
        made = join_transfers(call, rank, base)
        number += made[0].operation is Operation.ALL_TO_ALL
        collectives += made
    return collectives


def _transfer(record: _Record) -> PeerTransfer:
    return PeerTransfer(
        is_send=record.operation is Operation.SEND,
        peer=record.peer,
        size=record.size,
        start_us=record.start_us,
        end_us=record.start_us + record.took_us,
        issued_us=record.issued_us,
        returned_us=record.returned_us,
    )
