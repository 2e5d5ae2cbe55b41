"""A profile in a few numbers, of one rank's step on average: what two profiles are compared by."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moepp_megatron.profiling.collective import Collective
from moepp_megatron.profiling.records import SourceError, read_bytes
from moepp_megatron.profiling.sources import Recording


class Row(BaseModel):
    """Communication of one kind.

    Attributes:
        purpose: What it serves: dispatch, combine, gradient reduce, ...; "" where unknown.
        operation: all_to_all, all_reduce, ...
        group: The process group by meaning.
        phase: forward, recompute or backward of a layer; "" outside of layers.
        calls: Number.
        bytes: By nccl-tests' convention; None where a call's are unknown.
        time_us: From start to end, waiting included, in microseconds.
        exposed_us: Of it, what no work hid; None where the source does not know of work.
        wait_us: Of it, waiting for late ranks; None where unknown.
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

    @property
    def kind(self) -> tuple[str, str, str, str]:
        """What makes rows of two profiles the same."""
        return self.purpose, self.operation, self.group, self.phase

    @property
    def transfer_us(self) -> float:
        """Time without waiting, as far as that is known."""
        return self.time_us - (self.wait_us or 0.0)


class Summary(BaseModel):
    """A profile.

    Attributes:
        format: Of this record.
        name: Of the run or recording.
        ranks: Ranks recorded.
        step_times_us: Of each recorded step on its slowest rank; empty where the source knows no
            steps.
        exposed_us: Time of a step in which a rank only communicated, mean over ranks and steps.
            Less than the sum over rows where kinds overlap. None where unknown.
        rows: Communication by kind. Means over ranks and steps; without steps, over ranks.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    name: str
    ranks: int = Field(ge=1)
    step_times_us: tuple[float, ...] = ()
    exposed_us: float | None = None
    rows: tuple[Row, ...] = ()

    @property
    def step_us(self) -> float | None:
        """Mean time of a step; None without steps."""
        if not self.step_times_us:
            return None
        return sum(self.step_times_us) / len(self.step_times_us)


def read_summary(path: Path) -> Summary:
    """Reads what `moepp profile --json` wrote: a summary, or an object with one as `summary`.

    Raises:
        SourceError: The file cannot be read, or is something else.
    """
    try:
        content = json.loads(read_bytes(path))
    except ValueError as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"{path}: not JSON ({error}); write it with moepp profile --json"
        ) from error
    if isinstance(content, dict) and "summary" in content:
        content = content["summary"]
    try:
        return Summary.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise SourceError(
            f"{path}: no summary of a profile: field {where!r}: {first['msg'].lower()}; write it "
            "with moepp profile --json"
        ) from error


def summarise_recording(recording: Recording, name: str) -> Summary:
    """The summary of a source that knows neither steps nor work: sums a rank over the recording.

    Args:
        recording: Any source's.
        name: How to call it.
    """
    kinds: dict[tuple[str, str], list[Collective]] = defaultdict(list)
    for own in recording.by_rank.values():
        for one in own:
            kinds[one.operation.value, one.description or one.group].append(one)
    ranks = max(1, len(recording.by_rank))
    rows = [
        _row(operation, group, calls, ranks) for (operation, group), calls in sorted(kinds.items())
    ]
    rows.sort(key=lambda row: -row.time_us)
    return Summary(name=name, ranks=ranks, rows=tuple(rows))


def _row(operation: str, group: str, calls: list[Collective], ranks: int) -> Row:
    sizes = [one.size for one in calls if one.size is not None]
    return Row(
        operation=operation,
        group=group,
        calls=len(calls) / ranks,
        bytes=sum(sizes) / ranks if len(sizes) == len(calls) else None,
        time_us=sum(one.duration_us for one in calls) / ranks,
    )
