"""Decides whether MoE++ pays, and says so in a sentence.

Two questions have to be answered with yes. Trained for vanilla's time, is MoE++ better than
vanilla? Trained on as many tokens, is it better than a vanilla model that is narrowed to its
compute, which anybody could train instead? Both are differences of losses with the same seeds.

The first rests on the sessions of speed. A bias that all of them share, such as a part of a
training step that they leave out, is in no interval; so it stays open where the training runs show
another speed than the sessions.

A pilot may be looked at after every `first` seeds. Somebody who looks again and again until
something is decided would decide wrongly more often than the level says. So each look spends half
of what is left of the error that is allowed: look k has the level LEVEL / 2^k. The sum over any
number of looks is at most LEVEL, whatever the dependence between them (the union bound; a spending
function in the sense of Lan and DeMets, Biometrika 70, 1983, fixed before the first run).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moepp_megatron.tools.experiments.pilot.result import Answer, ArmKind, Interval, Verdict
from moepp_megatron.tools.experiments.pilot.statistics import Estimate, PooledLosses

LEVEL = 0.025
"""Maximum probability of "pays" where MoE++ does not, in any number of looks."""

FEWEST_SEEDS = 3
"""Seeds of a look, at least: one or two hardly show the noise."""

# By which the ratio of step times may differ between runs and sessions (docs/pilot.md has what a
# bias does with and without it).
SPEED_LIMIT = 0.01


def level_of(look: int) -> float:
    """The one-sided level of look 1, 2, ..."""
    return LEVEL / 2**look


@dataclass(frozen=True)
class Evidence:
    """Pilot estimates.

    Attributes:
        token_value: Nats that an e-fold of tokens is worth to vanilla.
        in_time: Loss after vanilla's time minus vanilla's; the error of the measured speed, which
            decides how many steps that are, is included.
        in_compute: Loss minus that of the narrowed vanilla model.
        time_to_loss: Logarithm of the time to vanilla's loss over vanilla's; None where tokens are
            not clearly worth anything.
    """

    token_value: Estimate
    in_time: Estimate
    in_compute: Estimate
    time_to_loss: Estimate | None

    @staticmethod
    def of(
        losses: PooledLosses, names: Mapping[ArmKind, str], log_tokens: float, speed: Estimate
    ) -> Evidence:
        """Compute it.

        Args:
            losses: Losses of all arms.
            names: Names of the arms by kind.
            log_tokens: Logarithm of vanilla's tokens over those of the short runs.
            speed: Logarithm of MoE++'s step time over vanilla's.
        """
        vanilla, in_time = names["vanilla"], names["equal_time"]
        worth = {vanilla: -1.0 / log_tokens, names["short"]: 1.0 / log_tokens}
        value = losses.contrast(worth)
        # Only its error counts: the steps were chosen by the mean.
        error = Estimate(0.0, speed.error, speed.degrees)
        time = None
        if value.sign(0.025) > 0:
            time = _in_tokens(losses, in_time, vanilla, worth).plus(error)
        return Evidence(
            token_value=value,
            in_time=losses.difference(in_time, vanilla).plus(error, value.mean),
            in_compute=losses.difference(names["moepp"], names["narrow"]),
            time_to_loss=time,
        )


def _in_tokens(losses: PooledLosses, arm: str, other: str, worth: Mapping[str, float]) -> Estimate:
    """A loss difference over the value of tokens, with the error of both (the delta method)."""
    value = losses.contrast(worth).mean
    ratio = losses.difference(arm, other).mean / value
    weights = {arm: 1.0 / value}
    weights[other] = weights.get(other, 0.0) - 1.0 / value
    for name, weight in worth.items():
        weights[name] = weights.get(name, 0.0) - ratio * weight / value
    linear = losses.contrast(weights)
    return Estimate(ratio, linear.error, linear.degrees)


def answer_of(in_time: int, in_compute: int) -> Answer:
    """The answer by the signs of both loss differences; 0 where one is not clear."""
    if max(in_time, in_compute) > 0:
        return "does not pay"
    return "pays" if in_time < 0 and in_compute < 0 else "undecided"


def verdict(evidence: Evidence, speed: Estimate, in_runs: Estimate, level: float | None) -> Verdict:
    """The verdict on MoE++.

    Args:
        evidence: What the runs show.
        speed: Logarithm of MoE++'s step time over vanilla's, in the sessions.
        in_runs: The same in the training runs.
        level: One-sided level of the newest look; None before the first one.
    """
    agree = abs(in_runs.mean - speed.mean) <= math.log1p(SPEED_LIMIT)
    answer: Answer = "undecided"
    if level is not None:
        in_time = evidence.in_time.sign(level) if agree else 0
        answer = answer_of(in_time, evidence.in_compute.sign(level))
    return Verdict(
        answer=answer,
        loss_in_time=evidence.in_time.interval(),
        loss_in_compute=evidence.in_compute.interval(),
        time_to_loss=None if evidence.time_to_loss is None else evidence.time_to_loss.factor(),
        speed=speed.factor(),
        speed_in_runs=in_runs.factor(),
        speeds_agree=agree,
    )


def sentence(found: Verdict, seeds_needed: int | None) -> str:
    """The answer for the person who decides.

    Args:
        seeds_needed: Seeds of the first look, if it has not come; else None.
    """
    if seeds_needed is not None:
        return f"Undecided: nothing is decided before {seeds_needed} seeds."
    in_time = f"after vanilla's time {_loss(found.loss_in_time)}{_time(found)}."
    if found.answer == "pays":
        return f"MoE++ pays here: {in_time}"
    if found.answer == "does not pay":
        compute = found.loss_in_compute
        if compute.low is not None and compute.low > 0:
            other = "a vanilla model of the same compute does better"
            return f"MoE++ does not pay here: {other}, by {compute.mean:.4f} nats."
        return f"MoE++ does not pay here: {in_time}"
    if not found.speeds_agree:
        return (
            "Undecided: a MoE++ step takes "
            f"{found.speed_in_runs.mean:.3f} of vanilla's time in the runs and "
            f"{found.speed.mean:.3f} in the sessions of speed, which differ by more than "
            f"{SPEED_LIMIT:.0%}."
        )
    return "Undecided: these runs cannot tell whether MoE++ pays; more seeds or steps may."


def _loss(difference: Interval) -> str:
    side = "lower" if difference.mean < 0 else "higher"
    return f"its loss is {abs(difference.mean):.4f} nats {side} than vanilla's"


def _time(found: Verdict) -> str:
    if found.time_to_loss is None:
        return ""
    return f", and it reaches vanilla's loss in {found.time_to_loss.mean:.2f} of the time"
