"""From the pilot to the cluster: what to run, what to watch, when to go on and when to go back.

The numbers are this pilot's. Break-even follows from time to equal loss = token factor times time
ratio: MoE++ pays below a time ratio of 1 / token factor, and, with tokens worth v nats an e-fold,
as long as it is less than v log(1 / time ratio) nats behind vanilla after the same tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moepp_megatron.planning.pilot.result import (
    ArmOutcome,
    Interval,
    PilotResult,
    Target,
    TargetModel,
    Verdict,
)
from moepp_megatron.report import formatting
from moepp_megatron.report.pilot import words
from moepp_megatron.report.pilot.commands import Commands
from moepp_megatron.report.pilot.health import guard_rule
from moepp_megatron.report.pilot.plots import smooth_curve
from moepp_megatron.report.pilot.tables import alerts


@dataclass(frozen=True)
class Stage:
    """One step of the roll-out.

    Attributes:
        title: Heading.
        state: What the reader has to do with it now, in a word or two.
        aim: The question that it answers.
        commands: Lines for a shell.
        watch: What to look at.
        go_on: Conditions, all of which must hold.
        go_back: Any of which is enough.
    """

    title: str
    state: str
    aim: str
    commands: list[str]
    watch: list[str]
    go_on: list[str]
    go_back: list[str]


def stages(result: PilotResult) -> list[Stage]:
    """All three where an arm is recommended, else the pilot's alone."""
    verdict = words.chosen(result)
    outcome = words.outcome_of(result, verdict.arm) if verdict is not None else None
    if verdict is None or outcome is None:
        return []
    commands = Commands(result, outcome)
    first = _pilot(result, verdict, outcome, commands)
    if result.recommended is None:
        return [first]
    second = _node(result, verdict, outcome, commands)
    return [first, second, _cluster(result, verdict, outcome, commands)]


def _pilot(result: PilotResult, verdict: Verdict, outcome: ArmOutcome, commands: Commands) -> Stage:
    watch = [
        f"Alerts of {verdict.arm}: {alerts(outcome)}.",
        f"FFN share: {formatting.percent(outcome.ffn_share.mean)} in the last quarter.",
    ]
    go_on = [f"{verdict.arm} pays, or may pay, at the pilot's scale. Found: {verdict.at_pilot}."]
    if verdict.at_target is not None:
        go_on.append(f"It pays, or may pay, at the target. Found: {verdict.at_target}.")
    go_back = [_if_it_does_not(result, verdict)]
    more = words.seeds_to_decide(verdict.time_to_loss, len(outcome.seeds))
    if verdict.at_pilot == "undecided" and _crosses(verdict.time_to_loss):
        go_back.append(_if_undecided(verdict, len(outcome.seeds), more))
    return Stage(
        title="1. Pilot",
        state="done" if result.recommended is not None else "ends here",
        aim="Does MoE++ pay on this data at a scale that costs little?",
        commands=commands.pilot(),
        watch=watch,
        go_on=go_on,
        go_back=go_back,
    )


def _if_it_does_not(result: PilotResult, verdict: Verdict) -> str:
    if result.recommended is None:
        return (
            "No arm is recommended: stay with vanilla, or repeat the pilot with another tau, more "
            "steps or more data. Nothing here argues for a larger run."
        )
    return (
        "The answer is 'does not pay' at the scale that you decide about: then stay with vanilla."
    )


def _crosses(interval: Interval) -> bool:
    if interval.low is None or interval.high is None:
        return True
    return interval.low <= 1 <= interval.high


def _if_undecided(verdict: Verdict, seeds: int, more: int | None) -> str:
    if not words.has_ends(verdict.time_to_loss):
        return "Undecided because a single seed has no interval: repeat with three seeds or more."
    if more is None:
        return (
            f"Undecided, and more seeds alone would hardly help (more than {words.MAX_SEEDS}): "
            "train longer, or take the two for equal."
        )
    return (
        f"Undecided after {seeds} seeds: if mean and spread stay as they are, about {more} would "
        "decide."
    )


def _node(result: PilotResult, verdict: Verdict, outcome: ArmOutcome, commands: Commands) -> Stage:
    ratio = outcome.time_ratio.mean if outcome.time_ratio is not None else None
    return Stage(
        title="2. One node",
        state="next",
        aim="Do loss and routing stay as in the pilot, and is MoE++ faster on the real cards?",
        commands=commands.node(),
        watch=[
            _curve_points(outcome),
            "The table below, in `moepp monitor` and in the run's `report.html`.",
            "`runs/node/alerts.jsonl`: with `routing_guard.dry_run` the guard only tells.",
        ],
        go_on=[
            _speed_condition(
                verdict.token_factor, '`moepp scale` (the column "of vanilla\'s time")'
            ),
            _loss_condition(outcome),
            _share_condition(outcome),
            "No critical alert.",
        ],
        go_back=[
            "The step takes longer than that: no loss can make up for it. Look where the time goes "
            "(`moepp profile runs/node`) before anything larger.",
            _behind_condition(
                result, outcome.time_ratio.mean if outcome.time_ratio is not None else None
            ),
            _guard_condition(outcome),
        ],
    )


