"""The fair baseline: a vanilla model that is as fast as a MoE++ arm, with fewer experts per token.

Whoever can live with the loss of a faster model could also lower vanilla's top-k.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Literal

from moepp_megatron.workbench.experiments.pilot.outcome import RunOutcome
from moepp_megatron.workbench.experiments.pilot.result import EqualSpeed
from moepp_megatron.workbench.experiments.pilot.statistics import mean_interval

Runs = Mapping[int, RunOutcome]
Standing = Literal["better", "worse", "open"]


def equal_speed(name: str, runs: Runs, vanilla: Mapping[str, Runs]) -> EqualSpeed:
    """Compare a MoE++ arm with the vanilla arms around its speed.

    In each seed the baseline's loss is interpolated by step time between the two vanilla arms that
    enclose the MoE++ arm's mean step time. Where a seed's own time is outside of both, the nearer
    one counts: nothing is extrapolated.

    Args:
        name: Name of the MoE++ arm.
        runs: Its runs by seed.
        vanilla: Runs of vanilla and of the baselines, by name, with the same seeds.
    """
    slower, faster = _around(_mean_time(runs), {n: _mean_time(r) for n, r in vanilla.items()})
    weights, differences, enclosed = [], [], slower != faster
    for seed, run in runs.items():
        slow, fast = vanilla[slower][seed], vanilla[faster][seed]
        weight, inside = _weight(run.step_time_s, slow.step_time_s, fast.step_time_s)
        enclosed = enclosed and inside
        weights.append(weight)
        baseline = weight * slow.valid_loss + (1 - weight) * fast.valid_loss
        differences.append(run.valid_loss - baseline)
    return EqualSpeed(
        arm=name,
        slower=slower,
        faster=faster,
        weight=statistics.fmean(weights),
        enclosed=enclosed,
        loss_difference=mean_interval(differences),
    )


def standing(equal: EqualSpeed, time: float, rival_time: float) -> Standing | None:
    """The outcome of a MoE++ arm against its baseline; None if the comparison is inconclusive.

    If the MoE++ arm is slower or faster than all baselines, the comparison is conclusive in one
    direction only: for a slower arm that is worse, or a faster one that is better.

    Args:
        equal: The comparison.
        time: Mean step of the MoE++ arm.
        rival_time: Mean step of `equal.slower`.
    """
    low, high = equal.loss_difference.low, equal.loss_difference.high
    if low is None or high is None:
        clear: Standing = "open"
    else:
        clear = "worse" if low > 0 else "better" if high < 0 else "open"
    if equal.slower != equal.faster:
        return clear
    tells = "worse" if time >= rival_time else "better"
    return clear if clear == tells else None


def _mean_time(runs: Runs) -> float:
    return statistics.fmean(run.step_time_s for run in runs.values())


def _around(time: float, times: Mapping[str, float]) -> tuple[str, str]:
    """Names of the slower and the faster neighbour; the nearest twice if one is missing."""
    slower = [name for name in times if times[name] >= time]
    faster = [name for name in times if times[name] < time]
    above = min(slower, key=lambda name: times[name], default=None)
    below = max(faster, key=lambda name: times[name], default=None)
    if above is None or below is None:
        nearest = above or below
        assert nearest is not None, "vanilla itself is always there"
        return nearest, nearest
    return above, below


def _weight(time: float, slower: float, faster: float) -> tuple[float, bool]:
    """Weight of the slower one, and whether `time` is between both in this seed."""
    if slower <= faster:
        # The same arm, or noise has put them the other way round in this seed.
        return (1.0 if slower == faster else 0.5), False
    weight = (time - faster) / (slower - faster)
    return min(max(weight, 0.0), 1.0), 0.0 <= weight <= 1.0
