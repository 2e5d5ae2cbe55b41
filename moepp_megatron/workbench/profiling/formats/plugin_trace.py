"""Reads chrome traces of NCCL's example profiler plugin.

Written by plugins/profiler/example/print_event.cc (ext-profiler/example before NCCL 2.29.7): files
`PREFIX_COMMUNICATOR_RANK.json`, one per communicator and rank, PREFIX being NCCL_PROFILE_DUMP_FILE.
Events begin (`ph` b) and end (e) in the order of their nesting; their categories are

- GROUP (to NCCL 2.27) or GROUP_API (from 2.28): calls that were issued together,
- COLL_API, P2P_API, KERNEL_LAUNCH (from 2.28): the host's calls,
- COLL, P2P: the operations, with `CommHash`, `Rank`, `Count`, `Datatype` and `SeqNum` or `Peer`,
- GPU (from 2.27): their kernels by channel, with the GPU's clock in nanoseconds,
- PROXY, NET: the network's threads; CE_COLL (from 2.29.7): copies without a kernel.

Times are microseconds since the plugin's start in that process. The end of an operation is that of
the transfer only if kernels (NCCL_PROFILE_EVENT_MASK with 64) or the network were recorded; without
them it is the time at which the host had launched it, and the transfer's duration is unknown.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moepp_megatron.config.json_file import parse_json
from moepp_megatron.workbench.profiling.collective import Collective, Operation
from moepp_megatron.workbench.profiling.formats import records
from moepp_megatron.workbench.profiling.formats.communicators import Membership, Ranks, global_ranks
from moepp_megatron.workbench.profiling.formats.nccl_names import (
    POINT_TO_POINT,
    buffer_size,
    data_type,
    operation_of,
)
from moepp_megatron.workbench.profiling.formats.peer_transfers import (
    PeerTransfer,
    put_together,
    split_calls,
)
from moepp_megatron.workbench.profiling.formats.records import SourceError

SOURCE = "plugin"
_GROUPS = ("GROUP", "GROUP_API")
_CALLS = ("COLL_API", "P2P_API")
_OPERATIONS = ("COLL", "P2P", "CE_COLL")
# NCCL 2.28 left names and pointers without quotes.
_UNQUOTED = re.compile(r'("(?:Stream|datatype)": )([^",}\s]+)')
_FILE_NAME = re.compile(r"(?P<prefix>.*)_(?P<communicator>\d+)_(?P<rank>\d+)\.json(\.gz)?")


@dataclass
class _Operation:
    """An operation while its lines are read.

    Attributes:
        begin: Its first event.
        place: Place of that event in the file.
        group: Number of the group that it was issued in; -1 for none.
        stream: CUDA stream, where the host's call was recorded.
        seen_us: Starts of its kernels, as the host saw them.
        clocks_ns: Starts and ends of its kernels by the GPU.
        has_network: Whether proxy threads worked for it.
        end_us: When its last event came.
    """

    begin: dict[str, Any]
    place: str
    group: int
    stream: str
    seen_us: list[float] = field(default_factory=list)
    clocks_ns: list[tuple[int, int]] = field(default_factory=list)
    has_network: bool = False
    end_us: float = 0.0

    def argument[Value](self, name: str, kind: type[Value]) -> Value:
        return records.field(self.begin, f"args.{name}", kind, self.place)

    @property
    def is_transfer(self) -> bool:
        """Whether it is a send or receive; an unknown operation between two ranks is neither."""
        name = records.field(self.begin, "name", str, self.place)
        return self.begin["cat"] == "P2P" and operation_of(name) in POINT_TO_POINT

    @property
    def is_copy(self) -> bool:
        """Whether it ran on copy engines, without a kernel."""
        return self.begin["cat"] == "CE_COLL"

    def data(self) -> tuple[int | None, str]:
        """Bytes of its count (None if the type is unknown), and the data type."""
        count = self.argument("count" if self.is_copy else "Count", int)
        name = "datatype" if self.is_copy else "Datatype"
        numbered = isinstance(self.begin.get("args", {}).get(name), int)
        dtype, width = data_type(self.argument(name, int) if numbered else self.argument(name, str))
        return (None if width is None else count * width), dtype

    def times(self) -> tuple[float, float, bool]:
        """Start and end in microseconds, and whether they are those of the transfer."""
        start = records.field(self.begin, "ts", float, self.place)
        if self.is_copy:
            took = records.field(self.begin, "args.duration_gpu_us", float, self.place, 0.0)
            return start, start + took if took else self.end_us, True
        clocks = [(first, last) for first, last in self.clocks_ns if 0 < first < last]
        if clocks and self.seen_us:
            took = (max(last for _, last in clocks) - min(first for first, _ in clocks)) / 1e3
            return min(self.seen_us), min(self.seen_us) + took, True
        if self.has_network:
            return start, self.end_us, True
        return start, start, False


@dataclass(frozen=True)
class _File:
    """The operations of one communicator on one rank."""

    process: str
    communicator: str
    rank: int
    operations: list[_Operation]

    @property
    def member(self) -> Membership:
        return Membership(
            process=self.process, communicator=self.communicator, rank=self.rank, size=0
        )

    def transfers(self) -> list[_Operation]:
        return [one for one in self.operations if one.is_transfer]


def read_plugin_trace(paths: Sequence[Path]) -> list[Collective]:
    """Reads the traces of all processes and communicators of a run.

    A group's size is not in them, so give the files of all ranks. It counts as known if two or more
    ranks, from 0 on without a gap, were recorded, and all peers are among them.

    Args:
        paths: The files; `.gz` too.

    Returns:
        Collectives by rank and start. The sends and receives of one group are one ALL_TO_ALL.

    Raises:
        SourceError: If a file is damaged or lacks a field.
    """
    files = [file for path in paths if (file := _read(path)) is not None]
    known = _sizes(files)
    ranks = global_ranks(
        replace(file.member, size=known.get(file.communicator, 0)) for file in files
    )
    found: list[Collective] = []
    for file in files:
        found += [
            _collective(one, _base(file, one, ranks))
            for one in file.operations
            if not one.is_transfer
        ]
        found += _exchanges(file, ranks)
    return sorted(found, key=lambda one: (one.rank, one.start_us))


def _events(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and value of each event, without a last one that a killed process left unfinished."""
    for number, line, is_last in records.read_lines(path):
        place = f"{path}, line {number}"
        text = _UNQUOTED.sub(r'\1"\2"', line.removeprefix("[").removesuffix("]").rstrip(","))
        if not text:
            continue
        try:
            event = parse_json(text)
        except ValueError as error:
            if is_last:
                return
            raise SourceError(f"{place}: not an event on a line of its own ({error})") from error
        if not isinstance(event, dict):
            raise SourceError(f"{place}: an event is expected, not {type(event).__name__}")
        if event:
            yield place, event


