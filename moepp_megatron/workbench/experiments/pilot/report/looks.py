"""The style of a pilot's arms in every plot of its page."""

from __future__ import annotations

from typing import NamedTuple

from moepp_megatron.workbench.experiments.pilot.result import Arm, ArmOutcome
from moepp_megatron.workbench.report.drawing import BLUE, GREEN, INK, MUTED, VERMILION

# Families of hues from Okabe and Ito's palette; within a family the dashes differ too, so that a
# print in grey can still be read.
_FAMILIES = {
    "vanilla": (INK,),
    "moepp": (BLUE, GREEN, "#56b4e9", "#004c77"),
    "more": ("#cc79a7",),
    "equal_time": (BLUE, GREEN, "#56b4e9", "#004c77"),
    "narrow": (VERMILION, "#e69f00"),
    "short": (MUTED,),
}
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1, 1.5)))
_MARKERS = {
    "vanilla": "s",
    "moepp": "o",
    "more": "^",
    "equal_time": "*",
    "narrow": "s",
    "short": "D",
}


class Look(NamedTuple):
    """The style of one arm.

    Attributes:
        colour: Colour of line and marker.
        dashes: Dashes of the line.
        marker: Marker of single points.
    """

    colour: str
    dashes: str | tuple[int, tuple[float, ...]]
    marker: str


def looks(arms: list[ArmOutcome]) -> dict[str, Look]:
    """Styles by the arms' names."""
    met: dict[str, int] = {}
    chosen = {}
    for arm in (outcome.arm for outcome in arms):
        number = met.get(arm.kind, 0)
        met[arm.kind] = number + 1
        chosen[arm.name] = _look(arm, number)
    return chosen


def _look(arm: Arm, number: int) -> Look:
    family = _FAMILIES[arm.kind]
    dashes = ":" if arm.kind in ("short", "equal_time") else _DASHES[number % len(_DASHES)]
    return Look(family[number % len(family)], dashes, _MARKERS[arm.kind])
