"""Plots of the pilot's page over step time and over training."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from moepp_megatron.planning.pilot.result import ArmOutcome, Curve, Interval, PilotResult
from moepp_megatron.report.drawing import (
    INK,
    VERMILION,
    new_figure,
    smooth,
    svg_data_uri,
    thin,
)
from moepp_megatron.report.pilot import words
from moepp_megatron.report.pilot.labels import place_labels
from moepp_megatron.report.pilot.looks import Look, looks, plain
from moepp_megatron.report.plot import Plot

# The start of training is the same fall for all; what is compared comes later.
_SHOWN_FROM = 0.2


def speed_plot(result: PilotResult) -> Plot:
    """Validation loss over step time: vanilla arms joined, MoE++ arms beside them."""
    title = "Loss against speed: is MoE++ better than a vanilla model that is as fast?"
    shown = [each for each in result.arms if _is_finite(each)]
    if not shown:
        return Plot(title, "", None, "No arm has a finite loss.", wide=True)
    figure = new_figure(width=10.5, height=4.1)
    axes = figure.subplots()
    base = words.baseline(result)
    line = sorted(
        (each for each in shown if each.arm.kind in ("vanilla", "rival")),
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
        "Dashed: vanilla with as many experts a token as measured, the fair rival. A MoE++ point "
        "below the line is better than vanilla at its speed. Bars: 95% intervals of the difference "
        "and of the ratio to vanilla with the same seed; vanilla has none."
    )
    if len(line) < 2:
        caption = (
            "No vanilla model with fewer experts was trained, so there is no line to compare with. "
            "Bars: 95% intervals of the difference and of the ratio to vanilla with the same seed."
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
    """Draws an arm with its intervals and returns these, as pairs of ends."""
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
        markerfacecolor="white",
        markersize=7.5,
        clip_on=False,
        zorder=3,
    )
    text = f"{plain(outcome.arm.name)}: {words.loss(value)}" + (" (above)" if above else "")
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
    """To either side of the mean, times `scale`."""
    if interval is None or interval.low is None or interval.high is None:
        return None
    reach = (interval.mean - interval.low) * scale, (interval.high - interval.mean) * scale
    return reach if all(math.isfinite(one) and one >= 0 for one in reach) else None


def _speed_alt(shown: list[ArmOutcome]) -> str:
    return (
        "; ".join(
            f"{each.arm.name}: {words.loss(each.valid_loss.mean)} nats at "
            f"{words.seconds(each.step_time_s.mean)} a step"
            for each in shown
        )
        + "."
    )


def curve_plots(result: PilotResult) -> list[Plot]:
    """Training loss over tokens, and its difference to vanilla's."""
    drawn = [each for each in result.arms if _usable(each.curve)]
    if not drawn:
        return [Plot("Training loss", "", None, "No arm has a curve: it needs two records.")]
    styles = looks(result.arms)
    plots = [_loss_plot(drawn, styles)]
    base = words.baseline(result)
    others = [each for each in drawn if each.arm.kind in ("moepp", "rival")]
    if base is not None and _usable(base.curve) and others:
        plots.append(_difference_plot(base, others, styles))
    return plots


def _usable(curve: Curve) -> bool:
    return len(curve.tokens) >= 2 and len(curve.tokens) == len(curve.loss)


def _loss_plot(drawn: list[ArmOutcome], styles: dict[str, Look]) -> Plot:
    axes = _token_axes()
    shown = []
    for each in drawn:
        tokens, values = smooth_curve(each.curve)
        look = styles[each.arm.name]
        name = plain(each.arm.name)
        axes.plot(tokens, values, color=look.colour, linestyle=look.dashes, label=name)
        shown += [v for t, v in zip(tokens, values, strict=True) if t >= _SHOWN_FROM * tokens[-1]]
    finite = [value for value in shown if math.isfinite(value)]
    if finite and min(finite) < max(finite):
        margin = 0.05 * (max(finite) - min(finite))
        axes.set_ylim(min(finite) - margin, max(finite) + margin)
    axes.set_ylabel("training loss, nats")
    axes.legend(fontsize=8.5)
    alt = "; ".join(
        f"{e.arm.name} ends at {words.loss(smooth_curve(e.curve)[1][-1])}" for e in drawn
    )
    caption = "Mean over seeds, smoothed. The first fifth is cut off where it is higher."
    return Plot("Learning curves", caption, _image(axes), alt + ".")


def _difference_plot(base: ArmOutcome, others: list[ArmOutcome], styles: dict[str, Look]) -> Plot:
    axes = _token_axes()
    axes.axhline(0, color=INK, linewidth=1.4, label=plain(base.arm.name))
    x, reference = smooth_curve(base.curve)
    last, heights = [], []
    for each in others:
        tokens, values = smooth_curve(each.curve)
        kept = (tokens >= _SHOWN_FROM * x[-1]) & (tokens >= x[0]) & (tokens <= x[-1])
        gap = values[kept] - np.interp(tokens[kept], x, reference)
        if not len(gap):
            continue
        look = styles[each.arm.name]
        name = plain(each.arm.name)
        axes.plot(tokens[kept], gap, color=look.colour, linestyle=look.dashes, label=name)
        heights += [abs(one) for one in gap if math.isfinite(one)]
        last.append(f"{each.arm.name} ends {words.signed(float(gap[-1]))}")
    if heights and max(heights):
        axes.set_ylim(-1.15 * max(heights), 1.15 * max(heights))
    axes.set_ylabel("nats (below 0: better)")
    axes.legend(fontsize=8.5, ncols=2)
    caption = (
        "Training loss less vanilla's after the same tokens. A line that still moves at the end "
        "says that a longer pilot would give another answer."
    )
    title = "Learning curves, less vanilla's"
    return Plot(title, caption, _image(axes), ("; ".join(last) or "nothing to compare") + " nats.")


def _token_axes() -> Axes:
    axes = new_figure(width=5.7, height=3.3).subplots()
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens")
    return axes


def _image(axes: Axes) -> str:
    figure = axes.get_figure(root=True)
    assert figure is not None, "made with its figure"
    return svg_data_uri(figure)


def smooth_curve(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and loss, thinned, its noise taken out: a moving mean over a fiftieth."""
    tokens, values = thin(curve.tokens, curve.loss)
    return tokens, smooth(values) if len(values) >= 12 else values
