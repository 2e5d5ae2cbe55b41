"""The records of scale.json: what was measured at each point, and how it scales.

Efficiency is tokens per second and rank, relative to the smallest rank count that was measured:

    strong   t_1 n_1 / (t_n n_n): 1 where twice the ranks take half the time for the same batch
    weak     (tokens/s / n)_n / (tokens/s / n)_1: 1 where a rank is not slowed down by company

Both are the same expression, since the batch is constant in strong scaling. Where several layouts
were measured at the smallest count, the fastest one is the reference. MoE++ is compared with MoE++,
vanilla with vanilla.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moepp_megatron.workbench.experiments.scaling.grid import MODES, Point
from moepp_megatron.workbench.experiments.scaling.point import KindResult, PointResult
from moepp_megatron.workbench.experiments.scaling.runs import ScalingRuns


@dataclass(frozen=True)
class ScaleRecord:
    """One model at one point in one mode; an object of scale.json.

    Attributes:
        nproc: Ranks.
        layout: Degrees of parallelism, in the form of `--layout`.
        kind: "moepp" or "vanilla".
        mode: "strong" or "weak".
        step_time_s: Median step time over repetitions.
        tokens_per_s: Tokens of a step over it, for all ranks.
        efficiency: See the top of the file.
        efficiency_nproc: Rank count that it is relative to.
        a2a_bytes: See `point.KindResult`, as the fields below.
        a2a_time_s: Seconds.
        a2a_time_min_s: Seconds.
        a2a_time_max_s: Seconds.
        a2a_share: Share of the step time.
        a2a_sent_bytes: Bytes.
        step_time_min_s: The fastest repetition.
        step_time_max_s: The slowest.
        step_times_s: Step times of all repetitions.
        speedup: Vanilla's step time over MoE++'s at this point, median of the repetitions' ratios.
        ffn_fraction: FFN experts' share of all selections.
        phi: That share at perfect balance, for MoE++.
        global_batch_size: Sequences per step.
        tokens: Tokens of a step, over all ranks.
        backend: "gloo" or "nccl".
        device: Name of the GPU, or "cpu".
        hosts: Machines.
        cores: Processor cores of the first one.
    """

    nproc: int
    layout: str
    kind: str
    mode: str
    step_time_s: float
    tokens_per_s: float
    efficiency: float
    efficiency_nproc: int
    a2a_bytes: int
    a2a_time_s: float | None
    a2a_time_min_s: float | None
    a2a_time_max_s: float | None
    a2a_share: float | None
    a2a_sent_bytes: int | None
    step_time_min_s: float
    step_time_max_s: float
    step_times_s: list[float]
    speedup: float | None
    ffn_fraction: float
    phi: float
    global_batch_size: int
    tokens: int
    backend: str
    device: str
    hosts: int
    cores: int


def efficiency(
    tokens_per_s: float, nproc: int, reference_tokens_per_s: float, reference_nproc: int
) -> float:
    """Tokens per second and rank, relative to the reference's."""
    return (tokens_per_s / nproc) / (reference_tokens_per_s / reference_nproc)


def scale_records(folder: ScalingRuns, points: Sequence[Point]) -> list[ScaleRecord]:
    """Records of the finished ones of `points`, by mode, rank count, layout and kind."""
    done = [
        (point, file.result)
        for point in points
        if (file := folder.read(point)) is not None and file.result is not None
    ]
    records = []
    for mode in MODES:
        of_mode = [(point, result) for point, result in done if mode in point.modes]
        references = _references(of_mode)
        for point, result in of_mode:
            for kind, measured in result.kinds.items():
                rate, nproc = references[kind]
                records.append(_record(point, result, kind, measured, mode, rate, nproc))
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


def _record(
    point: Point,
    result: PointResult,
    kind: str,
    measured: KindResult,
    mode: str,
    reference_rate: float,
    reference_nproc: int,
) -> ScaleRecord:
    rate = result.tokens / measured.step_time_s
    everything: dict[str, Any] = {
        "nproc": point.nproc,
        "layout": point.layout,
        "kind": kind,
        "mode": mode,
        "step_time_s": measured.step_time_s,
        "tokens_per_s": rate,
        "efficiency": efficiency(rate, point.nproc, reference_rate, reference_nproc),
        "efficiency_nproc": reference_nproc,
        "step_time_min_s": min(measured.step_times_s),
        "step_time_max_s": max(measured.step_times_s),
        "speedup": result.speedup,
        "global_batch_size": point.global_batch_size,
        **measured.model_dump(),
        **result.model_dump(exclude={"kinds"}),
    }
    return ScaleRecord(**everything)
