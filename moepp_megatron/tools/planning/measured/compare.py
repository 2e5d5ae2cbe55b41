"""Predicted and measured, errors by family, and the published runs."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median

import numpy as np

from moepp_megatron.config import Config
from moepp_megatron.tools.planning.machine import Machine
from moepp_megatron.tools.planning.measured.rows import Run, read_runs
from moepp_megatron.tools.planning.memory import GIB, fullest_rank
from moepp_megatron.tools.planning.step import StepTime, step_time


@dataclass(frozen=True)
class Comparison:
    """A run and the model's estimate of it."""

    run: Run
    step: StepTime  # the model's step
    tokens_per_s_per_gpu: float  # the model's speed
    memory_gib: float  # the model's peak of the allocator on the fullest rank

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
    """The model's answer for a run, on its hardware file's machine or this one."""
    machine = machine or Machine.of(run.hardware)
    step = step_time(run.load, run.grid, machine, run.stages)
    # Over all layers a rank receives about as much as any other.
    held = fullest_rank(run.load, run.grid, run.stages).total
    tokens = run.load.batch * run.load.seq
    return Comparison(run, step, tokens / step.total / run.row.gpus, held / GIB)


@dataclass(frozen=True)
class FamilyErrors:
    """Errors of a family's rows in scope."""

    rows: int  # rows that were measured
    median: float  # median of the absolute errors
    largest: float
    fast: int  # rows that the model is too fast for
    tenth: float  # a tenth of runs take less than this many times the estimate
    nine_tenths: float  # a tenth take more than this many times the estimate


def family_errors(
    comparisons: Iterable[Comparison], scopes: Sequence[str] = ("in",)
) -> dict[str, FamilyErrors]:
    """Errors by family, in the order in which families appear."""
    by_family: dict[str, list[float]] = defaultdict(list)
    for comparison in comparisons:
        if comparison.error is not None and comparison.run.row.scope in scopes:
            by_family[comparison.run.row.family].append(comparison.error)
    found = {}
    for family, errors in by_family.items():
        sizes = [abs(error) for error in errors]
        fast = sum(error > 0 for error in errors)
        # Measured time over estimated time is estimated speed over measured speed.
        tenths = np.quantile([1.0 + error for error in errors], (0.1, 0.9)).tolist()
        found[family] = FamilyErrors(len(errors), median(sizes), max(sizes), fast, *tenths)
    return found


@dataclass(frozen=True)
class _RatioError:
    """The ratio of two runs' speeds."""

    name: str  # name of the pair
    measured: float  # speed of the slower over that of the faster run, as measured
    predicted: float  # the same as the model has it

    @property
    def error(self) -> float:
        """Relative error of the ratio."""
        return self.predicted / self.measured - 1.0


def pair_errors(comparisons: Iterable[Comparison]) -> list[_RatioError]:
    """Ratios of the runs that share a name in `pair`; the faster over the slower, as measured."""
    pairs: Mapping[str, list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        for name in comparison.run.row.pair:
            pairs[name].append(comparison)
    ratios = []
    for name, members in pairs.items():
        speeds = sorted(
            (measured, each.tokens_per_s_per_gpu)
            for each in members
            if (measured := each.run.tokens_per_s_per_gpu) is not None
        )
        if len(members) == len(speeds) == 2:
            slow, fast = speeds
            ratios.append(_RatioError(name, fast[0] / slow[0], fast[1] / slow[1]))
    return ratios


# Beside the package in a source tree, as `configs/hardware` is.
FOLDER = Path(__file__).resolve().parents[4] / "configs" / "measured"
SET_NUMBERS, HELD_OUT = FOLDER / "set_numbers.json", FOLDER / "held_out.json"
# GPUs of which there are runs of MoE models; an H200 is an H100's chip with more memory.
_CARDS = ("h100", "h200", "b200")
# Fewer rows do not determine a tenth.
_LEAST_ROWS = 4


@dataclass(frozen=True)
class Range:
    """Range of run times, in units of their estimate."""

    family: str  # published runs that it comes from
    errors: FamilyErrors  # their errors
    is_own: bool  # whether they are of the same kind of GPU as what is estimated

    def of(self, time: float) -> tuple[float, float]:
        """Return the 10th and 90th percentile of such runs for this estimate."""
        return time * self.errors.tenth, time * self.errors.nine_tenths


def error_range(config: Config, machine: Machine) -> Range | None:
    """Errors of the held-out runs nearest to a plan, by format or on B200; None without a file."""
    by_format = f"{'FP8' if config.precision.fp8 else 'bf16'} MoE"
    card = machine.hardware.name.lower()
    family = "B200" if card.startswith("b200") else by_format
    errors = _errors_by_family().get(family)
    if errors is None or errors.rows < _LEAST_ROWS:
        return None
    return Range(family, errors, card.startswith(_CARDS))


@lru_cache(maxsize=1)
def _errors_by_family() -> dict[str, FamilyErrors]:
    """Errors of the published runs that set no number."""
    runs = read_runs(HELD_OUT) if HELD_OUT.is_file() else ()
    return family_errors(map(compare, runs), scopes=("in", "near"))
