"""Sums collectives by kind: operation, group by meaning, purpose and pass; their links' peaks."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from moepp_megatron.config.hardware import Hardware, find_hardware
from moepp_megatron.tools.profiling.measures.exposure import (
    Interval,
    computing,
    length,
    subtract,
    union,
)
from moepp_megatron.tools.profiling.measures.lateness import CallKey, Lateness
from moepp_megatron.tools.profiling.measures.purpose import PURPOSES, place_of, purpose_of
from moepp_megatron.tools.profiling.trace import Collective, Operation, RankTrace


def _link_of(
    call: Collective, nodes: list[str], hardware: Hardware | None, on_gpu: bool
) -> tuple[str, float | None]:
    """The slowest link that a group's messages take; its rated GB/s in one direction or None."""
    places = {nodes[rank] if rank < len(nodes) else None for rank in call.group_ranks}
    if not places or None in places:
        return "unknown", None
    if len(places) > 1:
        bits = hardware and hardware.network_gbit_s_per_gpu
        return "network", bits / 8 if bits else None
    # NVLink is rated with both directions added; nccl-tests' bus bandwidth is that of one.
    both = hardware and hardware.nvlink_gb_s
    return "NVLink" if on_gpu else "this machine", both / 2 if both else None


# The larger buffer holds a part for each rank, of which a rank's own does not travel.
_PARTED = frozenset(
    {
        Operation.ALL_GATHER,
        Operation.REDUCE_SCATTER,
        Operation.ALL_TO_ALL,
        Operation.GATHER,
        Operation.SCATTER,
    }
)


class _ClassName(NamedTuple):
    """The kind of a call; the group by its meaning, `phase` empty outside of layers."""

    purpose: str
    operation: Operation
    group: str
    phase: str


@dataclass
class CallClass:
    """Calls of a kind. Sums are over ranks and steps; microseconds and bytes."""

    name: _ClassName
    link: str
    peak_gb_s: float | None  # rated bandwidth of the link, GB/s; None where unknown
    calls: int = 0  # each counted on every rank
    group_size: int = 0  # ranks, as of the last call; 0 if unknown
    size: int = 0  # bytes by nccl-tests' convention; calls without a size count 0
    time_us: float = 0.0  # from start to end, waiting included
    wait_us: float = 0.0  # of that, for the last rank to start; 0 for unmatched calls
    matched: int = 0  # calls that could be matched on all ranks
    exposed_us: float = 0.0  # in which no work hid them
    bus_bytes: float = 0.0  # size times bus factor; over transfer time it is bus bandwidth

    @property
    def transfer_us(self) -> float:
        """Time without waiting for late ranks."""
        return self.time_us - self.wait_us

    @property
    def bus_gb_s(self) -> float | None:
        """Bus bandwidth over transfer time, GB/s."""
        known = self.bus_bytes and self.transfer_us > 0
        return self.bus_bytes / self.transfer_us / 1e3 if known else None

    @property
    def peak_share(self) -> float | None:
        """Bus bandwidth over the link's peak."""
        return self.bus_gb_s / self.peak_gb_s if self.bus_gb_s and self.peak_gb_s else None

    def add(self, call: Collective, late: Lateness | None) -> None:
        """Count a call."""
        self.calls += 1
        self.group_size = call.group_size
        self.time_us += call.duration_us
        if late is not None:
            self.matched += 1
            self.wait_us += late.wait_us
        if call.size is not None:
            self.size += call.size
            self.bus_bytes += call.size * _bus_factor(call.operation, max(call.group_size, 1))


def _bus_factor(operation: Operation, ranks: int) -> float:
    """Bus over algorithm bandwidth in a group of `ranks` (nccl-tests, doc/PERFORMANCE.md)."""
    if operation is Operation.ALL_REDUCE:
        return 2.0 * (ranks - 1) / ranks
    return (ranks - 1) / ranks if operation in _PARTED else 1.0


def call_classes(
    traces: list[RankTrace],
    steps: list[int],
    late: Mapping[CallKey, Lateness],
) -> list[CallClass]:
    """All calls within the steps by kind, the most exposed first."""
    classes: dict[_ClassName, CallClass] = {}
    about, on_gpu = traces[0].about, any(trace.on_gpu for trace in traces)
    hardware = find_hardware(about.device) if on_gpu else None
    for trace in traces:
        for span in [trace.steps[step] for step in steps if step in trace.steps]:
            compute = computing(trace, span)
            intervals: dict[_ClassName, list[Interval]] = defaultdict(list)
            for place, call in enumerate(trace.collectives):
                if span.start_us <= call.start_us < span.end_us:
                    name = _class_name(trace, call)
                    if name not in classes:
                        link = _link_of(call, about.nodes, hardware, on_gpu)
                        classes[name] = CallClass(name, *link)
                    classes[name].add(call, late.get((trace.rank, place)))
                    intervals[name].append((call.start_us, min(call.end_us, span.end_us)))
            for name, parts in intervals.items():
                classes[name].exposed_us += length(subtract(union(parts), compute))
    return sorted(
        classes.values(),
        key=lambda row: (-row.exposed_us, -row.time_us, PURPOSES.index(row.name.purpose)),
    )


def _class_name(trace: RankTrace, call: Collective) -> _ClassName:
    """The kind of a call."""
    meaning = trace.groups[call.group].meaning if call.group in trace.groups else "unknown"
    place = place_of(call)
    phase = place.phase if place else ""
    return _ClassName(purpose_of(call, meaning), call.operation, meaning, phase)