def _read(path: Path) -> _File | None:
    """A file's operations; None if it has none."""
    done: list[_Operation] = []
    current: _Operation | None = None
    groups, group, stream, process = 0, -1, "", 0
    for place, event in _events(path):
        category = records.field(event, "cat", str, place)
        begins = records.field(event, "ph", str, place) == "b"
        process = records.field(event, "pid", int, place)
        if category in _GROUPS:
            group, groups = (groups, groups + 1) if begins else (-1, groups)
        elif category in _CALLS:
            stream = records.field(event, "args.Stream", str, place, "") if begins else ""
        elif category in _OPERATIONS and begins:
            current = _Operation(event, place, group, stream)
        elif category in _OPERATIONS and current is not None:
            current.end_us = records.field(event, "ts", float, place)
            done.append(current)
            current = None
        elif current is not None:
            _note(current, category, begins, event, place)
    return _identify(path, process, done) if done else None


def _note(
    operation: _Operation, category: str, begins: bool, event: dict[str, Any], place: str
) -> None:
    """Add an event within an operation to the operation."""
    operation.has_network = operation.has_network or category == "PROXY"
    if category == "GPU" and begins:
        operation.seen_us.append(records.field(event, "ts", float, place))
        first = records.field(event, "args.StartGpuClk", int, place)
        last = records.field(event, "args.StopGpuClk", int, place)
        operation.clocks_ns.append((first, last))


