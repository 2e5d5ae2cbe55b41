"""Decides whether MoE++ pays, and says so in a sentence.

Two questions have to be answered with yes. Trained for vanilla's time, is MoE++ better than
vanilla? Trained on as many tokens, is it better than a vanilla model that is narrowed to its
compute, which anybody could train instead? Both are differences of losses with the same seeds.

The first rests on the sessions of speed. A bias that all of them share, such as a part of a
training step that they leave out, is in no interval; so it stays open where the training runs show
another speed than the sessions.
"""

from __future__ import annotations

import math

from moepp_megatron.workbench.experiments.pilot.evidence import Evidence
from moepp_megatron.workbench.experiments.pilot.result import Answer, Interval, Verdict
from moepp_megatron.workbench.experiments.pilot.statistics import Estimate

# By which the ratio of step times may differ between runs and sessions (docs/pilot.md has what a
# bias does with and without it).
SPEED_LIMIT = 0.01


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
        found: The verdict.
        seeds_needed: Seeds of the first look, if it has not come; else None.
    """
    if seeds_needed is not None:
        return f"Undecided: nothing is decided before {seeds_needed} seeds."
    if found.answer == "pays":
        return f"MoE++ pays here: after vanilla's time {_loss(found.loss_in_time)}{_time(found)}."
    if found.answer == "does not pay":
        compute = found.loss_in_compute
        if compute.low is not None and compute.low > 0:
            other = "a vanilla model of the same compute does better"
            return f"MoE++ does not pay here: {other}, by {compute.mean:.4f} nats."
        return (
            f"MoE++ does not pay here: after vanilla's time {_loss(found.loss_in_time)}"
            f"{_time(found)}."
        )
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
