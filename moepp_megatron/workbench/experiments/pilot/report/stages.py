"""The stages from pilot to cluster: commands, metrics to watch, conditions to continue or stop."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.workbench.experiments.pilot.report.commands import Commands
from moepp_megatron.workbench.experiments.pilot.report.conditions import (
    behind_condition,
    curve_points,
    guard_condition,
    if_it_does_not,
    if_undecided,
    loss_condition,
    promised,
    room,
    share_condition,
    speed_condition,
)
from moepp_megatron.workbench.experiments.pilot.report.tables import alerts
from moepp_megatron.workbench.experiments.pilot.result import (
    ArmOutcome,
    ArmVerdict,
    PilotResult,
)
from moepp_megatron.workbench.report import formatting

_DONE = "done"
# More seeds cost less than a larger run.
_UNDECIDED = "next: not decided yet"


@dataclass(frozen=True)
class Stage:
    """One step of the roll-out.

    Attributes:
        title: Heading.
        state: What the reader has to do with it now, in a word or two.
        aim: The question that it answers.
        commands: Lines for a shell.
        watch: Metrics to watch.
        go_on: Conditions to continue, all of which must hold.
        go_back: Conditions to go back, any of which is enough.
    """

    title: str
    state: str
    aim: str
    commands: list[str]
    watch: list[str]
    go_on: list[str]
    go_back: list[str]


def stages(result: PilotResult) -> list[Stage]:
    """All three stages if an arm is recommended, else only the pilot's."""
    verdict = result.chosen
    outcome = result.outcome_of(verdict.arm) if verdict is not None else None
    if verdict is None or outcome is None:
        return []
    commands = Commands(result, outcome)
    first = _pilot(result, verdict, outcome, commands)
    if result.recommended is None:
        return [first]
    second = _node(result, verdict, outcome, commands)
    return [first, second, _cluster(result, verdict, commands)]


def _pilot(
    result: PilotResult, verdict: ArmVerdict, outcome: ArmOutcome, commands: Commands
) -> Stage:
    watch = [
        f"Alerts of {verdict.arm}: {alerts(outcome)}.",
        f"FFN share: {formatting.percent(outcome.ffn_share.mean)} in the last quarter.",
    ]
    go_on = [f"{verdict.arm} pays, or may pay, at the pilot's scale. Found: {verdict.at_pilot}."]
    if verdict.at_target is not None:
        go_on = [
            f"{verdict.arm} pays, or may pay, at the target, about which you decide. Found: "
            f"{verdict.at_target}; at the pilot's scale {verdict.at_pilot}."
        ]
    go_back = [if_it_does_not(result)]
    if verdict.at_pilot == "undecided":
        go_back.append(if_undecided(result, verdict))
    return Stage(
        title="1. Pilot",
        state=_state(result, verdict),
        aim="Does MoE++ pay on this data at a scale that costs little?",
        commands=commands.pilot(),
        watch=watch,
        go_on=go_on,
        go_back=go_back,
    )


def _state(result: PilotResult, verdict: ArmVerdict) -> str:
    if result.is_open:
        return _UNDECIDED
    if result.recommended is None:
        return "ends here"
    if verdict.at_pilot == "undecided" and verdict.at_target != "pays":
        return _UNDECIDED
    return _DONE


def _node(
    result: PilotResult, verdict: ArmVerdict, outcome: ArmOutcome, commands: Commands
) -> Stage:
    ratio = outcome.time_ratio.mean if outcome.time_ratio is not None else None
    return Stage(
        title="2. One node",
        state="next" if _state(result, verdict) == _DONE else "later",
        aim="Do loss and routing stay as in the pilot, and is MoE++ faster on the real GPUs?",
        commands=commands.node(),
        watch=[
            curve_points(outcome),
            "The table below, in `moepp monitor` and in the run's `report.html`.",
            "`runs/node/alerts.jsonl`: with `routing_guard.dry_run` the guard only tells.",
        ],
        go_on=[
            speed_condition(
                verdict.token_factor, '`moepp scale` (the column "of vanilla\'s time")'
            ),
            loss_condition(outcome),
            share_condition(outcome),
            "No critical alert.",
        ],
        go_back=[
            "The step takes longer than that: no loss can make up for it. Look where the time goes "
            "(`moepp profile runs/node`) before anything larger.",
            behind_condition(result, ratio),
            guard_condition(outcome),
        ],
    )


def _cluster(result: PilotResult, verdict: ArmVerdict, commands: Commands) -> Stage:
    target = result.target
    model = target.model_of(verdict.arm) if target is not None else None
    watch = ["The same metrics; their ranges are those of stage 2 now."]
    go_on = [speed_condition(verdict.token_factor, "`scaling.html` on the nodes of the run")]
    ratio = None
    if target is not None and model is not None and model.fits:
        ratio = model.time_ratio
        watch += promised(target, model)
        go_on += room(verdict, model)
    go_on.append(
        "The routing guard has raised no false alarm in its dry run: then leave `dry_run` out."
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
            behind_condition(result, ratio),
            "A critical alert that comes back after the guard has acted.",
        ],
    )
