"""Tables of the pilot's page, as text in cells."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.planning.pilot.result import (
    ArmOutcome,
    EqualSpeed,
    PilotResult,
    TargetModel,
    Verdict,
)
from moepp_megatron.report import formatting
from moepp_megatron.report.pilot import words


@dataclass(frozen=True)
class Cell:
    """A number and what stands small beneath it.

    Attributes:
        value: The number.
        note: Its interval, or nothing.
        is_text: It is no number, so it may be broken into lines.
    """

    value: str
    note: str = ""
    is_text: bool = False


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        name: Its heading.
        note: Small, beneath the heading.
        cells: In the order of the table's columns.
        strong: The recommended arm's.
    """

    name: str
    note: str
    cells: list[Cell]
    strong: bool = False


ARM_COLUMNS = (
    "Validation loss",
    "Difference to vanilla",
    "Step",
    "Of vanilla's time",
    "Tokens/s",
    "FFN share",
    "All-to-all, MB a step",
    "Energy a token",
    "Alerts",
)


def arm_rows(result: PilotResult) -> list[Row]:
    """All arms in the order of the pilot."""
    return [
        Row(each.arm.name, _about(each), _arm_cells(each), each.arm.name == result.recommended)
        for each in result.arms
    ]


def _about(outcome: ArmOutcome) -> str:
    count = len(outcome.seeds)
    return f"top-{outcome.arm.topk}, {outcome.arm.steps:,} steps, {seeds(count)}"


def seeds(count: int) -> str:
    """Such as `3 seeds`."""
    return "1 seed" if count == 1 else f"{count} seeds"


def _arm_cells(outcome: ArmOutcome) -> list[Cell]:
    difference, time_ratio = outcome.loss_difference, outcome.time_ratio
    used = outcome.energy_per_token_j
    return [
        Cell(words.loss(outcome.valid_loss.mean), words.ends(outcome.valid_loss, words.loss)),
        Cell(words.NOTHING)
        if difference is None
        else Cell(words.signed(difference.mean), words.ends(difference, words.signed)),
        Cell(words.seconds(outcome.step_time_s.mean)),
        Cell(words.NOTHING)
        if time_ratio is None
        else Cell(words.ratio(time_ratio.mean), words.ends(time_ratio, words.ratio)),
        Cell(formatting.count(outcome.tokens_per_s.mean)),
        Cell(formatting.percent(outcome.ffn_share.mean)),
        Cell(words.megabytes(outcome.a2a_bytes.mean)),
        Cell(words.NOT_MEASURED, is_text=True) if used is None else Cell(words.energy(used.mean)),
        Cell(alerts(outcome), is_text=True),
    ]


