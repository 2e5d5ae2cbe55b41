"""The plot of lines that most curves of the pages are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, PercentFormatter

from moepp_megatron.observe.alerts import Alert
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.alerts import mark_alerts
from moepp_megatron.tools.report.blocks import Plot
from moepp_megatron.tools.report.drawing import (
    BLUE,
    draw_healthy,
    draw_level,
    draw_noisy,
    envelope,
    legend_above,
    new_figure,
    plain,
    smooth,
    step_axis,
    svg_data_uri,
    thin,
)
from moepp_megatron.tools.report.series import Series

Dashes = str | tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class PlotLine:
    """One line.

    Attributes:
        marker: A marker for each point, of numbers that few records have; then one is enough.
        raw: Whether its values have no noise to smooth.
        band: The least and the greatest of what the values are means of, [n] each.
    """

    label: str
    points: Series
    colour: str = BLUE
    dashes: Dashes = "-"
    marker: str = ""
    raw: bool = False
    band: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Frame:
    """Frame of a plot's lines.

    Attributes:
        axis: Label of the vertical axis.
        show: How values are written.
        x: Label of the horizontal axis; empty for steps.
        bottom: Lowest value of the vertical axis; None for that of the lines.
        levels: Horizontal lines to compare with: name and height.
        healthy: The range of a healthy run.
        wide: Whether it takes the whole width of the page.
        height: Of the picture, inches.
        change: Called with the axes at the end, for what no other field says.
    """

    axis: str
    show: Callable[[float], str] = formatting.number
    x: str = ""
    bottom: float | None = None
    top: float | None = None
    levels: Sequence[tuple[str, float]] = ()
    healthy: tuple[float, float] | None = None
    alerts: Sequence[Alert] = ()
    wide: bool = False
    height: float = 3.1
    change: Callable[[Axes], object] | None = None


def line_plot(title: str, caption: str, lines: Sequence[PlotLine], frame: Frame) -> Plot:
    """A plot of the lines that have enough points; a sentence where none has."""
    drawn = [line for line in lines if len(line.points.x) >= (1 if line.marker else 2)]
    if not drawn or (all(x.marker for x in drawn) and not all(x.marker for x in lines)):
        return Plot(title, caption, None, _too_few(title, lines, frame), wide=frame.wide)
    axes = new_figure(13.2 if frame.wide else 6.4, frame.height).subplots()
    for line in drawn:
        _draw(axes, line)
    draw_healthy(axes, frame.healthy)
    for level in frame.levels:
        draw_level(axes, level)
    mark_alerts(axes, frame.alerts, drawn[0].points.x)
    axes.set_ylabel(frame.axis)
    if frame.show is formatting.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    axes.set_ylim(frame.bottom, frame.top)
    if frame.x:
        axes.set_xlabel(frame.x)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    else:
        step_axis(axes)
    if frame.change is not None:
        frame.change(axes)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        legend_above(axes, ncols=4 if frame.wide else 3)
    figure = axes.get_figure(root=True)
    assert figure is not None, "made with its figure"
    words = "; ".join(_words(line, frame) for line in drawn)
    return Plot(title, caption, svg_data_uri(figure), f"{title}: {words}.", wide=frame.wide)


def _draw(axes: Axes, line: PlotLine) -> None:
    x, y = envelope(*line.points)
    label = plain(line.label)
    if line.band is not None:
        (x, low), (_, high) = (
            thin(line.points.x, edge, extreme)
            for edge, extreme in zip(line.band, (np.minimum, np.maximum), strict=True)
        )
        axes.fill_between(x, low, high, color=line.colour, alpha=0.15, linewidth=0)
        y = thin(*line.points)[1]
        axes.plot(x, smooth(y) if len(y) >= 60 else y, color=line.colour, label=label)
    elif line.marker:
        axes.plot(x, y, color=line.colour, marker=line.marker, markersize=4.5, label=label)
    elif line.raw:
        axes.plot(x, y, color=line.colour, linestyle=line.dashes, linewidth=1.5, label=label)
    else:
        draw_noisy(axes, *line.points, line.colour, label, line.dashes)


def _words(line: PlotLine, frame: Frame) -> str:
    x, y = line.points
    show = frame.show
    at = (lambda place: "") if frame.x else (lambda place: f" at step {x[place]:.0f}")
    if line.band is not None:
        low, high = (show(float(edge[-1])) for edge in line.band)
        return f"{line.label} {show(float(y[-1]))}{at(-1)}, layers from {low} to {high}"
    if len(x) == 1:
        return f"{line.label}: {show(float(y[0]))}{at(0)}"
    ends = (
        f"{line.label}: {show(float(y[0]))}{at(0)}, {show(float(y[-1]))}{at(-1) or ' at the end'}"
    )
    return f"{ends}, between {show(float(np.min(y)))} and {show(float(np.max(y)))}"


def _too_few(title: str, lines: Sequence[PlotLine], frame: Frame) -> str:
    if lines and len(lines[0].points.y):
        shown = frame.show(float(lines[0].points.y[0]))
        return f"Only one record has a finite value ({title} {shown}); a curve needs two."
    return f"No record of this run has a finite {title.lower()}."
