"""Sums over a recording of collectives only, which knows neither steps nor what hides them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from moepp_megatron.tools.profiling.collective import Collective, bus_factor
from moepp_megatron.tools.profiling.formats.flight_recorder import (
    holds_flight_records,
    read_flight_records,
)
from moepp_megatron.tools.profiling.load import has_kineto
from moepp_megatron.tools.profiling.measures.classes import rate_gb_s
from moepp_megatron.tools.profiling.trace import meaning


@dataclass(frozen=True)
class _SummaryRow:
    """Collectives of one kind, mean over the ranks.

    Attributes:
        operation: all_to_all, all_reduce, ...
        group: The process group by meaning.
        calls: Number of calls.
        bytes: Size by nccl-tests' convention; None if that of a call is unknown.
        bus_bytes: Bytes times nccl-tests' bus factor; None where these or the group are unknown.
        time_us: Time from start to end, waiting for late ranks included, in microseconds.
    """

    operation: str
    group: str
    calls: float
    bytes: float | None
    bus_bytes: float | None
    time_us: float

    @property
    def algorithm_gb_s(self) -> float | None:
        """Bytes over time, GB/s (1e9 bytes)."""
        return rate_gb_s(self.bytes, self.time_us)

    @property
    def bus_gb_s(self) -> float | None:
        """Bus bandwidth over time, GB/s."""
        return rate_gb_s(self.bus_bytes, self.time_us)


@dataclass(frozen=True)
class ProfileSummary:
    """A recording: its name, number of ranks, and collectives by kind, the longest first."""

    name: str
    ranks: int
    rows: tuple[_SummaryRow, ...] = ()


def records_only_collectives(path: Path) -> bool:
    """True if a path holds only dumps of the flight recorder, no traces of torch's profiler."""
    return not has_kineto(path) and holds_flight_records(path)


def summary_of(path: Path) -> ProfileSummary:
    """The summary of such a recording; ProfileError if it cannot be read."""
    by_rank = read_flight_records(path)
    kinds: dict[tuple[str, str], list[Collective]] = defaultdict(list)
    for call in (call for own in by_rank.values() for call in own):
        kinds[call.operation.value, _group_name(call)].append(call)
    rows = [_row(*kind, calls, len(by_rank)) for kind, calls in kinds.items()]
    rows.sort(key=lambda row: -row.time_us)
    return ProfileSummary(path.resolve().name, max(1, len(by_rank)), tuple(rows))


def _group_name(call: Collective) -> str:
    """The group's meaning; its size where it has no description: hashes differ from run to run."""
    if call.description:
        return meaning(call.description) or call.description
    return f"unnamed of {call.group_size} ranks" if call.group_size else "unnamed"


def _row(operation: str, group: str, calls: list[Collective], ranks: int) -> _SummaryRow:
    sizes = [call.size for call in calls if call.size is not None]
    known = len(sizes) == len(calls)
    factors = [bus_factor(call.operation, call.group_size) for call in calls if call.group_size]
    bus = sum(size * factor for size, factor in zip(sizes, factors, strict=False))
    return _SummaryRow(
        operation=operation,
        group=group,
        calls=len(calls) / ranks,
        bytes=sum(sizes) / ranks if known else None,
        bus_bytes=bus / ranks if known and len(factors) == len(calls) else None,
        time_us=sum(call.duration_us for call in calls) / ranks,
    )
