"""Sums collectives by kind: operation, group by meaning, purpose and pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from moepp_megatron.workbench.profiling.collective import Collective, Operation, bus_factor
from moepp_megatron.workbench.profiling.measures.exposure import computing
from moepp_megatron.workbench.profiling.measures.intervals import length, subtract, union
from moepp_megatron.workbench.profiling.measures.lateness import CallKey, Lateness
from moepp_megatron.workbench.profiling.measures.links import Link, Links, MeasuredPeak
from moepp_megatron.workbench.profiling.measures.purpose import PURPOSES, place_of, purpose_of
from moepp_megatron.workbench.profiling.trace import RankTrace


@dataclass(frozen=True)
class ClassName:
    """The kind of a call.

    Attributes:
        purpose: One of `PURPOSES`.
        operation: Operation of c10d.
        group: Meaning of the process group.
        phase: forward, recompute or backward of a layer; "" outside of layers.
    """

    purpose: str
    operation: Operation
    group: str
    phase: str


@dataclass
class CallClass:
    """Calls of a kind. Sums are over ranks and steps; microseconds and bytes.

    Attributes:
        name: Their kind.
        link: The link that they use.
        calls: Number of calls, each counted on every rank.
        group_size: Ranks of the group; 0 if groups differ.
        size: Bytes by nccl-tests' convention; calls without a size count 0.
        time_us: Time from start to end, waiting included.
        wait_us: Part of it spent waiting for the last rank to start; 0 for unmatched calls.
        matched: Calls that could be matched on all ranks.
        exposed_us: Time in which no work hid them.
        bus_bytes: Size times bus factor; divided by transfer time it is bus bandwidth.
        peak_gb_s: Mean bandwidth that the calls could reach, weighted by time; None where unknown.
    """

    name: ClassName
    link: Link
    calls: int = 0
    group_size: int = 0
    size: int = 0
    time_us: float = 0.0
    wait_us: float = 0.0
    matched: int = 0
    exposed_us: float = 0.0
    bus_bytes: float = 0.0
    peak_gb_s: float | None = None
    _ideal_us: float = field(default=0.0, repr=False)
    _has_ideal: int = field(default=0, repr=False)

    @property
    def transfer_us(self) -> float:
        """Time without waiting for late ranks."""
        return self.time_us - self.wait_us

    @property
    def algorithm_gb_s(self) -> float | None:
        """Size over transfer time."""
        return _rate(self.size, self.transfer_us)

    @property
    def bus_gb_s(self) -> float | None:
        """Bus bandwidth over transfer time."""
        return _rate(self.bus_bytes, self.transfer_us)

    @property
    def peak_share(self) -> float | None:
        """Bus bandwidth over the link's peak, or over the measured one for such calls."""
        bus = self.bus_gb_s
        return bus / self.peak_gb_s if bus is not None and self.peak_gb_s else None

    def add(self, call: Collective, late: Lateness | None, peak: float | None) -> None:
        """Count a call."""
        self.calls += 1
        self.group_size = call.group_size
        self.time_us += call.duration_us
        if late is not None:
            self.matched += 1
            self.wait_us += late.wait_us
        if call.size is None:
            return
        bus = call.size * bus_factor(call.operation, max(call.group_size, 1))
        self.size += call.size
        self.bus_bytes += bus
        if peak:
            self._ideal_us += bus / peak / 1e3
            self._has_ideal += 1
            if self._has_ideal == self.calls and self._ideal_us > 0:
                self.peak_gb_s = self.bus_bytes / self._ideal_us / 1e3
            else:
                self.peak_gb_s = None


def _rate(size: float, us: float) -> float | None:
    return size / us / 1e3 if size > 0 and us > 0 else None


def call_classes(
    traces: list[RankTrace],
    steps: list[int],
    late: Mapping[CallKey, Lateness],
    links: Links,
    measured: MeasuredPeak | None = None,
) -> list[CallClass]:
    """All calls within the steps by kind, the most exposed first.

    Args:
        traces: Traces of all recorded ranks.
        steps: The steps to count.
        late: Waiting of each call.
        links: The link that each group uses.
        measured: A measured ceiling that replaces the rated peak.
    """
    found: dict[ClassName, CallClass] = {}
    for trace in traces:
        for step in steps:
            if step in trace.steps:
                _add_step(found, trace, step, late, links, measured)
    order = {purpose: place for place, purpose in enumerate(PURPOSES)}
    return sorted(
        found.values(), key=lambda one: (-one.exposed_us, -one.time_us, order[one.name.purpose])
    )


def _add_step(
    found: dict[ClassName, CallClass],
    trace: RankTrace,
    step: int,
    late: Mapping[CallKey, Lateness],
    links: Links,
    measured: MeasuredPeak | None,
) -> None:
    span = trace.steps[step]
    compute = computing(trace, span.interval)
    intervals: dict[ClassName, list[tuple[float, float]]] = defaultdict(list)
    for place, call in enumerate(trace.collectives):
        if not span.start_us <= call.start_us < span.end_us:
            continue
        name = class_name(trace, call)
        if name not in found:
            found[name] = CallClass(name, links.of(call))
        peak = measured(call) if measured is not None else found[name].link.peak_gb_s
        found[name].add(call, late.get((trace.rank, place)), peak)
        intervals[name].append((call.start_us, min(call.end_us, span.end_us)))
    for name, parts in intervals.items():
        found[name].exposed_us += length(subtract(union(parts), compute))


def class_name(trace: RankTrace, call: Collective) -> ClassName:
    """The kind of a call."""
    group = trace.groups.get(call.group)
    meaning = group.meaning if group is not None else "unknown"
    place = place_of(call)
    return ClassName(
        purpose_of(call, meaning), call.operation, meaning, place.phase if place else ""
    )
