"""A profile in a few numbers, averaged over ranks and steps, for comparing two profiles."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moepp_megatron.config.json_file import parse_json
from moepp_megatron.workbench.profiling.collective import Collective, bus_factor
from moepp_megatron.workbench.profiling.formats.records import SourceError, read_bytes
from moepp_megatron.workbench.profiling.formats.sources import Recording
from moepp_megatron.workbench.profiling.groups import meaning
from moepp_megatron.workbench.profiling.measures.lateness import CallKey, Lateness, lateness
from moepp_megatron.workbench.profiling.merge import Basis, find_clocks


class SummaryRow(BaseModel):
    """Communication of one kind.

    Attributes:
        purpose: What it serves: dispatch, combine, gradient reduce, ...; "" where unknown.
        operation: all_to_all, all_reduce, ...
        group: The process group by meaning.
        phase: forward, recompute or backward of a layer; "" outside of layers.
        calls: Number of calls.
        bytes: Size by nccl-tests' convention; None if that of a call is unknown.
        time_us: Time from start to end, waiting included, in microseconds.
        exposed_us: Part of it that no work hid; None if the source does not record work.
        wait_us: Part of it spent waiting for late ranks; None where unknown.
        bus_bytes: Bytes times nccl-tests' bus factor; None where these or the group are unknown.
    """

    model_config = ConfigDict(frozen=True)

    purpose: str = ""
    operation: str
    group: str
    phase: str = ""
    calls: float = Field(ge=0)
    bytes: float | None = Field(default=None, ge=0)
    time_us: float = Field(ge=0)
    exposed_us: float | None = Field(default=None, ge=0)
    wait_us: float | None = Field(default=None, ge=0)
    bus_bytes: float | None = Field(default=None, ge=0)

    @property
    def kind(self) -> tuple[str, str, str, str]:
        """The fields by which rows of two profiles are matched."""
        return self.purpose, self.operation, self.group, self.phase

    @property
    def transfer_us(self) -> float:
        """Time without waiting, as far as that is known."""
        return self.time_us - (self.wait_us or 0.0)

    @property
    def algorithm_gb_s(self) -> float | None:
        """Bytes over transfer time."""
        return _rate(self.bytes, self.transfer_us)

    @property
    def bus_gb_s(self) -> float | None:
        """Bus bandwidth over transfer time."""
        return _rate(self.bus_bytes, self.transfer_us)


def _rate(size: float | None, us: float) -> float | None:
    return size / us / 1e3 if size and us > 0 else None


class ProfileSummary(BaseModel):
    """A profile.

    Attributes:
        format: Version of this record's format.
        name: Name of the run or recording.
        ranks: Ranks recorded.
        step_times_us: Time of each recorded step on its slowest rank; empty if the source has no
            steps.
        exposed_us: Time of a step in which a rank only communicated, mean over ranks and steps.
            Less than the sum over rows where kinds overlap. None where unknown.
        compute_us: Time of a step in which a rank computed, mean over ranks and steps. None where
            unknown.
        rows: Communication by kind. Means over ranks and steps; without steps, over ranks.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    name: str
    ranks: int = Field(ge=1)
    step_times_us: tuple[float, ...] = ()
    exposed_us: float | None = None
    compute_us: float | None = None
    rows: tuple[SummaryRow, ...] = ()

    @property
    def step_us(self) -> float | None:
        """Mean time of a step; None without steps."""
        if not self.step_times_us:
            return None
        return sum(self.step_times_us) / len(self.step_times_us)


def read_summary(path: Path) -> ProfileSummary:
    """Reads what `moepp profile --json` wrote: a summary, or an object with one as `summary`.

    Raises:
        SourceError: If the file cannot be read, or is something else.
    """
    try:
        content = parse_json(read_bytes(path))
    except ValueError as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"{path}: not JSON ({error}); write it with moepp profile --json"
        ) from error
    if isinstance(content, dict) and "summary" in content:
        content = content["summary"]
    try:
        return ProfileSummary.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise SourceError(
            f"{path}: no summary of a profile: field {where!r}: {first['msg'].lower()}; write it "
            "with moepp profile --json"
        ) from error


def summarise_recording(recording: Recording, name: str) -> ProfileSummary:
    """The summary of a source that knows neither steps nor work: sums a rank over the recording.

    Args:
        recording: A recording of any source.
        name: Its name.
    """
    waits = waiting(recording)
    kinds: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for rank, own in recording.by_rank.items():
        for place, one in enumerate(own):
            kinds[one.operation.value, _group_name(one)].append((rank, place))
    rows = [
        _row(operation, group, calls, recording, waits)
        for (operation, group), calls in kinds.items()
    ]
    rows.sort(key=lambda row: -row.time_us)
    if any(one.synthetic for own in recording.by_rank.values() for one in own):
        name += " (written from documentation, not recorded)"
    return ProfileSummary(name=name, ranks=max(1, len(recording.by_rank)), rows=tuple(rows))


def _group_name(one: Collective) -> str:
    """The group's meaning; its size where it has no description: hashes differ from run to run."""
    if one.description:
        return meaning(one.description) or one.description
    return f"unnamed of {one.group_size} ranks" if one.group_size else "unnamed"


def waiting(recording: Recording) -> dict[CallKey, Lateness]:
    """How long each call waited for the last rank, where the clocks of its ranks can be compared.

    Returns:
        Waiting by rank and place in its list.
    """
    if not any(one.placed for own in recording.by_rank.values() for one in own):
        return {}
    clocks = find_clocks(recording.by_rank)
    moved: dict[int, list[Collective]] = {}
    for rank, own in recording.by_rank.items():
        if clocks[rank].basis is not Basis.UNKNOWN:
            late = clocks[rank].offset_us
            # A call without a place in time keeps its place in the list, and has no counterpart.
            moved[rank] = [
                replace(one, start_us=one.start_us + late, end_us=one.end_us + late)
                if one.placed
                else replace(one, sequence=None)
                for one in own
            ]
    return lateness(moved)


def _row(
    operation: str,
    group: str,
    keys: Sequence[CallKey],
    recording: Recording,
    waits: Mapping[CallKey, Lateness],
) -> SummaryRow:
    ranks = len(recording.by_rank)
    calls = [recording.by_rank[rank][place] for rank, place in keys]
    sizes = [one.size for one in calls if one.size is not None]
    known = len(sizes) == len(calls)
    factors = [bus_factor(one.operation, one.group_size) for one in calls if one.group_size]
    bus = sum(size * factor for size, factor in zip(sizes, factors, strict=False))
    waited = [waits[key].wait_us for key in keys if key in waits]
    return SummaryRow(
        operation=operation,
        group=group,
        calls=len(calls) / ranks,
        bytes=sum(sizes) / ranks if known else None,
        bus_bytes=bus / ranks if known and len(factors) == len(calls) else None,
        time_us=sum(one.duration_us for one in calls) / ranks,
        wait_us=sum(waited) / ranks if waited else None,
    )
