"""Turns an analysed profile into the summary that is used to compare profiles."""

from __future__ import annotations

from moepp_megatron.workbench.profiling.analysis import Profile
from moepp_megatron.workbench.profiling.summary import ProfileSummary, SummaryRow


def summarise(profile: Profile, name: str | None = None) -> ProfileSummary:
    """Means over recorded ranks and analysed steps; `name` replaces the profile's own."""
    times = [time for ranks in profile.times.values() for time in ranks.values()]
    rows = [
        SummaryRow(
            purpose=one.name.purpose,
            operation=one.name.operation.value,
            group=one.name.group,
            phase=one.name.phase,
            calls=one.calls / len(times),
            bytes=one.size / len(times),
            time_us=one.time_us / len(times),
            exposed_us=one.exposed_us / len(times),
            wait_us=one.wait_us / len(times) if one.matched else None,
            bus_bytes=one.bus_bytes / len(times),
        )
        for one in profile.classes
    ]
    return ProfileSummary(
        name=name or profile.name,
        ranks=len(profile.ranks),
        step_times_us=tuple(
            max(time.step_us for time in ranks.values()) for ranks in profile.times.values()
        ),
        exposed_us=sum(time.exposed_us for time in times) / len(times),
        compute_us=sum(time.compute_us for time in times) / len(times),
        rows=tuple(rows),
    )
