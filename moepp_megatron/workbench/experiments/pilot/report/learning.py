"""Plots of training loss over tokens, and of its difference to vanilla's, for the pilot's page."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from moepp_megatron.workbench.experiments.pilot.report import numbers
from moepp_megatron.workbench.experiments.pilot.report.looks import Look, looks
from moepp_megatron.workbench.experiments.pilot.result import ArmOutcome, Curve, PilotResult
from moepp_megatron.workbench.report.drawing import (
    INK,
    legend_above,
    new_figure,
    plain,
    smooth,
    svg_data_uri,
    thin,
)
from moepp_megatron.workbench.report.plot import Plot

# The start of training is the same fall for all; what is compared comes later.
_SHOWN_FROM = 0.2


def curve_plots(result: PilotResult) -> list[Plot]:
    """Training loss over tokens, and its difference to vanilla's."""
    drawn = [each for each in result.arms if _usable(each.curve)]
    if not drawn:
        return [Plot("Training loss", "", None, "No arm has a curve: it needs two records.")]
    styles = looks(result.arms)
    plots = [_loss_plot(drawn, styles)]
    base = result.baseline
    others = [each for each in drawn if each.arm.kind in ("moepp", "more", "narrow")]
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
    legend_above(axes, ncols=2)
    alt = "; ".join(
        f"{e.arm.name} ends at {numbers.loss(smooth_curve(e.curve)[1][-1])}" for e in drawn
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
        gap = _trend(values[kept] - np.interp(tokens[kept], x, reference))
        if not len(gap):
            continue
        look = styles[each.arm.name]
        name = plain(each.arm.name)
        axes.plot(tokens[kept], gap, color=look.colour, linestyle=look.dashes, label=name)
        heights += [abs(one) for one in gap if math.isfinite(one)]
        last.append(f"{each.arm.name} ends {numbers.signed(float(gap[-1]))}")
    if heights and max(heights):
        axes.set_ylim(-1.15 * max(heights), 1.15 * max(heights))
    axes.set_ylabel("nats (below 0: better)")
    legend_above(axes, ncols=2)
    caption = (
        "Training loss less vanilla's after the same tokens, smoothed over a tenth. A line that "
        "still moves at the end says that a longer pilot would give another answer."
    )
    title = "Learning curves, less vanilla's"
    return Plot(title, caption, _image(axes), ("; ".join(last) or "nothing to compare") + " nats.")


def _trend(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over a tenth of the points: differences are small beside their noise."""
    return smooth(values, len(values) // 20) if len(values) else values


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
