"""The file that the job of one point of a scaling test writes: DIR/points/NAME.json."""

from __future__ import annotations

import statistics
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(ge=0.0)]


class _Written(BaseModel):
    """An object of a file; unknown fields and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class KindResult(_Written):
    """One model at one point.

    Attributes:
        step_times_s: Seconds per step of each repetition, on its slowest rank.
        ffn_fraction: FFN experts' share of all selections, counted.
        a2a_bytes: Hidden vectors' bytes that leave their ranks in a step's forward passes, all
            ranks: the field of the same name in metrics.jsonl.
        a2a_sent_bytes: Hidden vectors' bytes that all ranks hand to all-to-alls for other ranks in
            a step, forward and backward, counted at the call; None where the dispatcher uses none.
        a2a_time_s: Seconds of a step in which a rank waits in all-to-alls: mean over ranks,
            median over separate steps (`bench.all_to_all_clock`). None as above.
        a2a_time_min_s: The same for the rank that waits least.
        a2a_time_max_s: The same for the rank that waits most.
        a2a_share: `a2a_time_s` as a share of those separate steps' own time.
    """

    step_times_s: list[Annotated[float, Field(gt=0.0)]] = Field(min_length=1)
    ffn_fraction: float
    a2a_bytes: int = Field(ge=0)
    a2a_sent_bytes: int | None
    a2a_time_s: Seconds | None
    a2a_time_min_s: Seconds | None
    a2a_time_max_s: Seconds | None
    a2a_share: Seconds | None

    @property
    def step_time_s(self) -> float:
        """Median step time over the repetitions."""
        return statistics.median(self.step_times_s)


class PointResult(_Written):
    """Both models at one point, measured in turn by the same ranks.

    Attributes:
        tokens: Tokens of a step, over all ranks.
        phi: FFN experts' share at perfect balance, at which MoE++'s routing is held.
        backend: "gloo" or "nccl".
        device: Name of the GPU, or "cpu".
        hosts: Machines.
        cores: Processor cores that this job may use on the first machine.
        kinds: Results by "moepp" and "vanilla".
    """

    tokens: int = Field(ge=1)
    phi: float
    backend: str
    device: str
    hosts: int = Field(ge=1)
    cores: int = Field(ge=1)
    kinds: dict[str, KindResult] = Field(min_length=1)

    @property
    def speedup(self) -> float | None:
        """Median over repetitions of vanilla's over MoE++'s step time; None where one is absent."""
        if len(self.kinds) < 2:
            return None
        pairs = zip(
            self.kinds["vanilla"].step_times_s, self.kinds["moepp"].step_times_s, strict=True
        )
        return statistics.median(vanilla / moepp for vanilla, moepp in pairs)


class PointFile(_Written):
    """The content of `DIR/points/NAME.json`.

    Attributes:
        name: Name of the point.
        status: Whether it was measured.
        result: The measurement; None if it failed.
        error: Why it failed, on one line; "" if it did not.
    """

    name: str
    status: Literal["done", "failed"]
    result: PointResult | None = None
    error: str = ""
