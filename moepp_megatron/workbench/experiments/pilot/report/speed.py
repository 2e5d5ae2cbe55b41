"""The plot of loss over step time, in which vanilla of less compute is the fair baseline."""

from __future__ import annotations

import math

from matplotlib.axes import Axes

from moepp_megatron.workbench.experiments.pilot.report import numbers
from moepp_megatron.workbench.experiments.pilot.report.labels import place_labels
from moepp_megatron.workbench.experiments.pilot.report.looks import Look, looks
from moepp_megatron.workbench.experiments.pilot.result import ArmOutcome, Interval, PilotResult
from moepp_megatron.workbench.report.drawing import (
    PAPER,
    VERMILION,
    new_figure,
    plain,
    svg_data_uri,
)
from moepp_megatron.workbench.report.plot import Plot


def speed_plot(result: PilotResult) -> Plot:
    """Validation loss over step time: vanilla arms joined, MoE++ arms beside them."""
    title = "Loss against speed: is MoE++ better than a vanilla model that is as fast?"
    shown = [each for each in result.arms if _is_finite(each)]
    if not shown:
        return Plot(title, "", None, "No arm has a finite loss.", wide=True)
    figure = new_figure(width=10.5, height=4.1)
    axes = figure.subplots()
    base = result.baseline
    line = sorted(
        (each for each in shown if each.arm.kind in ("vanilla", "narrow")),
        key=lambda each: each.step_time_s.mean,
    )
    x, y = [_milliseconds(each) for each in line], [each.valid_loss.mean for each in line]
    axes.plot(x, y, color=VERMILION, linewidth=1.4, linestyle="--", zorder=2)
    styles = looks(result.arms)
    inside = [each for each in shown if each.arm.kind != "short"]
    bars = [_point(axes, each, base, styles[each.arm.name]) for each in inside]
    axes.margins(x=0.16, y=0.16)
    for each in shown:
        if each.arm.kind == "short":
            _short(axes, each, styles[each.arm.name])
    axes.set_xlabel("step time, ms (left is faster)")
    axes.set_ylabel("validation loss, nats (lower is better)")
    place_labels(
        axes,
        [(_milliseconds(each), each.valid_loss.mean) for each in inside],
        [plain(each.arm.name) for each in inside],
        [bar for pair in bars for bar in pair],
    )
    caption = (
        "Dashed: vanilla, and vanilla narrowed to MoE++'s compute, the fair baseline. A MoE++ "
        "point below the line is better than vanilla at its speed; the star is MoE++ after "
        "vanilla's time. Bars: 95% intervals of the difference to vanilla and of the speed."
    )
    if any(each.arm.kind == "short" for each in shown):
        caption += " Grey: vanilla with fewer tokens, which tells what tokens are worth."
    return Plot(title, caption, svg_data_uri(figure), _speed_alt(shown), wide=True)


def _is_finite(outcome: ArmOutcome) -> bool:
    return math.isfinite(outcome.valid_loss.mean) and math.isfinite(outcome.step_time_s.mean)


def _milliseconds(outcome: ArmOutcome) -> float:
    return outcome.step_time_s.mean * 1e3


Bar = tuple[tuple[float, float], tuple[float, float]]


def _point(axes: Axes, outcome: ArmOutcome, base: ArmOutcome | None, look: Look) -> list[Bar]:
    """Draw an arm with its intervals and return these, as pairs of ends."""
    x, y = _milliseconds(outcome), outcome.valid_loss.mean
    scale = base.step_time_s.mean * 1e3 if base is not None else math.nan
    upright, level = _reach(outcome.loss_difference, 1.0), _reach(outcome.time_ratio, scale)
    axes.errorbar(
        [x],
        [y],
        xerr=None if level is None else [[level[0]], [level[1]]],
        yerr=None if upright is None else [[upright[0]], [upright[1]]],
        fmt=look.marker,
        color=look.colour,
        markersize=7.5,
        elinewidth=1.4,
        capsize=3,
        zorder=3,
    )
    bars: list[Bar] = []
    if level is not None:
        bars.append(((x - level[0], y), (x + level[1], y)))
    if upright is not None:
        bars.append(((x, y - upright[0]), (x, y + upright[1])))
    return bars


def _short(axes: Axes, outcome: ArmOutcome, look: Look) -> None:
    """Vanilla with fewer tokens, at the upper edge where it is far above the others."""
    low, high = axes.get_ylim()
    value = outcome.valid_loss.mean
    above = value > high + 0.3 * (high - low)
    if not above:
        high = max(high, value + 0.08 * (high - low))
    axes.set_ylim(low, high)
    x, y = _milliseconds(outcome), high if above else value
    axes.plot(
        [x],
        [y],
        "^" if above else look.marker,
        color=look.colour,
        markerfacecolor=PAPER,
        markersize=7.5,
        clip_on=False,
        zorder=3,
    )
    text = f"{plain(outcome.arm.name)}: {numbers.loss(value)}" + (" (above)" if above else "")
    axes.annotate(
        text,
        (x, y),
        (-10, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        color=look.colour,
        fontsize=9,
    )


def _reach(interval: Interval | None, scale: float) -> tuple[float, float] | None:
    """Lengths of the interval to both sides of the mean, times `scale`."""
    if interval is None or interval.low is None or interval.high is None:
        return None
    reach = (interval.mean - interval.low) * scale, (interval.high - interval.mean) * scale
    return reach if all(math.isfinite(one) and one >= 0 for one in reach) else None


def _speed_alt(shown: list[ArmOutcome]) -> str:
    return (
        "; ".join(
            f"{each.arm.name}: {numbers.loss(each.valid_loss.mean)} nats at "
            f"{numbers.seconds(each.step_time_s.mean)} a step"
            for each in shown
        )
        + "."
    )
