"""Computes the outcome of a run from its records, and an arm's means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.tools.experiments.pilot.result import Arm, ArmOutcome, Curve, Interval
from moepp_megatron.tools.experiments.pilot.statistics import Estimate, mean_interval
from moepp_megatron.tools.report.series import Numbers

# A step that begins the last quarter is still in the third.
_LATE = 0.75
# First steps allocate, compile and fill caches.
_FEWEST_WARMUP = 2
_WARMUP_SHARE = 0.1
_POINTS_OF_CURVE = 200
_MEANS = ("valid_loss", "step_time_s", "ffn_share")


@dataclass(frozen=True)
class RunOutcome:
    """The outcome of one run; names as in `ArmOutcome`, and whether it used GPUs."""

    valid_loss: float
    step_time_s: float
    ffn_share: float
    curve: Curve
    on_gpu: bool = False


def run_outcome(records: Iterable[StepMetrics]) -> RunOutcome:
    """The outcome of a finished run, whose last record has a finite validation loss."""
    numbers = Numbers(records=records)
    steps, tokens = numbers.values("step"), numbers.values("tokens")
    late = steps > _LATE * steps[-1]
    return RunOutcome(
        valid_loss=float(numbers.values("valid_loss")[-1]),
        step_time_s=statistics.median(numbers.values("step_time_s")[timed_steps(numbers)].tolist()),
        ffn_share=statistics.fmean(numbers.values("ffn_fraction")[late].tolist()),
        curve=_curve(tokens, numbers.values("loss")),
        on_gpu=not np.isnan(numbers.values("gpu_hours")[-1]),
    )


def timed_steps(numbers: Numbers) -> np.ndarray:
    """[n] bool: steps without evaluation or router health.

    The first steps and those that measured router health or were evaluated are left out. If none
    is left in a short run, all steps after the first ones are taken.
    """
    warm = _warm(numbers)
    plain = warm & np.isnan(numbers.values("router_health")) & ~_is_evaluated(numbers)
    return plain if plain.any() else warm


def arm_outcome(
    arm: Arm,
    runs: Mapping[int, RunOutcome],
    baseline: Mapping[int, RunOutcome],
    difference: Interval | None,
) -> ArmOutcome:
    """The outcome of an arm, over the seeds of `runs`.

    Args:
        arm: The arm.
        runs: Runs by seed.
        baseline: Vanilla's runs, with at least the same seeds; `runs` itself for vanilla.
        difference: Its loss minus vanilla's, nats; None for vanilla.
    """
    seeds = sorted(runs)
    mine = [runs[seed] for seed in seeds]
    means: dict[str, Any] = {
        name: mean_interval([getattr(run, name) for run in mine]) for name in _MEANS
    }
    # Vanilla has no ratio to itself, whatever its steps.
    has_ratio = arm.kind not in ("vanilla", "short")
    return ArmOutcome(
        arm=arm,
        seeds=seeds,
        loss_difference=difference,
        time_ratio=log_time_ratio(runs, baseline).factor() if has_ratio else None,
        curve=_mean_curve([run.curve for run in mine]),
        **means,
    )


def log_time_ratio(runs: Mapping[int, RunOutcome], baseline: Mapping[int, RunOutcome]) -> Estimate:
    """Logarithm of the step time over that of the baseline's run with the same seed."""
    return Estimate.of(
        [math.log(run.step_time_s / baseline[seed].step_time_s) for seed, run in runs.items()]
    )


def _warm(numbers: Numbers) -> np.ndarray:
    steps = numbers.values("step")
    warm = steps > max(_FEWEST_WARMUP, int(_WARMUP_SHARE * steps[-1]))
    return warm if warm.any() else np.full(len(steps), True)


def _is_evaluated(numbers: Numbers) -> np.ndarray:
    return ~np.isnan(numbers.values("valid_loss"))


def _curve(tokens: np.ndarray, losses: np.ndarray) -> Curve:
    """Training loss in groups of consecutive steps, few enough to draw."""
    size = math.ceil(len(losses) / _POINTS_OF_CURVE)
    curve = Curve(tokens=[], loss=[])
    for start in range(0, len(losses), size):
        group = losses[start : start + size]
        known = group[np.isfinite(group)]
        if len(known):
            curve.tokens.append(int(tokens[start : start + size][-1]))
            curve.loss.append(statistics.fmean(known.tolist()))
    return curve


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean curve over seeds, at points that all seeds have."""
    by_seed = [dict(zip(curve.tokens, curve.loss, strict=True)) for curve in curves]
    shared = [tokens for tokens in by_seed[0] if all(tokens in curve for curve in by_seed)]
    loss = [statistics.fmean(curve[tokens] for curve in by_seed) for tokens in shared]
    return Curve(tokens=shared, loss=loss)
