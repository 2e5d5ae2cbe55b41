"""Sums over a recording of collectives only, which knows neither steps nor what hides them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moepp_megatron.tools.profiling.collective import Collective, bus_factor
from moepp_megatron.tools.profiling.formats.sources import holds_recording, read_recording
from moepp_megatron.tools.profiling.load import has_kineto
from moepp_megatron.tools.profiling.measures.classes import rate_gb_s
from moepp_megatron.tools.profiling.measures.lateness import CallKey, Lateness, lateness
from moepp_megatron.tools.profiling.merge import find_clocks
from moepp_megatron.tools.profiling.trace import meaning, shifted


@dataclass(frozen=True)
class SummaryRow:
    """Collectives of one kind, mean over the ranks.

    Attributes:
        operation: all_to_all, all_reduce, ...
        group: The process group by meaning.
        calls: Number of calls.
        bytes: Size by nccl-tests' convention; None if that of a call is unknown.
        bus_bytes: Bytes times nccl-tests' bus factor; None where these or the group are unknown.
        time_us: Time from start to end, waiting included, in microseconds.
        wait_us: Part of it spent waiting for late ranks; None where unknown.
    """

    operation: str
    group: str
    calls: float
    bytes: float | None
    bus_bytes: float | None
    time_us: float
    wait_us: float | None

    @property
    def transfer_us(self) -> float:
        """Time without waiting, as far as that is known."""
        return self.time_us - (self.wait_us or 0.0)

    @property
    def algorithm_gb_s(self) -> float | None:
        """Bytes over transfer time, GB/s (1e9 bytes)."""
        return rate_gb_s(self.bytes, self.transfer_us)

    @property
    def bus_gb_s(self) -> float | None:
        """Bus bandwidth over transfer time, GB/s."""
        return rate_gb_s(self.bus_bytes, self.transfer_us)


@dataclass(frozen=True)
class ProfileSummary:
    """A recording: its name, number of ranks, and collectives by kind, the longest first."""

    name: str
    ranks: int
    rows: tuple[SummaryRow, ...] = ()


def records_only_collectives(path: Path) -> bool:
    """True if a path holds only NCCL or PyTorch recordings, none of torch's profiler."""
    return not has_kineto(path) and holds_recording(path)


def summary_of(path: Path) -> ProfileSummary:
    """The summary of such a recording; ProfileError if it cannot be read."""
    by_rank = read_recording(path)
    waits = _waiting(by_rank)
    kinds: dict[tuple[str, str], list[CallKey]] = defaultdict(list)
    for rank, own in by_rank.items():
        for place, call in enumerate(own):
            kinds[call.operation.value, _group_name(call)].append((rank, place))
    rows = [_row(kind, calls, by_rank, waits) for kind, calls in kinds.items()]
    rows.sort(key=lambda row: -row.time_us)
    return ProfileSummary(path.resolve().name, max(1, len(by_rank)), tuple(rows))


def _group_name(call: Collective) -> str:
    """The group's meaning; its size where it has no description: hashes differ from run to run."""
    if call.description:
        return meaning(call.description) or call.description
    return f"unnamed of {call.group_size} ranks" if call.group_size else "unnamed"


def _waiting(by_rank: dict[int, list[Collective]]) -> dict[CallKey, Lateness]:
    """Waiting of each call for the last rank, where the clocks of its ranks can be compared."""
    if not any(call.placed for calls in by_rank.values() for call in calls):
        return {}
    clocks = find_clocks(by_rank)
    # A call without a place in time keeps its place in the list, and has no counterpart.
    return lateness(
        {
            rank: [
                call if call.placed else replace(call, sequence=None)
                for call in shifted(by_rank[rank], clock.offset_us)
            ]
            for rank, clock in clocks.items()
            if clock is not None
        }
    )


def _row(
    kind: tuple[str, str],
    keys: Sequence[CallKey],
    by_rank: dict[int, list[Collective]],
    waits: Mapping[CallKey, Lateness],
) -> SummaryRow:
    ranks = len(by_rank)
    calls = [by_rank[rank][place] for rank, place in keys]
    sizes = [call.size for call in calls if call.size is not None]
    known = len(sizes) == len(calls)
    factors = [bus_factor(call.operation, call.group_size) for call in calls if call.group_size]
    bus = sum(size * factor for size, factor in zip(sizes, factors, strict=False))
    waited = [waits[key].wait_us for key in keys if key in waits]
    return SummaryRow(
        operation=kind[0],
        group=kind[1],
        calls=len(calls) / ranks,
        bytes=sum(sizes) / ranks if known else None,
        bus_bytes=bus / ranks if known and len(factors) == len(calls) else None,
        time_us=sum(call.duration_us for call in calls) / ranks,
        wait_us=sum(waited) / ranks if waited else None,
    )
