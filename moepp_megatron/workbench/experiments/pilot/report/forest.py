"""The plot that says how sure the answer is: time to equal loss with its intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from moepp_megatron.workbench.experiments.pilot.report import numbers
from moepp_megatron.workbench.experiments.pilot.result import Interval, PilotResult
from moepp_megatron.workbench.report.drawing import (
    BLUE,
    INK,
    MUTED,
    PAPER,
    VERMILION,
    new_figure,
    plain,
    svg_data_uri,
)
from moepp_megatron.workbench.report.plot import Plot

# Beyond these an interval becomes an arrow: two seeds can give one that covers decades.
_FARTHEST = (0.4, 2.5)
_TITLE = "Time until MoE++ has vanilla's loss, in units of vanilla's time"


class Line(NamedTuple):
    """One interval.

    Attributes:
        arm: Name.
        place: "pilot" or "target".
        value: Time to equal loss.
        first: First line of its arm.
    """

    arm: str
    place: str
    value: Interval
    first: bool


_PLACES = {"pilot": (BLUE, "o"), "target": (VERMILION, "D")}


def forest_plot(result: PilotResult) -> Plot:
    """A line for each MoE++ arm and scale."""
    lines = [line for line in _lines(result) if math.isfinite(line.value.mean)]
    if not lines:
        return Plot(_TITLE, "", None, _nothing(result), wide=True)
    figure = new_figure(width=10.5, height=1.25 + 0.42 * len(lines))
    axes = figure.subplots()
    low, high = _limits(lines)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(len(lines) - 0.4, -1.1)
    axes.axvspan(low, 1, color=BLUE, alpha=0.05, linewidth=0)
    axes.axvline(1, color=INK, linewidth=1.4)
    _heads(axes)
    for row, line in enumerate(lines):
        _draw(axes, row, line, low, high)
    axes.set_yticks(range(len(lines)), [_label(line) for line in lines])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("time to equal loss / vanilla's time (logarithmic)")
    return Plot(_TITLE, _caption(lines), svg_data_uri(figure), _alt(lines), wide=True)


def _lines(result: PilotResult) -> Iterator[Line]:
    for verdict in result.verdicts:
        if verdict.time_to_loss is not None:
            yield Line(verdict.arm, "pilot", verdict.time_to_loss, True)
        if verdict.target_time_to_loss is not None:
            yield Line(verdict.arm, "target", verdict.target_time_to_loss, False)


def _nothing(result: PilotResult) -> str:
    if not result.verdicts:
        return "No MoE++ arm has finished."
    return (
        "Nothing to show: fewer steps have not clearly cost vanilla loss, so nobody can say what "
        "tokens are worth, and a loss difference cannot be turned into time. A longer pilot, or "
        "more seeds, can tell."
    )


def _limits(lines: list[Line]) -> tuple[float, float]:
    """The limits of the plot: around 1, all means, and intervals as far as the plot goes."""
    means = [line.value.mean for line in lines]
    tips = [
        min(max(tip, _FARTHEST[0]), _FARTHEST[1])
        for line in lines
        for tip in (line.value.low, line.value.high)
        if tip is not None and not math.isnan(tip)
    ]
    low = max(min([0.95, *means, *tips]), 1e-3)
    high = max([1.05, *means, *tips])
    return low / 1.04, high * 1.04


def _heads(axes: Axes) -> None:
    for offset, side, text in (
        (-14, "right", "MoE++ is there sooner"),
        (14, "left", "vanilla is there sooner"),
    ):
        axes.annotate(
            text,
            (1, -0.75),
            xytext=(offset, 0),
            textcoords="offset points",
            ha=side,
            va="center",
            color=MUTED,
            fontsize=8.5,
        )
    axes.annotate(
        "same as vanilla",
        (1, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=INK,
        fontsize=9,
        fontweight="bold",
    )


def _draw(axes: Axes, row: int, line: Line, low: float, high: float) -> None:
    colour, marker = _PLACES[line.place]
    start, end = line.value.low, line.value.high
    if start is not None and end is not None:
        axes.hlines(row, max(start, low), min(end, high), color=colour, linewidth=2.6)
        for tip, edge, shape in ((start, low, "<"), (end, high, ">")):
            if tip < low or tip > high:
                axes.plot([edge], [row], shape, color=colour, markersize=8, clip_on=False)
            else:
                axes.plot([tip], [row], "|", color=colour, markersize=9, markeredgewidth=1.8)
    axes.plot(
        [line.value.mean],
        [row],
        marker,
        markersize=8,
        color=colour if numbers.has_ends(line.value) else PAPER,
        markeredgecolor=colour,
        markeredgewidth=1.8,
    )
    axes.annotate(
        _numbers(line),
        (1, row),
        xycoords=("axes fraction", "data"),
        xytext=(10, 0),
        textcoords="offset points",
        va="center",
        color=INK,
        fontsize=9,
    )


def _label(line: Line) -> str:
    place = "at the pilot's scale" if line.place == "pilot" else "at the target"
    return f"{plain(line.arm)}, {place}" if line.first else place


def _numbers(line: Line) -> str:
    text = numbers.with_ends(line.value, numbers.ratio)
    return text if numbers.has_ends(line.value) else f"{text}, one seed"


def _caption(lines: list[Line]) -> str:
    text = (
        "What the loss after vanilla's time is worth in time, by vanilla's runs with fewer steps. "
        "Left of the line MoE++ is there sooner. Bars: 95% intervals; a bar that crosses the line "
        "cannot tell."
    )
    if any(line.place == "target" for line in lines):
        text += (
            " At the target the speed is the cost model's, and its own error is in the bar; the "
            "tokens are still the pilot's."
        )
    if any(not numbers.has_ends(line.value) for line in lines):
        text += " Hollow: a single seed, so nobody knows how sure it is."
    return text


def _alt(lines: list[Line]) -> str:
    each = (
        f"{line.arm} {'at the target' if line.place == 'target' else 'in the pilot'} "
        f"{_numbers(line)}"
        for line in lines
    )
    return "Time to equal loss over vanilla's: " + "; ".join(each) + "."
