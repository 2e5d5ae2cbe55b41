"""The answers, each in one word."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.workbench.experiments.pilot.report import words
from moepp_megatron.workbench.experiments.pilot.report.target_table import (
    target_columns,
    target_rows,
)
from moepp_megatron.workbench.experiments.pilot.result import Answer, PilotResult, Verdict


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
    verdict = words.chosen(result)
    at_pilot: Answer | None = verdict.at_pilot if verdict is not None else None
    at_target = verdict.at_target if verdict is not None else None
    here = there = ""
    if verdict is not None and verdict.time_to_loss is None:
        here = f"{verdict.arm}: what tokens are worth cannot be told."
    elif verdict is not None and verdict.time_to_loss is not None:
        here = f"{verdict.arm}: {words.with_ends(verdict.time_to_loss, words.ratio)}"
        here += " of vanilla's time to equal loss"
    if verdict is not None and verdict.target_time_to_loss is not None:
        there = f"{verdict.arm}: {words.with_ends(verdict.target_time_to_loss, words.ratio)}"
        there += " of vanilla's time to equal loss, by the cost model" + _cost(result, verdict.arm)
    else:
        there = _no_time(result, verdict)
    gpus = f" ({result.target.gpus:,} {result.target.gpu})" if result.target is not None else ""
    note = "The arm to go on with; the steps are below."
    if result.recommended is None:
        note = "No arm pays or may pay: nothing here argues for a larger run."
    if verdict is not None and words.is_open(result):
        note = f"{verdict.arm} is the most promising, and not proven. What would decide is below."
    return [
        Badge("At the pilot's scale", at_pilot or "no answer", words.answer_class(at_pilot), here),
        Badge(
            f"At the target{gpus}",
            at_target or "no answer",
            words.answer_class(at_target),
            there,
        ),
        Badge(
            "Recommended",
            words.recommendation(result),
            "none",
            note,
        ),
    ]


def _no_time(result: PilotResult, verdict: Verdict | None) -> str:
    """Why there is no time to equal loss at the target."""
    if result.target is None:
        return "No target was asked for: --gpus asks for one."
    if verdict is None:
        return ""
    models = result.target.models
    ratio = next((model.time_ratio for model in models if model.arm == verdict.arm), None)
    if ratio is None:
        return f"{verdict.arm}: it or vanilla does not fit the cards."
    return f"{verdict.arm}: a step takes {words.ratio(ratio)} of vanilla's; more cannot be told."


def _cost(result: PilotResult, arm: str) -> str:
    """Both models' cost to the same loss; hours without a price."""
    rows = {row.name: row.cells[-1] for row in target_rows(result)}
    base = words.baseline(result)
    if base is None or base.arm.name not in rows or arm not in rows:
        return ""
    vanilla, ours = rows[base.arm.name], rows[arm]
    if words.NOTHING in (vanilla.value, ours.value):
        return ""
    unit = "cost" if "Cost" in target_columns(result) else "hours"
    ends = f" ({ours.note})" if ours.note else ""
    return f"; {unit} to vanilla's loss {ours.value}{ends} against {vanilla.value}"