def alerts(outcome: ArmOutcome) -> str:
    """Such as `few_ffn_experts 2, dead_expert 1`, or `none`."""
    raised = sorted(outcome.alerts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{rule} {times}" for rule, times in raised if times) or "none"


@dataclass(frozen=True)
class VerdictRow:
    """One MoE++ arm's answer.

    Attributes:
        verdict: As computed.
        factor: Tokens to vanilla's loss over vanilla's.
        pilot: Time to equal loss at the pilot's scale.
        target: The same at the target; None without one.
        strong: The recommended arm.
    """

    verdict: Verdict
    factor: Cell
    pilot: Cell
    target: Cell | None
    strong: bool


def verdict_rows(result: PilotResult) -> list[VerdictRow]:
    """Of every MoE++ arm, the most favourable first."""
    rows = []
    for each in result.verdicts:
        factor, here, there = each.token_factor, each.time_to_loss, each.target_time_to_loss
        rows.append(
            VerdictRow(
                verdict=each,
                factor=Cell(words.ratio(factor.mean), words.ends(factor, words.ratio)),
                pilot=Cell(words.ratio(here.mean), words.ends(here, words.ratio)),
                target=None
                if there is None
                else Cell(words.ratio(there.mean), words.ends(there, words.ratio)),
                strong=each.arm == result.recommended,
            )
        )
    return rows


@dataclass(frozen=True)
class SpeedRow:
    """A MoE++ arm against what is as fast.

    Attributes:
        arm: Its name.
        rival: The vanilla arms, in words.
        difference: MoE++ minus rival, nats.
        text: What it means.
    """

    arm: str
    rival: str
    difference: Cell
    text: str


def speed_rows(result: PilotResult) -> list[SpeedRow]:
    """Of every MoE++ arm that was compared."""
    return [
        SpeedRow(
            each.arm,
            _rival(each),
            Cell(
                words.signed(each.loss_difference.mean),
                words.ends(each.loss_difference, words.signed),
            ),
            _meaning(each),
        )
        for each in result.equal_speed
    ]


def _rival(row: EqualSpeed) -> str:
    if row.slower == row.faster:
        return row.slower
    parts = ((row.weight, row.slower), (1 - row.weight, row.faster))
    return " and ".join(f"{share:.0%} {name}" for share, name in parts)


def _meaning(row: EqualSpeed) -> str:
    difference = row.loss_difference
    better = difference.mean < 0
    size = words.loss(abs(difference.mean))
    text = (
        f"At the same speed {row.arm} is {size} nats {'better' if better else 'worse'} than "
        "vanilla with fewer experts"
    )
    if difference.low is None or difference.high is None:
        text += "; with one seed nobody knows how sure that is."
    elif difference.low <= 0 <= difference.high:
        text += ", which these seeds cannot tell from no difference."
    else:
        text += ", and the interval leaves no doubt about the sign."
    if not row.enclosed:
        text += (
            " No pair of vanilla arms encloses its step time in every seed: where none does, the "
            "nearest stands in, so part of the difference is speed."
        )
    return text


def target_columns(result: PilotResult) -> list[str]:
    """Headings; money only where there is a price."""
    names = ["Layout", "Step", "Of vanilla's time", "Tokens/s/GPU"]
    names += ["All-to-all, GB a step", "Hours"]
    if result.target is not None and result.target.price_per_hour is not None:
        names.append("Cost")
    return [*names, "Hours to vanilla's loss"] + (["Cost to it"] if "Cost" in names else [])


def target_rows(result: PilotResult) -> list[Row]:
    """Models at the target; empty without one."""
    if result.target is None:
        return []
    vanilla_name = result.arms[0].arm.name if result.arms else None
    vanilla = next((m for m in result.target.models if m.arm == vanilla_name), None)
    width = len(target_columns(result))
    rows = []
    for model in result.target.models:
        cells = [Cell(model.layout), *_target_cells(result, model, vanilla)]
        if not model.fits:
            cells = [Cell(model.layout), *[Cell(words.NOTHING)] * (width - 1)]
        note = "" if model.fits else "does not fit the cards"
        rows.append(Row(model.arm, note, cells, model.arm == result.recommended))
    return rows


def _target_cells(
    result: PilotResult, model: TargetModel, vanilla: TargetModel | None
) -> list[Cell]:
    def show(value: float | None, digits: int = 0) -> Cell:
        return Cell(words.NOTHING if value is None else formatting.number(value, digits))

    cells = [
        Cell(words.NOTHING if model.step_time_s is None else words.seconds(model.step_time_s)),
        show(model.time_ratio, 3),
        show(model.tokens_per_s_per_gpu),
        show(None if model.a2a_bytes is None else model.a2a_bytes / 1e9, 1),
        show(model.hours, 1 if model.hours is not None and model.hours < 100 else 0),
    ]
    priced = "Cost" in target_columns(result)
    if priced:
        cells.append(show(model.money))
    cells.append(_to_loss(result, model, None if vanilla is None else vanilla.hours))
    if priced:
        cells.append(_to_loss(result, model, None if vanilla is None else vanilla.money))
    return cells


def _to_loss(result: PilotResult, model: TargetModel, vanilla: float | None) -> Cell:
    """Vanilla's hours or money times the arm's time to equal loss."""
    if vanilla is None:
        return Cell(words.NOTHING)

    def show(factor: float) -> str:
        value = vanilla * factor
        return formatting.number(value, 1 if value < 100 else 0)

    if result.arms and model.arm == result.arms[0].arm.name:
        return Cell(show(1.0))
    found = next((v.target_time_to_loss for v in result.verdicts if v.arm == model.arm), None)
    if found is None:
        return Cell(words.NOTHING)
    return Cell(show(found.mean), words.ends(found, show))
