"""Decides whether a MoE++ arm pays.

Two questions have to be answered with yes. Trained for vanilla's time, is MoE++ better than
vanilla? Trained on as many tokens, is it better than a vanilla model that is narrowed to its
compute, which anybody could train instead? Both are differences of losses with the same seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moepp_megatron.workbench.experiments.pilot import sentences
from moepp_megatron.workbench.experiments.pilot.evidence import Evidence
from moepp_megatron.workbench.experiments.pilot.extrapolate import COST_MODEL_ERROR
from moepp_megatron.workbench.experiments.pilot.result import (
    Answer,
    ArmOutcome,
    ArmVerdict,
    Interval,
    Stakes,
)
from moepp_megatron.workbench.experiments.pilot.statistics import Estimate

_RANK: dict[Answer | None, int] = {"pays": 0, "undecided": 1, "does not pay": 2, None: 3}


def answer_of(signs: Sequence[int]) -> Answer:
    """The answer by the signs of what has to be below 0."""
    if any(sign > 0 for sign in signs):
        return "does not pay"
    return "pays" if all(sign < 0 for sign in signs) else "undecided"


def verdict(
    outcome: ArmOutcome, evidence: Evidence, level: float | None, at_target: AtTarget | None = None
) -> ArmVerdict:
    """The verdict on a MoE++ arm.

    Args:
        outcome: The arm.
        evidence: What the runs say of it.
        level: One-sided level of the newest look; None before the first one.
        at_target: The arm at the target, or None.
    """
    in_time, in_compute, factor = evidence.in_time, evidence.in_compute, evidence.token_factor
    at_pilot: Answer = "undecided"
    if level is not None:
        at_pilot = answer_of([in_time.sign(level), in_compute.sign(level)])
    target_time: Interval | None = None
    answer_at_target: Answer | None = None
    if at_target is not None:
        answer_at_target = "undecided"
        if factor is not None and at_target.time_ratio is not None:
            scaled = factor.plus(Estimate(math.log(at_target.time_ratio), 0.0, factor.degrees))
            target_time = scaled.factor(widened_by=COST_MODEL_ERROR)
            if level is not None:
                sign = _sign_beyond(scaled, math.log1p(COST_MODEL_ERROR), level)
                answer_at_target = answer_of([sign, in_compute.sign(level)])
    reasons = sentences.pilot_reasons(outcome, evidence)
    if at_target is not None:
        reasons += sentences.target_reasons(at_target.time_ratio, target_time)
    return ArmVerdict(
        arm=outcome.arm.name,
        loss_in_time=in_time.interval(),
        loss_in_compute=in_compute.interval(),
        token_factor=None if factor is None else factor.factor(),
        time_to_loss=None if evidence.time_to_loss is None else evidence.time_to_loss.factor(),
        target_time_to_loss=target_time,
        probability=_both(in_time.probability_below(), in_compute.probability_below()),
        stakes=_stakes(evidence),
        at_pilot=at_pilot,
        at_target=answer_at_target,
        reasons=reasons,
    )


@dataclass(frozen=True)
class AtTarget:
    """A MoE++ arm at the target's size.

    Attributes:
        time_ratio: Step time over vanilla's; None where either does not fit.
    """

    time_ratio: float | None


def _sign_beyond(logarithm: Estimate, error: float, level: float) -> int:
    """The sign that the logarithm keeps whatever the sign of an additional error."""
    signs = {logarithm.plus(Estimate(shift, 0.0, 1)).sign(level) for shift in (-error, error)}
    return signs.pop() if len(signs) == 1 else 0


def _both(one: float | None, other: float | None) -> float | None:
    """The probability of both; their losses are of different runs, so that they are independent."""
    return None if one is None or other is None else one * other


def _stakes(evidence: Evidence) -> Stakes | None:
    """What a wrong decision costs; None where tokens are not clearly worth anything."""
    value, found = evidence.token_value.mean, evidence.in_time
    gained = Estimate(-found.mean, found.error, found.degrees)
    adopted, kept = found.expected_above(), gained.expected_above()
    if evidence.time_to_loss is None or adopted is None or kept is None:
        return None
    return Stakes(adopted=adopted / value, kept=kept / value)


def by_favour(verdicts: Sequence[ArmVerdict]) -> list[ArmVerdict]:
    """Verdicts, the most favourable first: by the target's answer if there is one, then by time."""

    def order(one: ArmVerdict) -> tuple[int, int, float]:
        time = one.target_time_to_loss or one.time_to_loss
        first = one.at_target if one.at_target is not None else one.at_pilot
        return _RANK[first], _RANK[one.at_pilot], time.mean if time is not None else math.inf

    return sorted(verdicts, key=order)


def recommended(verdicts: Sequence[ArmVerdict]) -> str | None:
    """The arm to go on with; None where none has been shown to pay.

    Args:
        verdicts: Verdicts, the most favourable first.
    """
    best = verdicts[0]
    answer = best.at_target if best.at_target is not None else best.at_pilot
    return best.arm if answer == "pays" else None
