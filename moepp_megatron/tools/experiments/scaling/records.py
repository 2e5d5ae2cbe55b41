"""Files of a scaling test: a point's file, and the records of scale.json.

DIR/settings.json      what all points have in common
DIR/points/NAME.json   one finished or failed point, written by its ranks or their launcher
DIR/scale.json         the records of all finished points

Efficiency is tokens per second and rank, relative to the smallest rank count that was measured:

    strong   t_1 n_1 / (t_n n_n): 1 where twice the ranks take half the time for the same batch
    weak     (tokens/s / n)_n / (tokens/s / n)_1: 1 where a rank is not slowed down by company

Both are the same expression, since the batch is constant in strong scaling. Where several layouts
were measured at the smallest count, the fastest one is the reference. MoE++ is compared with MoE++,
vanilla with vanilla.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.tools.experiments.scaling.grid import MODES, Point

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
    """

    step_times_s: list[Annotated[float, Field(gt=0.0)]] = Field(min_length=1)
    ffn_fraction: float
    a2a_bytes: int = Field(ge=0)

    @property
    def step_time_s(self) -> float:
        """Median step time over the repetitions."""
        return statistics.median(self.step_times_s)


class _Conditions(_Written):
    tokens: int = Field(ge=1)
    phi: float
    backend: str
    device: str
    hosts: int = Field(ge=1)
    cores: int = Field(ge=1)


class PointResult(_Conditions):
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


class ScaleRecord(KindResult, _Conditions):
    """One model at one point in one mode, an object of scale.json.

    It has the fields of `KindResult` and of `PointResult` as well, times of the step over the
    repetitions, and tokens of all ranks per second.

    Attributes:
        nproc: Ranks.
        layout: Degrees of parallelism, in the form of `--layout`.
        kind: "moepp" or "vanilla".
        mode: "strong" or "weak".
        efficiency: See the top of the file.
        efficiency_nproc: Rank count that it is relative to.
        speedup: Vanilla's step time over MoE++'s at this point, median of the repetitions' ratios.
        global_batch_size: Sequences per step.
    """

    nproc: int
    layout: str
    kind: str
    mode: str
    efficiency: float
    efficiency_nproc: int
    speedup: float | None
    global_batch_size: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def step_time_s(self) -> float:
        """Median over the repetitions."""
        return super().step_time_s

    @computed_field  # type: ignore[prop-decorator]
    @property
    def step_time_min_s(self) -> float:
        """The fastest repetition."""
        return min(self.step_times_s)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def step_time_max_s(self) -> float:
        """The slowest repetition."""
        return max(self.step_times_s)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tokens_per_s(self) -> float:
        """Tokens of a step over its time, for all ranks."""
        return self.tokens / self.step_time_s


def efficiency(
    tokens_per_s: float, nproc: int, reference_tokens_per_s: float, reference_nproc: int
) -> float:
    """Tokens per second and rank, relative to the reference's."""
    return (tokens_per_s / nproc) / (reference_tokens_per_s / reference_nproc)


def scale_records(results: Mapping[Point, PointResult]) -> list[ScaleRecord]:
    """Records of the finished points, by mode, rank count, layout and kind."""
    records = []
    for mode in MODES:
        done = [(point, result) for point, result in results.items() if mode in point.modes]
        references = _references(done)
        for point, result in done:
            for kind, measured in result.kinds.items():
                rate = result.tokens / measured.step_time_s
                record = ScaleRecord(
                    nproc=point.nproc,
                    layout=point.layout,
                    kind=kind,
                    mode=mode,
                    efficiency=efficiency(rate, point.nproc, *references[kind]),
                    efficiency_nproc=references[kind][1],
                    speedup=result.speedup,
                    global_batch_size=point.global_batch_size,
                    **measured.model_dump(),
                    **result.model_dump(exclude={"kinds"}),
                )
                records.append(record)
    return records


def _references(done: Sequence[tuple[Point, PointResult]]) -> dict[str, tuple[float, int]]:
    """The best rate at the smallest rank count, and that count, by kind."""
    references: dict[str, tuple[float, int]] = {}
    for point, result in done:
        for kind, measured in result.kinds.items():
            rate = result.tokens / measured.step_time_s
            best, nproc = references.get(kind, (0.0, point.nproc))
            if point.nproc < nproc or (point.nproc == nproc and rate > best):
                references[kind] = rate, point.nproc
    return references


def write_records(path: Path, records: Sequence[ScaleRecord]) -> Path:
    """Write the records as a list of objects."""
    content = json.dumps([record.model_dump() for record in records], indent=1)
    write_atomic(path, f"{content}\n".encode())
    return path
