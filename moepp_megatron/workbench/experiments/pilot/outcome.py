"""Computes the outcome of a run from its records, and an arm's means over seeds."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp_megatron.file_names import ALERTS_FILE
from moepp_megatron.observe.alerts import read_alerts
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.workbench.experiments.pilot.result import Arm, ArmOutcome, Curve, Interval
from moepp_megatron.workbench.experiments.pilot.statistics import Estimate, mean_interval

# A step that begins the last quarter is still in the third.
_LATE = 0.75
# First steps allocate, compile and fill caches.
_FEWEST_WARMUP = 2
_WARMUP_SHARE = 0.1
_POINTS_OF_CURVE = 200
_MEANS = ("valid_loss", "step_time_s", "tokens_per_s", "ffn_share", "a2a_bytes")


@dataclass(frozen=True)
class RunOutcome:
    """The outcome of one run; names as in `ArmOutcome`, and whether it used GPUs."""

    valid_loss: float
    step_time_s: float
    tokens_per_s: float
    ffn_share: float
    a2a_bytes: float
    energy_per_token_j: float | None
    alerts: Mapping[str, int]
    curve: Curve
    on_gpu: bool = False


def run_outcome(records: Sequence[StepMetrics], folder: Path) -> RunOutcome:
    """The outcome of a finished run.

    Args:
        records: All records, one per step; the last one has a finite validation loss.
        folder: Folder of the run, with its alerts.
    """
    last = records[-1]
    assert last.valid_loss is not None, "finished runs end with a validation"
    late = [record for record in records if record.step > _LATE * last.step]
    step_time = statistics.median(record.step_time_s for record in timed_steps(records))
    return RunOutcome(
        valid_loss=last.valid_loss,
        step_time_s=step_time,
        tokens_per_s=last.tokens / last.step / step_time,
        ffn_share=statistics.fmean(record.ffn_fraction for record in late),
        a2a_bytes=statistics.fmean(record.a2a_bytes for record in late),
        energy_per_token_j=_energy_per_token(records),
        alerts=Counter(
            alert.rule for alert in read_alerts(folder / ALERTS_FILE) if alert.severity != "info"
        ),
        curve=_curve(records),
        on_gpu=last.gpu_hours is not None,
    )


def timed_steps(records: Sequence[StepMetrics]) -> list[StepMetrics]:
    """Steps whose time is that of training only.

    The first steps and those that measured router health or were evaluated are left out. If none
    is left in a short run, all steps after the first ones are taken.
    """
    warm = _warm(records)
    plain = [r for r in warm if r.router_health is None and r.valid_loss is None]
    return plain or warm


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
    energies = [run.energy_per_token_j for run in mine if run.energy_per_token_j is not None]
    return ArmOutcome(
        arm=arm,
        seeds=seeds,
        loss_difference=difference,
        time_ratio=log_time_ratio(runs, baseline).factor() if has_ratio else None,
        energy_per_token_j=mean_interval(energies) if len(energies) == len(mine) else None,
        alerts=dict(sum((Counter(run.alerts) for run in mine), Counter())),
        curve=_mean_curve([run.curve for run in mine]),
        **means,
    )


def log_time_ratio(runs: Mapping[int, RunOutcome], baseline: Mapping[int, RunOutcome]) -> Estimate:
    """Logarithm of the step time over that of the baseline's run with the same seed."""
    return Estimate.of(
        [math.log(run.step_time_s / baseline[seed].step_time_s) for seed, run in runs.items()]
    )


def _warm(records: Sequence[StepMetrics]) -> list[StepMetrics]:
    cold = max(_FEWEST_WARMUP, int(_WARMUP_SHARE * records[-1].step))
    return [record for record in records if record.step > cold] or list(records)


def _energy_per_token(records: Sequence[StepMetrics]) -> float | None:
    """Energy per token over warm steps, except evaluated ones, which include validation."""
    steps = [record for record in _warm(records) if record.valid_loss is None]
    joules = [record.energy_j for record in steps if record.energy_j is not None]
    if not joules or len(joules) < len(steps):
        return None
    per_step = records[-1].tokens / records[-1].step
    return sum(joules) / (len(joules) * per_step)


def _curve(records: Sequence[StepMetrics]) -> Curve:
    """Training loss in groups of consecutive steps, few enough to draw."""
    size = math.ceil(len(records) / _POINTS_OF_CURVE)
    groups = [records[i : i + size] for i in range(0, len(records), size)]
    means = [
        (group[-1].tokens, [r.loss for r in group if math.isfinite(r.loss)]) for group in groups
    ]
    kept = [(tokens, statistics.fmean(losses)) for tokens, losses in means if losses]
    return Curve(tokens=[tokens for tokens, _ in kept], loss=[loss for _, loss in kept])


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean curve over seeds, at points that all seeds have."""
    by_seed = [dict(zip(curve.tokens, curve.loss, strict=True)) for curve in curves]
    shared = [tokens for tokens in by_seed[0] if all(tokens in curve for curve in by_seed)]
    loss = [statistics.fmean(curve[tokens] for curve in by_seed) for tokens in shared]
    return Curve(tokens=shared, loss=loss)
