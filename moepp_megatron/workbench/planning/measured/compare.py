"""Predicted beside measured, and errors by family."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from moepp_megatron.workbench.planning.coster import GIB
from moepp_megatron.workbench.planning.machine import Machine, machine_of
from moepp_megatron.workbench.planning.measured.rows import Run
from moepp_megatron.workbench.planning.memory import fullest_rank
from moepp_megatron.workbench.planning.step import StepTime, step_time


@dataclass(frozen=True)
class Comparison:
    """A run and the model's estimate of it.

    Attributes:
        run: The run.
        step: The model's step.
        tokens_per_s_per_gpu: The model's speed.
        memory_gib: The model's peak of the allocator on the fullest rank.
    """

    run: Run
    step: StepTime
    tokens_per_s_per_gpu: float
    memory_gib: float

    @property
    def error(self) -> float | None:
        """Predicted over measured speed, less 1: above 0 the model is too fast."""
        measured = self.run.tokens_per_s_per_gpu
        return None if measured is None else self.tokens_per_s_per_gpu / measured - 1.0

    def record(self) -> dict[str, object]:
        """The entry of `--json`."""
        return {
            "name": self.run.row.name,
            "family": self.run.row.family,
            "predicted": {
                "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
                "step_time_s": self.step.total,
                "peak_memory_gib": self.memory_gib,
            },
            "measured": self.run.row.measured.model_dump(exclude_none=True),
            "error": self.error,
        }


def compare(run: Run, machine: Machine | None = None) -> Comparison:
    """The model's answer for a run.

    Args:
        run: The run.
        machine: Its machine, where it is not its hardware file's.

    Raises:
        ConfigError: If the hardware file lacks a number.
    """
    machine = machine or machine_of(run.hardware)
    step = step_time(run.load, run.grid, machine, run.routing, run.stages)
    # Over all layers a rank receives about as much as any other.
    held = fullest_rank(run.load, run.grid, run.stages).total
    tokens = run.load.batch * run.load.seq
    return Comparison(run, step, tokens / step.total / run.row.gpus, held / GIB)


@dataclass(frozen=True)
class FamilyErrors:
    """Errors of a family's rows in scope.

    Attributes:
        rows: Rows that were measured.
        median: Median of the absolute errors.
        largest: The largest of them.
        fast: Rows that the model is too fast for.
        tenth: A tenth of runs take less than this many times the estimate.
        nine_tenths: A tenth take more than this many times the estimate.
    """

    rows: int
    median: float
    largest: float
    fast: int
    tenth: float
    nine_tenths: float


def family_errors(
    comparisons: Iterable[Comparison], scopes: Sequence[str] = ("in",)
) -> dict[str, FamilyErrors]:
    """Errors by family, in the order in which families appear."""
    found: dict[str, list[float]] = defaultdict(list)
    for one in comparisons:
        if one.error is not None and one.run.row.scope in scopes:
            found[one.run.row.family].append(one.error)
    return {family: _summary(errors) for family, errors in found.items()}


def _summary(errors: Sequence[float]) -> FamilyErrors:
    sizes = [abs(error) for error in errors]
    # Measured time over estimated time is estimated speed over measured speed.
    ratios = sorted(1.0 + error for error in errors)
    return FamilyErrors(
        rows=len(errors),
        median=median(sizes),
        largest=max(sizes),
        fast=sum(error > 0 for error in errors),
        tenth=quantile(ratios, 0.1),
        nine_tenths=quantile(ratios, 0.9),
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """A quantile of an ascending sequence, interpolated."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class RatioError:
    """The ratio of two runs' speeds.

    Attributes:
        name: Name of the pair.
        measured: Speed of the slower over that of the faster run, as measured.
        predicted: The same as the model has it.
    """

    name: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative error of the ratio."""
        return self.predicted / self.measured - 1.0


def pair_errors(comparisons: Iterable[Comparison]) -> list[RatioError]:
    """Ratios of the runs that share a name in `pair`; the faster over the slower, as measured."""
    pairs: Mapping[str, list[Comparison]] = defaultdict(list)
    for one in comparisons:
        for name in one.run.row.pair:
            pairs[name].append(one)
    found = []
    for name, members in pairs.items():
        speeds = [member.run.tokens_per_s_per_gpu for member in members]
        if len(members) != 2 or None in speeds:
            continue
        slow, fast = sorted(members, key=lambda one: one.run.tokens_per_s_per_gpu or 0.0)
        found.append(
            RatioError(
                name,
                (fast.run.tokens_per_s_per_gpu or 0.0) / (slow.run.tokens_per_s_per_gpu or 1.0),
                fast.tokens_per_s_per_gpu / slow.tokens_per_s_per_gpu,
            )
        )
    return found
