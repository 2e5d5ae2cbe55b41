"""Makes or reads the summary of any recording."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from moepp_megatron.workbench.profiling.analysis import Profile, analyse
from moepp_megatron.workbench.profiling.collective import Collective, bus_factor
from moepp_megatron.workbench.profiling.formats.records import read_document, read_model
from moepp_megatron.workbench.profiling.formats.sources import holds_recording, read_recording
from moepp_megatron.workbench.profiling.load import has_kineto
from moepp_megatron.workbench.profiling.measures.lateness import CallKey, Lateness, lateness
from moepp_megatron.workbench.profiling.merge import find_clocks
from moepp_megatron.workbench.profiling.summary import ProfileSummary, SummaryRow
from moepp_megatron.workbench.profiling.trace import meaning, shifted


def records_only_collectives(path: Path) -> bool:
    """Whether a path holds only recordings of NCCL or PyTorch, none of torch's profiler."""
    return not has_kineto(path) and holds_recording(path)


def summary_of(path: Path) -> ProfileSummary:
    """The summary of any recording, or one that `moepp profile --json` wrote.

    Raises:
        ProfileError: It cannot be read.
    """
    # Two runs of one configuration differ by their folders.
    name = path.resolve().name
    if has_kineto(path):
        return summarise(analyse(path), name)
    if path.suffix == ".json" and path.is_file() and not holds_recording(path):
        remedy = "write it with moepp profile --json"
        content = read_document(path, remedy)
        if isinstance(content, dict) and "summary" in content:
            content = content["summary"]
        return read_model(path, ProfileSummary, content, remedy)
    return summarise_recording(read_recording(path), name)


def summarise(profile: Profile, name: str | None = None) -> ProfileSummary:
    """Means over recorded ranks and analysed steps; `name` replaces the profile's own."""
    count = len(profile.rank_steps)
    rows = [
        SummaryRow(
            purpose=kind.name.purpose,
            operation=kind.name.operation.value,
            group=kind.name.group,
            phase=kind.name.phase,
            calls=kind.calls / count,
            bytes=kind.size / count,
            time_us=kind.time_us / count,
            exposed_us=kind.exposed_us / count,
            wait_us=max(0.0, kind.wait_us) / count if kind.matched else None,
            bus_bytes=kind.bus_bytes / count,
        )
        for kind in profile.classes
    ]
    return ProfileSummary(
        name=name or profile.name,
        ranks=len(profile.ranks),
        step_times_us=tuple(profile.step_times_us),
        exposed_us=fmean(time.exposed_us for time in profile.rank_steps),
        compute_us=fmean(time.compute_us for time in profile.rank_steps),
        rows=tuple(rows),
    )


def summarise_recording(by_rank: dict[int, list[Collective]], name: str) -> ProfileSummary:
    """The summary of a source that knows neither steps nor work: sums a rank over the recording.

    Args:
        by_rank: Collectives of each rank, by its own clock.
        name: Name of the recording.
    """
    waits = _waiting(by_rank)
    kinds: dict[tuple[str, str], list[CallKey]] = defaultdict(list)
    for rank, own in by_rank.items():
        for place, call in enumerate(own):
            kinds[call.operation.value, _group_name(call)].append((rank, place))
    rows = [_row(kind, calls, by_rank, waits) for kind, calls in kinds.items()]
    rows.sort(key=lambda row: -row.time_us)
    return ProfileSummary(name=name, ranks=max(1, len(by_rank)), rows=tuple(rows))


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