def _identify(path: Path, process: int, operations: list[_Operation]) -> _File:
    """The communicator and rank of a file; the prefix of its name distinguishes hosts."""
    name = _FILE_NAME.fullmatch(path.name)
    prefix = name["prefix"] if name else path.parent.name
    for one in operations:
        if not one.is_copy:
            communicator, rank = one.argument("CommHash", int), one.argument("Rank", int)
            break
    else:
        if name is None:
            raise SourceError(
                f"{path}: only copies, which do not name their communicator; keep the name that "
                "the plugin gave the file, PREFIX_COMMUNICATOR_RANK.json"
            )
        communicator, rank = int(name["communicator"]), int(name["rank"])
    return _File(f"{prefix} pid {process:010d}", str(communicator), rank, operations)


def _sizes(files: Iterable[_File]) -> dict[str, int]:
    """Ranks by communicator, where all of them seem recorded.

    A single rank is not enough: NCCL does not report communicators of one rank to profilers.
    """
    present: dict[str, set[int]] = defaultdict(set)
    named: dict[str, set[int]] = defaultdict(set)
    for file in files:
        present[file.communicator].add(file.rank)
        named[file.communicator] |= {one.argument("Peer", int) for one in file.transfers()}
    return {
        name: len(ranks)
        for name, ranks in present.items()
        if len(ranks) > 1 and ranks | named[name] == set(range(len(ranks)))
    }


def _base(file: _File, operation: _Operation, ranks: Ranks) -> Collective:
    start, end, placed = operation.times()
    size, dtype = operation.data()
    return Collective(
        operation=operation_of(records.field(operation.begin, "name", str, operation.place)),
        rank=ranks.of_process[file.process],
        group=file.communicator,
        group_ranks=ranks.of_communicator[file.communicator],
        group_size=ranks.sizes[file.communicator],
        size=size,
        dtype=dtype,
        start_us=start,
        end_us=end,
        placed=placed,
        stream=operation.stream,
        source=SOURCE,
    )


def _collective(operation: _Operation, base: Collective) -> Collective:
    size = base.size
    whole = None if size is None else buffer_size(base.operation, size, base.group_size)
    if operation.is_copy:
        even = base.operation is Operation.ALL_TO_ALL and size is not None and base.group_size > 0
        parts = (size or 0,) * base.group_size if even else None
        return replace(base, size=whole, sent=parts, received=parts)
    if operation.begin["cat"] == "P2P":
        return replace(base, size=whole)
    return replace(base, size=whole, sequence=operation.argument("SeqNum", int))


def _exchanges(file: _File, ranks: Ranks) -> list[Collective]:
    """All-to-alls, sends and receives of a file, by the group they were issued in."""
    by_group: dict[int, list[_Operation]] = defaultdict(list)
    for operation in file.transfers():
        by_group[operation.group].append(operation)
    found = []
    for operations in by_group.values():
        bases = [_base(file, one, ranks) for one in operations]
        placed = all(base.placed for base in bases)
        transfers = [_transfer(*pair) for pair in zip(operations, bases, strict=True)]
        for call in split_calls(transfers):
            found += put_together(call, file.rank, replace(bases[0], placed=placed))
    return found


def _transfer(operation: _Operation, base: Collective) -> PeerTransfer:
    if base.size is None:
        raise SourceError(f"{operation.place}: unknown data type {base.dtype!r}")
    return PeerTransfer(
        is_send=base.operation is Operation.SEND,
        peer=operation.argument("Peer", int),
        size=base.size,
        start_us=base.start_us,
        end_us=base.end_us,
    )