def _curve_points(outcome: ArmOutcome) -> str:
    tokens, values = smooth_curve(outcome.curve)
    if len(tokens) < 2:
        return "Training loss (the pilot has no curve)."
    picked = [min(range(len(tokens)), key=lambda i: abs(tokens[i] - s * tokens[-1])) for s in _AT]
    points = ", ".join(
        f"{words.loss(values[i])} after {formatting.big_count(float(tokens[i]))} tokens"
        for i in dict.fromkeys(picked)
    )
    return f"Training loss, with the pilot's batch and schedule: {points}."


_AT = (0.25, 0.5, 0.75, 1.0)


def _speed_condition(factor: Interval, where: str) -> str:
    text = f"Step time over vanilla's at most {words.ratio(1 / factor.mean)} by {where}"
    if factor.high is not None and math.isfinite(factor.high) and factor.high > 0:
        text += f"; {words.ratio(1 / factor.high)} to be sure of it at 95%"
    return f"{text}. That is 1 / token factor: there MoE++ takes vanilla's time to vanilla's loss."


def _loss_condition(outcome: ArmOutcome) -> str:
    mean, count = words.loss(outcome.valid_loss.mean), len(outcome.seeds)
    text = f"Validation loss of {mean} after {outcome.arm.steps:,} steps"
    reach = words.one_run(outcome.valid_loss, count)
    if reach is not None:
        return (
            f"{text}, to within {words.loss(reach)}: a single run is that near in 95 of 100 cases, "
            "by the spread of the seeds."
        )
    difference = outcome.loss_difference
    if difference is None:
        return f"{text}."
    return (
        f"{text}. A single seed has no spread to go by; off by more than the difference to "
        f"vanilla, {words.loss(abs(difference.mean))}, it would be another answer."
    )


def _share_condition(outcome: ArmOutcome) -> str:
    share = formatting.percent(outcome.ffn_share.mean)
    reach = words.one_run(outcome.ffn_share, len(outcome.seeds))
    near = "" if reach is None else f", to within {100 * reach:.1f} points"
    return f"FFN share of {share} at the end{near}. Saved work and traffic follow from it."


def _behind_condition(result: PilotResult, time_ratio: float | None) -> str:
    value = result.token_value.mean
    if time_ratio is None or not 0 < time_ratio < math.inf or not 0 < value < math.inf:
        return "MoE++ falls further behind vanilla than in the pilot after the same tokens."
    allowed = value * math.log(1 / time_ratio)
    if allowed <= 0:
        return "MoE++ is not faster, so it must be better after the same tokens; it is not."
    return (
        f"MoE++ is {words.loss(allowed)} nats or more behind vanilla after the same tokens: at a "
        f"time ratio of {words.ratio(time_ratio)}, and with tokens worth what the pilot measured, "
        "that uses up what speed gains."
    )


def _guard_condition(outcome: ArmOutcome) -> str:
    rule = guard_rule("few_ffn_experts")
    assert rule is not None, "a default rule"
    assert rule.below is not None, "which judges what is too small"
    limit = formatting.percent(rule.below * outcome.ffn_share.mean)
    return (
        f"FFN share below {limit}, {rule.below:g} of the pilot's, for {rule.for_steps} steps: the "
        "router flees into zero-computation experts. Raise `moe.balance_coeff`, or hold the share "
        "with `moe.budget`."
    )


def _cluster(
    result: PilotResult, verdict: Verdict, outcome: ArmOutcome, commands: Commands
) -> Stage:
    target = result.target
    models = target.models if target is not None else []
    model = next((m for m in models if m.arm == verdict.arm and m.fits), None)
    watch = ["The same metrics; their ranges are those of stage 2 now."]
    go_on = [_speed_condition(verdict.token_factor, "`scaling.html` on the nodes of the run")]
    ratio = None
    if target is not None and model is not None:
        ratio = model.time_ratio
        watch += _promised(target, model)
        go_on += _room(verdict, model)
    go_on.append(
        "The routing guard has not cried wolf in its dry run: then leave `dry_run` out "
        "(docs/guard.md)."
    )
    return Stage(
        title="3. Cluster",
        state="later",
        aim="Does the speed hold over the network, before most of the money is spent?",
        commands=commands.cluster(),
        watch=watch,
        go_on=go_on,
        go_back=[
            "A time ratio above break-even in `scaling.html`: train vanilla on this cluster, or "
            "ask `moepp plan` for another layout.",
            _behind_condition(result, ratio),
            "A critical alert that comes back after the guard has acted.",
        ],
    )


def _promised(target: Target, model: TargetModel) -> list[str]:
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


def _room(verdict: Verdict, model: TargetModel) -> list[str]:
    if model.time_ratio is None or not 0 < model.time_ratio < math.inf:
        return []
    room = 1 / verdict.token_factor.mean / model.time_ratio - 1
    text = f"The cost model expects a time ratio of {words.ratio(model.time_ratio)}, which "
    if room <= 0:
        return [text + "is not enough: only a better measured one is a reason to go on."]
    return [text + f"leaves {formatting.percent(room)} of room to break-even."]
