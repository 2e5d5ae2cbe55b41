"""The answers of a pilot, one word each, at the top of its page."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.workbench.experiments.pilot.report import numbers
from moepp_megatron.workbench.experiments.pilot.report.target_table import (
    target_columns,
    target_rows,
)
from moepp_megatron.workbench.experiments.pilot.result import Answer, ArmVerdict, PilotResult


@dataclass(frozen=True)
class Badge:
    """An answer, large.

    Attributes:
        label: Its subject.
        value: A word or a name.
        look: Class of the style sheet: pays, loses, open, none.
        note: The number behind it.
    """

    label: str
    value: str
    look: str
    note: str


def badges(result: PilotResult) -> list[Badge]:
    """Badges for the pilot's scale, for the target, and for the arm to continue with."""
    verdict = result.chosen
    at_pilot: Answer | None = verdict.at_pilot if verdict is not None else None
    at_target = verdict.at_target if verdict is not None else None
    here = there = ""
    if verdict is not None and verdict.time_to_loss is None:
        here = f"{verdict.arm}: what tokens are worth cannot be told."
    elif verdict is not None and verdict.time_to_loss is not None:
        here = f"{verdict.arm}: {numbers.with_ends(verdict.time_to_loss, numbers.ratio)}"
        here += " of vanilla's time to equal loss"
    if verdict is not None and verdict.target_time_to_loss is not None:
        there = f"{verdict.arm}: {numbers.with_ends(verdict.target_time_to_loss, numbers.ratio)}"
        there += " of vanilla's time to equal loss, by the cost model" + _cost(result, verdict.arm)
    else:
        there = _no_time(result, verdict)
    gpus = f" ({result.target.gpus:,} {result.target.gpu})" if result.target is not None else ""
    note = "The arm to go on with; the steps are below."
    if result.recommended is None:
        note = "No arm pays or may pay: nothing here argues for a larger run."
    if verdict is not None and result.is_open:
        note = f"{verdict.arm} is the most promising, and not proven. What would decide is below."
    return [
        Badge(
            "At the pilot's scale", at_pilot or "no answer", numbers.answer_class(at_pilot), here
        ),
        Badge(
            f"At the target{gpus}",
            at_target or "no answer",
            numbers.answer_class(at_target),
            there,
        ),
        Badge(
            "Recommended",
            numbers.recommendation(result),
            "none",
            note,
        ),
    ]


def _no_time(result: PilotResult, verdict: ArmVerdict | None) -> str:
    """Why there is no time to equal loss at the target."""
    if result.target is None:
        return "No target was asked for: --gpus asks for one."
    if verdict is None:
        return ""
    model = result.target.model_of(verdict.arm)
    if model is None or model.time_ratio is None:
        return f"{verdict.arm}: it or vanilla does not fit the GPUs."
    ratio = numbers.ratio(model.time_ratio)
    return f"{verdict.arm}: a step takes {ratio} of vanilla's; more cannot be told."


def _cost(result: PilotResult, arm: str) -> str:
    """Both models' cost to the same loss; hours without a price."""
    rows = {row.name: row.cells[-1] for row in target_rows(result)}
    base = result.baseline
    if base is None or base.arm.name not in rows or arm not in rows:
        return ""
    vanilla, ours = rows[base.arm.name], rows[arm]
    if numbers.NOTHING in (vanilla.value, ours.value):
        return ""
    unit = "cost" if "Cost" in target_columns(result) else "hours"
    ends = f" ({ours.note})" if ours.note else ""
    return f"; {unit} to vanilla's loss {ours.value}{ends} against {vanilla.value}"
