"""The plot of lines that most curves of the pages are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, PercentFormatter

from moepp_megatron.catalogue import METRICS
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.alerts import mark_alerts
from moepp_megatron.tools.report.blocks import Plot
from moepp_megatron.tools.report.drawing import (
    BLUE,
    GREEN,
    VERMILION,
    envelope,
    new_figure,
    plain,
    smooth,
    step_axis,
    svg_data_uri,
    thin,
)
from moepp_megatron.tools.report.series import Series

Dashes = str | tuple[int, tuple[float, ...]]
# Points from which a line is smoothed, and up to which each of them is marked.
_MANY, _FEW = 60, 12


@dataclass(frozen=True)
class PlotLine:
    """One line."""

    label: str
    points: Series
    colour: str = BLUE
    dashes: Dashes = "-"
    marker: str = ""  # for each point, of numbers that few records have; then one is enough
    raw: bool = False  # its values have no noise to smooth
    # The least and the greatest of what the values are means of, [n] each.
    band: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Frame:
    """Frame of a plot's lines."""

    axis: str  # label of the vertical axis
    show: Callable[[float], str] = formatting.number  # how values are written
    x: str = ""  # label of the horizontal axis; empty for steps
    bottom: float | None = None  # lowest value of the vertical axis; None for that of the lines
    top: float | None = None
    levels: Sequence[tuple[str, float]] = ()  # horizontal lines to compare with: name, height
    healthy: tuple[float, float] | None = None  # the range of a healthy run
    alerts: Sequence[Alert] = ()
    wide: bool = False  # takes the whole width of the page
    height: float = 3.1  # inches
    # Called with the axes at the end, for what no other field says.
    change: Callable[[Axes], object] | None = None


def healthy_range(name: str) -> tuple[float, float] | None:
    """The ends of a metric's range in a healthy run (docs/routing.md); None if unknown."""
    row = METRICS.get(name)
    if row is None or not row.healthy:
        return None
    low, high = row.healthy.split(" to ")
    return float(low), float(high)


def line_plot(title: str, caption: str, lines: Sequence[PlotLine], frame: Frame) -> Plot:
    """A plot of the lines that have enough points; a sentence where none has."""
    drawn = [line for line in lines if len(line.points.x) >= (1 if line.marker else 2)]
    if not drawn or (all(x.marker for x in drawn) and not all(x.marker for x in lines)):
        few = f"No two records of this run have a finite {title.lower()}."
        return Plot(title, caption, None, few, wide=frame.wide)
    figure = new_figure(13.2 if frame.wide else 6.4, frame.height)
    axes = figure.subplots()
    for line in drawn:
        _draw(axes, line)
    if frame.healthy is not None:
        pale: Any = {"color": GREEN, "alpha": 0.16, "linewidth": 0, "zorder": 0}
        axes.axhspan(*frame.healthy, label="healthy", **pale)
    for label, height in frame.levels:
        axes.axhline(height, color=VERMILION, linestyle="--", linewidth=1.2, label=label)
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
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        # Over the axes, where no line runs.
        columns = 4 if frame.wide else 3
        place: Any = {"loc": "outside upper left", "borderaxespad": 0.2}
        figure.legend(handles, labels, ncols=columns, **place)
    words = "; ".join(_words(line, frame) for line in drawn)
    return Plot(title, caption, svg_data_uri(figure), f"{title}: {words}.", wide=frame.wide)


def _draw(axes: Axes, line: PlotLine) -> None:
    """Draw a line; with many points, pale raw values behind their moving mean."""
    style: Any = {"color": line.colour, "label": plain(line.label), "linestyle": line.dashes}
    if line.marker or line.raw:
        axes.plot(*envelope(*line.points), marker=line.marker, markersize=4.5, **style)
        return
    x, y = thin(*line.points)
    if line.band is not None:
        low, high = (
            thin(line.points.x, edge, extreme)[1]
            for edge, extreme in zip(line.band, (np.minimum, np.maximum), strict=True)
        )
        axes.fill_between(x, low, high, color=line.colour, alpha=0.15, linewidth=0)
    elif len(x) >= _MANY:
        axes.plot(*envelope(*line.points), color=line.colour, alpha=0.25, linewidth=1.0)
    marker = "o" if len(x) <= _FEW else ""
    y = smooth(y) if len(y) >= _MANY else y
    axes.plot(x, y, marker=marker, markersize=3.5, **style)


def _words(line: PlotLine, frame: Frame) -> str:
    """The last value, for readers who do not see the picture."""
    x, y = line.points
    text = f"{line.label}: {frame.show(float(y[-1]))}" + (
        "" if frame.x else f" at step {x[-1]:.0f}"
    )
    if line.band is None:
        return text
    low, high = (frame.show(float(edge[-1])) for edge in line.band)
    return f"{text}, layers from {low} to {high}"
