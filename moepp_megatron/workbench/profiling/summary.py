"""A profile in a few numbers, averaged over ranks and steps, for comparing two profiles."""

from __future__ import annotations

from statistics import fmean
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from moepp_megatron.workbench.profiling.measures.classes import rate_gb_s

# The largest leaves room for sums and products.
_Number = Annotated[float, Field(ge=0, le=1e30)]


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

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    purpose: str = ""
    operation: str
    group: str
    phase: str = ""
    calls: _Number
    bytes: _Number | None = None
    time_us: _Number
    exposed_us: _Number | None = None
    wait_us: _Number | None = None
    bus_bytes: _Number | None = None

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
        """Bytes over transfer time, GB/s (1e9 bytes)."""
        return rate_gb_s(self.bytes, self.transfer_us)

    @property
    def bus_gb_s(self) -> float | None:
        """Bus bandwidth over transfer time, GB/s."""
        return rate_gb_s(self.bus_bytes, self.transfer_us)


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

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    format: Literal[1] = 1
    name: str
    ranks: int = Field(ge=1, le=10**9)
    step_times_us: tuple[_Number, ...] = ()
    exposed_us: _Number | None = None
    compute_us: _Number | None = None
    rows: tuple[SummaryRow, ...] = ()

    @property
    def step_us(self) -> float | None:
        """Mean time of a step; None without steps."""
        return fmean(self.step_times_us) if self.step_times_us else None
