"""The conditions for going from the pilot to a node and the cluster, and for going back.

The numbers are this pilot's. Break-even follows from time to equal loss = token factor times time
ratio: MoE++ pays below a time ratio of 1 / token factor, and, with tokens worth v nats per e-fold,
as long as it is less than v log(1 / time ratio) nats behind vanilla after the same tokens.
"""

from __future__ import annotations

import math

from moepp_megatron.workbench.experiments.pilot.report import numbers
from moepp_megatron.workbench.experiments.pilot.report.learning import smooth_curve
from moepp_megatron.workbench.experiments.pilot.result import (
    ArmOutcome,
    ArmVerdict,
    Interval,
    PilotResult,
    PilotTarget,
    TargetModel,
)
from moepp_megatron.workbench.experiments.pilot.statistics import one_run
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.healthy import guard_rule


def curve_points(outcome: ArmOutcome) -> str:
    """Losses on the way, which a run of the same arm should meet."""
    tokens, values = smooth_curve(outcome.curve)
    if len(tokens) < 2:
        return "Training loss (the pilot has no curve)."
    picked = [min(range(len(tokens)), key=lambda i: abs(tokens[i] - s * tokens[-1])) for s in _AT]
    points = ", ".join(
        f"{numbers.loss(values[i])} after {formatting.big_count(float(tokens[i]))} tokens"
        for i in dict.fromkeys(picked)
    )
    return f"Training loss, with the pilot's batch and schedule: {points}."


_AT = (0.25, 0.5, 0.75, 1.0)
# A share of training time that is worth no further runs.
_NEGLIGIBLE = 0.01


def speed_condition(factor: Interval | None, where: str) -> str:
    """The time ratio that MoE++ must reach.

    Args:
        factor: Tokens to vanilla's loss over vanilla's; None if unknown.
        where: What measures the ratio.
    """
    if factor is None:
        return (
            f"Step time over vanilla's below 1 by {where}. What tokens are worth is unknown, so "
            "how far below is open."
        )
    text = f"Step time over vanilla's at most {numbers.ratio(1 / factor.mean)} by {where}"
    if factor.high is not None and 0 < factor.high < math.inf:
        text += f"; {numbers.ratio(1 / factor.high)} to be sure of it at 95%"
    return f"{text}. That is 1 / token factor: there MoE++ takes vanilla's time to vanilla's loss."


def loss_condition(outcome: ArmOutcome) -> str:
    """Where a run of the same arm should end, and how far off it may be."""
    mean, count = numbers.loss(outcome.valid_loss.mean), len(outcome.seeds)
    text = f"Validation loss of {mean} after {outcome.arm.steps:,} steps"
    reach = one_run(outcome.valid_loss, count)
    if reach is not None:
        return (
            f"{text}, to within {numbers.loss(reach)}: a single run is that near in 95 of 100 "
            "cases, by the spread of the seeds."
        )
    difference = outcome.loss_difference
    if difference is None:
        return f"{text}."
    return (
        f"{text}. So few seeds have no spread to go by; off by more than the difference to "
        f"vanilla, {numbers.loss(abs(difference.mean))}, it would be another answer."
    )


def share_condition(outcome: ArmOutcome) -> str:
    """The FFN share that a run of the same arm should have."""
    share = formatting.percent(outcome.ffn_share.mean)
    reach = one_run(outcome.ffn_share, len(outcome.seeds))
    near = "" if reach is None else f", to within {100 * reach:.1f} points"
    return f"FFN share of {share} at the end{near}. Saved work and traffic follow from it."


def behind_condition(result: PilotResult, time_ratio: float | None) -> str:
    """The loss difference that uses up what this time ratio gains."""
    value, low = result.token_value.mean, result.token_value.low
    is_known = 0 < value < math.inf and (low is None or low > 0)
    if not is_known or time_ratio is None or not 0 < time_ratio < math.inf:
        return "MoE++ falls further behind vanilla than in the pilot after the same tokens."
    allowed = value * math.log(1 / time_ratio)
    if allowed <= 0:
        return (
            f"MoE++ is less than {numbers.loss(-allowed)} nats better than vanilla after the same "
            f"tokens: at a time ratio of {numbers.ratio(time_ratio)} it has to be that much better."
        )
    return (
        f"MoE++ is {numbers.loss(allowed)} nats or more behind vanilla after the same tokens: at a "
        f"time ratio of {numbers.ratio(time_ratio)}, and with tokens worth what the pilot "
        "measured, that uses up what speed gains."
    )


def guard_condition(outcome: ArmOutcome) -> str:
    """The FFN share at which the router flees from FFN experts."""
    rule = guard_rule("few_ffn_experts")
    assert rule is not None, "a default rule"
    assert rule.below is not None, "which judges what is too small"
    limit = formatting.percent(rule.below * outcome.ffn_share.mean)
    return (
        f"FFN share below {limit}, {rule.below:g} of the pilot's, for {rule.for_steps} steps: the "
        "router flees into zero-computation experts. Raise `moe.balance_coeff`, or hold the share "
        "with `moe.budget`."
    )


def promised(target: PilotTarget, model: TargetModel) -> list[str]:
    """Speed and traffic by the cost model."""
    lines = []
    if model.tokens_per_s_per_gpu is not None:
        day = model.tokens_per_s_per_gpu * target.gpus * 86400
        lines.append(
            f"Speed promised by the cost model: {formatting.count(model.tokens_per_s_per_gpu)} "
            f"tokens/s/GPU, {formatting.big_count(day)} tokens a day on {target.gpus:,} GPUs."
        )
    if model.a2a_bytes:
        lines.append(f"All-to-all: {model.a2a_bytes / 1e9:,.1f} GB a step.")
    return lines


def room(verdict: ArmVerdict, model: TargetModel) -> list[str]:
    """How much slower than estimated MoE++ may be; empty if unknown."""
    if model.time_ratio is None or not 0 < model.time_ratio < math.inf:
        return []
    if verdict.token_factor is None:
        return []
    left = 1 / verdict.token_factor.mean / model.time_ratio - 1
    text = f"The cost model expects a time ratio of {numbers.ratio(model.time_ratio)}, which "
    if left <= 0:
        return [text + "is not enough: only a better measured one is a reason to go on."]
    return [text + f"leaves {formatting.percent(left)} of room to break-even."]


def if_it_does_not(result: PilotResult) -> str:
    """The consequences if MoE++ does not pay."""
    if result.is_open:
        return "It stays undecided: stay with vanilla. Nothing here argues for a larger run."
    if result.recommended is None:
        return (
            "No arm is recommended: stay with vanilla, or repeat the pilot with another tau, more "
            "steps or more data. Nothing here argues for a larger run."
        )
    return (
        "The answer is 'does not pay' at the scale that you decide about: then stay with vanilla."
    )


def if_undecided(result: PilotResult, verdict: ArmVerdict) -> str:
    """What would decide an undecided pilot."""
    setting = result.setting
    more = f"`--seeds {setting.next_seeds}`"
    if setting.look == 0:
        return f"Undecided because the first look has not come: {more}."
    if verdict.stakes is not None and max(vars(verdict.stakes).values()) < _NEGLIGIBLE:
        return (
            f"Undecided, and either choice is expected to lose less than {_NEGLIGIBLE:.0%} of the "
            f"training time: take the two for equal, or go on to the next look with {more}."
        )
    return (
        f"Undecided at this look: go on to the next one with {more}, or train longer. Its level is "
        "stricter, so that looking again does not make a wrong answer more likely."
    )
