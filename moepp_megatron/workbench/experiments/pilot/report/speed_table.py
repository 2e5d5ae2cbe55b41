"""Compares MoE++ with vanilla models that are as fast, in words."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.workbench.experiments.pilot.report import words
from moepp_megatron.workbench.experiments.pilot.report.tables import Cell
from moepp_megatron.workbench.experiments.pilot.result import EqualSpeed, PilotResult


@dataclass(frozen=True)
class SpeedRow:
    """A MoE++ arm against an equally fast vanilla model.

    Attributes:
        arm: Its name.
        rival: The vanilla arms, in words.
        difference: MoE++ minus baseline, nats.
        text: What it means.
    """

    arm: str
    rival: str
    difference: Cell
    text: str


def speed_rows(result: PilotResult) -> list[SpeedRow]:
    """Rows of every MoE++ arm that was compared."""
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
    beside = "At the same speed" if row.slower != row.faster else f"Beside {row.slower}"
    rival = "vanilla with fewer experts" if row.slower != row.faster else "it"
    text = f"{beside} {row.arm} is {size} nats {'better' if better else 'worse'} than {rival}"
    if difference.low is None or difference.high is None:
        text += "; with one seed nobody knows how sure that is."
    elif difference.low <= 0 <= difference.high:
        text += ", which these seeds cannot tell from no difference."
    else:
        text += ", and the interval leaves no doubt about the sign."
    if row.slower == row.faster:
        text += " No vanilla arm is as fast; it is the nearest, so part of the difference is speed."
    elif not row.enclosed:
        text += (
            " In some seed its step time is outside of both, and the nearer one stands in: part of "
            "the difference is speed."
        )
    return text
