"""Logs of NCCL Inspector, the profiler plugin in NCCL's source.

Written by plugins/profiler/inspector (ext-profiler/inspector before NCCL 2.29.7),
inspector_json.cc: files `HOST-pidN.log`, one JSON object a line, each with `header` (the
communicator), `metadata` and either `coll_perf` or, from NCCL 2.30 on, `p2p_perf`. All of them call
themselves format v4.0; fields that were added since are read where they are.

What the plugin leaves out: calls of fewer bytes than NCCL_INSPECTOR_DUMP_MIN_SIZE_BYTES (8192
unless set; per peer in an all-to-all, whose smaller parts therefore read as 0), and, unless
NCCL_INSPECTOR_DUMP_VERBOSE=1, when a call took place. Set both to 1 for a whole record.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp_megatron.profiling.collective import Collective, Operation
from moepp_megatron.profiling.communicators import Membership, Ranks, global_ranks
from moepp_megatron.profiling.nccl_names import buffer_size, operation_of
from moepp_megatron.profiling.peer_transfers import Transfer, put_together, split_calls
from moepp_megatron.profiling.records import SourceError, field, json_objects

SOURCE = "inspector"
_FORMATS = ("v4.0",)


@dataclass(frozen=True)
class _Record:
    """One line: where it stands, its process, its communicator, its numbers."""

    place: str
    member: Membership
    name: str
    performance: dict[str, Any]
    is_p2p: bool

    def number(self, name: str) -> int:
        """A field of `coll_perf` or `p2p_perf`, whose names begin alike."""
        return field(self.performance, f"{self._prefix}_{name}", int, self.place)

    @property
    def function(self) -> str:
        """Name of the NCCL function."""
        return field(self.performance, self._prefix, str, self.place)

    @property
    def _prefix(self) -> str:
        return "p2p" if self.is_p2p else "coll"

    def times(self) -> tuple[float, float, bool]:
        """Start, end and whether they lie on the host's clock (see `Collective.placed`).

        The kernel's start is when the host saw it; how long it took is by the GPU's own clock.
        """
        took = float(self.number("exec_time_us"))
        trace = field(self.performance, "event_trace_ts", dict, self.place, {})
        kernels = field(trace, "kernel_events", list, self.place, [])
        starts = [field(one, "kernel_start_ts", float, self.place) for one in kernels]
        if not starts:
            return 0.0, took, False
        return min(starts), min(starts) + took, True

    def host(self, event: str) -> float | None:
        """When the host began (`start`) or ended (`stop`) to issue it; None unless verbose."""
        name = f"event_trace_ts.{self._prefix}_{event}_ts"
        return field(self.performance, name, float, self.place, -1.0) if self.verbose else None

    @property
    def verbose(self) -> bool:
        """Whether the line has the times of its events."""
        return "event_trace_ts" in self.performance


def read_inspector(paths: Sequence[Path]) -> list[Collective]:
    """Reads the logs of all processes of a run.

    Args:
        paths: The files, one a process; `.gz` too.

    Returns:
        Collectives by rank and, where known, start. Sends and receives of one grouped call are one
        ALL_TO_ALL, which took as long as its longest part unless verbose.

    Raises:
        SourceError: A file is damaged, lacks a field, or is of an unknown format version.
    """
    records = [record for path in paths for record in _records(path)]
    ranks = global_ranks(record.member for record in records)
    found = [_collective(record, ranks) for record in records if not record.is_p2p]
    found += _exchanges([record for record in records if record.is_p2p], ranks)
    return sorted(found, key=lambda one: (one.rank, one.start_us))


def _records(path: Path) -> Iterable[_Record]:
    for place, line in json_objects(path):
        version = field(line, "metadata.inspector_output_format_version", str, place)
        if version not in _FORMATS:
            raise SourceError(
                f"{place}: NCCL Inspector format {version}; supported: {', '.join(_FORMATS)}"
            )
        is_p2p = "p2p_perf" in line
        host = field(line, "metadata.hostname", str, place)
        process = field(line, "metadata.pid", int, place)
        member = Membership(
            process=f"{host} pid {process:010d}",
            communicator=field(line, "header.id", str, place),
            rank=field(line, "header.rank", int, place),
            size=field(line, "header.n_ranks", int, place),
        )
        name = field(line, "header.comm_name", str, place, "")
        name = "" if name == "unknown" else name
        performance = field(line, "p2p_perf" if is_p2p else "coll_perf", dict, place)
        yield _Record(place, member, name, performance, is_p2p)


def _base(record: _Record, ranks: Ranks, placed: bool) -> dict[str, Any]:
    group = record.member.communicator
    return {
        "rank": ranks.of_process[record.member.process],
        "group": group,
        "description": record.name,
        "group_ranks": ranks.of_communicator[group],
        "group_size": record.member.size,
        "placed": placed,
        "source": SOURCE,
    }


def _collective(record: _Record, ranks: Ranks) -> Collective:
    operation = operation_of(record.function)
    start, end, placed = record.times()
    size = buffer_size(operation, record.number("msg_size_bytes"), record.member.size)
    return Collective(
        operation=operation,
        size=size,
        sequence=record.number("sn"),
        start_us=start,
        end_us=end,
        **_base(record, ranks, placed),
    )


def _exchanges(records: Sequence[_Record], ranks: Ranks) -> list[Collective]:
    """All-to-alls, sends and receives from the records of single peers."""
    by_member: dict[Membership, list[_Record]] = defaultdict(list)
    for record in records:
        by_member[record.member].append(record)
    found = []
    for member, own in by_member.items():
        own.sort(key=lambda record: record.number("sn"))
        # Some were lost where the numbers, which begin at 1, are not all there.
        complete = [record.number("sn") for record in own] == list(range(1, len(own) + 1))
        number = 0
        for call in split_calls((_transfer(record) for record in own), member.rank):
            placed = all(one.start_us > 0 for one in call)
            base = Collective(
                operation=Operation.OTHER,
                sequence=number if complete else None,
                **_base(own[0], ranks, placed),
            )
            made = put_together(call, member.rank, base)
            number += made[0].operation is Operation.ALL_TO_ALL
            found += made
    return found


def _transfer(record: _Record) -> Transfer:
    start, end, _ = record.times()
    operation = operation_of(record.function)
    if operation not in (Operation.SEND, Operation.RECEIVE):
        raise SourceError(f"{record.place}: field 'p2p' is {record.function!r}, not Send or Recv")
    return Transfer(
        is_send=operation is Operation.SEND,
        peer=record.number("peer"),
        size=record.number("msg_size_bytes"),
        start_us=start,
        end_us=end,
        issued_us=record.host("start"),
        returned_us=record.host("stop"),
    )
