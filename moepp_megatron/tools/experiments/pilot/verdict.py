"""Decides whether MoE++ pays, and says so in a sentence.

Two questions have to be answered with yes. Trained for vanilla's time, is MoE++ better than
vanilla? Trained on as many tokens, is it better than a vanilla model that is narrowed to its
compute, which anybody could train instead? Both are differences of losses with the same seeds.

The first rests on the sessions of speed. A bias that all of them share, such as a part of a
training step that they leave out, is in no interval; so it is left open where the training runs
show another speed than the sessions.

A pilot may be looked at after every `LOOK` seeds. Somebody who looks again and again until
something is decided would decide wrongly more often than the level says. So each look spends half
of what is left of the error that is allowed: look k has the level LEVEL / 2^k. The sum over any
number of looks is at most LEVEL, whatever the dependence between them (the union bound; a spending
function in the sense of Lan and DeMets, Biometrika 70, 1983, fixed before the first run).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moepp_megatron.tools.experiments.statistics import Estimate, Interval, PooledLosses

LEVEL = 0.025
"""Maximum probability of "pays" where MoE++ does not, in any number of looks."""

LOOK = 5
"""Seeds of the first look; the k-th look comes after k times as many."""

SPEED_LIMIT = 0.01
"""Largest difference of the ratio of step times between runs and sessions that decides."""


def level_of(look: int) -> float:
    """Return the one-sided level of look 1, 2, ..."""
    return LEVEL / 2**look


@dataclass(frozen=True)
class Verdict:
    """Does MoE++ pay? Losses in nats, less vanilla's; times over vanilla's."""

    answer: Literal["pays", "does not pay", "undecided"]
    token_value: Interval  # nats that an e-fold of tokens is worth to vanilla
    loss_in_time: Interval  # after vanilla's time, with the error of the measured speed
    loss_in_compute: Interval  # less the narrowed vanilla model's
    time_to_loss: Interval | None  # None where tokens are not clearly worth anything
    speed: Interval  # of a step, in the sessions, which decided the steps of `equal_time`
    speed_in_runs: Interval
    speeds_agree: bool  # within `SPEED_LIMIT`


def judge(
    losses: PooledLosses,
    log_tokens: float,
    speed: Estimate,
    in_runs: Estimate,
    level: float | None,
) -> Verdict:
    """Judge MoE++ at the one-sided level of the newest look; None before the first one.

    `log_tokens` is the logarithm of vanilla's tokens over those of the short runs, `speed` and
    `in_runs` that of MoE++'s step time over vanilla's in the sessions and in the training runs.
    """
    worth = {"vanilla": -1.0 / log_tokens, "short": 1.0 / log_tokens}
    value = losses.contrast(worth)
    # Only its error counts: the steps were chosen by the mean.
    error = Estimate(0.0, speed.error, speed.degrees)
    in_time = losses.difference("equal_time", "vanilla").plus(error, value.mean)
    in_compute = losses.difference("moepp", "narrow")
    agree = abs(in_runs.mean - speed.mean) <= math.log1p(SPEED_LIMIT)
    signs = [0, 0]
    if level is not None:
        signs = [in_time.sign(level) if agree else 0, in_compute.sign(level)]
    time = _time_to_loss(losses, worth).plus(error) if value.sign(0.025) > 0 else None
    return Verdict(
        answer="does not pay" if 1 in signs else "pays" if signs == [-1, -1] else "undecided",
        token_value=value.interval(),
        loss_in_time=in_time.interval(),
        loss_in_compute=in_compute.interval(),
        time_to_loss=None if time is None else time.factor(),
        speed=speed.factor(),
        speed_in_runs=in_runs.factor(),
        speeds_agree=agree,
    )


def _time_to_loss(losses: PooledLosses, worth: Mapping[str, float]) -> Estimate:
    """Loss after vanilla's time over the value of tokens, with both errors (the delta method)."""
    value = losses.contrast(worth).mean
    ratio = losses.difference("equal_time", "vanilla").mean / value
    weights = {"equal_time": 1.0 / value, "vanilla": -1.0 / value, "short": 0.0}
    for arm, weight in worth.items():
        weights[arm] -= ratio * weight / value
    linear = losses.contrast(weights)
    return Estimate(ratio, linear.error, linear.degrees)


def sentence(found: Verdict, has_looked: bool = True) -> str:
    """Say the answer to the person who decides."""
    if not has_looked:
        return f"Undecided: nothing is decided before {LOOK} seeds."
    loss, compute = found.loss_in_time.mean, found.loss_in_compute
    side = "lower" if loss < 0 else "higher"
    in_time = f"after vanilla's time its loss is {abs(loss):.4f} nats {side} than vanilla's"
    if found.time_to_loss is not None:
        in_time += f", and it reaches vanilla's loss in {found.time_to_loss.mean:.2f} of the time"
    if found.answer == "pays":
        return f"MoE++ pays here: {in_time}."
    if found.answer == "does not pay":
        if compute.low is not None and compute.low > 0:
            in_time = f"a vanilla model of the same compute does better, by {compute.mean:.4f} nats"
        return f"MoE++ does not pay here: {in_time}."
    if not found.speeds_agree:
        return (
            f"Undecided: a MoE++ step takes {found.speed_in_runs.mean:.3f} of vanilla's time in "
            f"the runs and {found.speed.mean:.3f} in the sessions of speed, which differ by more "
            f"than {SPEED_LIMIT:.0%}."
        )
    return "Undecided: these runs cannot tell whether MoE++ pays; more seeds or steps may."
