"""Plots of the routers' health; docs/routing.md says what each number means."""

import math
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from moepp_megatron.catalogue import IN_LAYERS, Drawn
from moepp_megatron.observe.numbers import layer_numbers
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import Plot
from moepp_megatron.tools.report.curves import drawn_metrics, plain_plot
from moepp_megatron.tools.report.drawing import (
    BLUE,
    VERMILION,
    draw_healthy,
    draw_level,
    legend_above,
    name_layers,
    new_figure,
    smooth,
    step_axis,
    svg_data_uri,
    thin,
)
from moepp_megatron.tools.report.healthy import QUICKSTART_EXPERTS, healthy_range
from moepp_megatron.tools.report.run_data import RunData
from moepp_megatron.tools.report.series import BAND, mean_of
from moepp_megatron.tools.report.summary import tail


class _HealthSeries(NamedTuple):
    """A metric of all MoE layers over steps, times `scale`."""

    metric: str
    label: str = "mean"
    colour: str = BLUE
    scale: float = 1.0


class _BandPlot(NamedTuple):
    """A plot of means over the MoE layers in front of the range from the least to the greatest."""

    drawn: Drawn
    caption: str
    series: tuple[_HealthSeries, ...]
    is_share: bool
    healthy: tuple[float, float] | None


def health_plots(run: RunData) -> list[Plot]:
    """All plots that the records have numbers for; none for a vanilla run."""
    if run.config.is_vanilla:
        return []
    plots = [_band_plot(run, plot) for plot in _band_plots(run)]
    plots += [_ffn_histogram(run)]
    plots += [plain_plot(run, key, drawn) for key, drawn in drawn_metrics(run, "router")]
    return [plot for plot in plots if plot is not None and plot.image is not None]


def _band_plots(run: RunData) -> list[_BandPlot]:
    """List the catalogue's plots of single MoE layers, in the page's order."""
    # Where the plot is not simply of the metric's numbers.
    series = {
        # As a share of log E, so that the range serves any number of experts.
        "gate_entropy": (
            _HealthSeries("gate_entropy", scale=1.0 / math.log(run.config.experts.num_experts)),
        ),
        "logit_variance": (
            _HealthSeries("logit_variance", "with residual"),
            _HealthSeries("own_logit_variance", "without", VERMILION),
        ),
        "row_cosine_max": (
            _HealthSeries("row_cosine"),
            _HealthSeries("row_cosine_max", "largest", VERMILION),
        ),
    }
    healthy = {"gate_entropy": _entropy_range()}
    plots = [
        _BandPlot(
            row.drawn,
            row.drawn.caption or row.sentence,
            series.get(name) or (_HealthSeries(name),),
            is_share=row.unit == "share" or name == "gate_entropy",
            healthy=healthy.get(name, healthy_range(name)),
        )
        for name, row in IN_LAYERS.items()
        if row.drawn is not None
    ]
    return sorted(plots, key=lambda plot: plot.drawn.place)


def _entropy_range() -> tuple[float, float] | None:
    ends = healthy_range("gate_entropy")
    return ends and (ends[0] / math.log(QUICKSTART_EXPERTS), ends[1] / math.log(QUICKSTART_EXPERTS))


def _band_plot(run: RunData, plot: _BandPlot) -> Plot | None:
    """The plot; None if fewer than two records have any of its numbers."""
    drawn = [(each, *_band(run, each)) for each in plot.series]
    drawn = [(each, steps, band) for each, steps, band in drawn if len(steps) >= 2]
    if not drawn:
        return None
    figure = new_figure()
    axes = figure.subplots()
    words = []
    for each, steps, band in drawn:
        _draw_band(axes, each, steps, band)
        low, mean, high = (_show(plot, float(value)) for value in band[:, -1])
        words.append(f"{each.label} {mean} at step {steps[-1]:.0f}, layers from {low} to {high}")
    draw_healthy(axes, plot.healthy)
    if plot.drawn.level is not None:
        draw_level(axes, plot.drawn.level)
    if plot.drawn.is_logarithmic and all((band > 0).all() for _, _, band in drawn):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if plot.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    axes.set_ylabel(plot.drawn.axis)
    step_axis(axes)
    if len(drawn) > 1 or plot.healthy is not None or plot.drawn.level is not None:
        legend_above(axes, ncols=4)
    caption = (
        f"{plot.caption} Line: mean over the MoE layers; band: from the least to the greatest."
    )
    title = plot.drawn.title
    return Plot(title, caption, svg_data_uri(figure), f"{title}: {'; '.join(words)}.")


def _band(run: RunData, series: _HealthSeries) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n], and [3, n] the least, mean and greatest of the layers where any is finite."""
    lines = [run.numbers.series(series.metric, name) for name in BAND]
    return lines[0].x, series.scale * np.array([line.y for line in lines])


def _draw_band(axes: Axes, series: _HealthSeries, steps: np.ndarray, band: np.ndarray) -> None:
    low, mean, high = (
        thin(steps, of, how)[1]
        for of, how in zip(band, (np.minimum, None, np.maximum), strict=True)
    )
    x, _ = thin(steps, steps)
    if (low != high).any():
        axes.fill_between(x, low, high, color=series.colour, alpha=0.15, linewidth=0)
    line = smooth(mean) if len(x) >= 60 else mean
    axes.plot(x, line, color=series.colour, label=series.label)


def _show(plot: _BandPlot, value: float) -> str:
    return formatting.percent(value) if plot.is_share else formatting.significant(value)


def _ffn_histogram(run: RunData) -> Plot | None:
    """Plot tokens of each MoE layer with 0, 1, ..., K FFN experts."""
    measured = run.records[np.flatnonzero(~np.isnan(run.numbers.values("layer_ffn_histogram")))]
    shares = mean_of(record.layer_ffn_histogram for record in tail(measured))
    if shares is None:
        return None
    layers, width = shares.shape
    figure = new_figure(height=max(3.1, min(9.0, 1.2 + 0.28 * layers)))
    axes = figure.subplots()
    colours = colormaps["Blues"](np.linspace(0.12, 0.85, width))
    left = np.zeros(layers)
    for count in range(width):
        axes.barh(
            np.arange(layers), shares[:, count], left=left, color=colours[count], label=str(count)
        )
        left += shares[:, count]
    name_layers(axes, layer_numbers(run.config.moe_layers, layers))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    axes.set_xlabel("tokens")
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=min(9, width), title="FFN experts of a token")
    mean = shares.mean(axis=0)
    return Plot(
        "FFN experts of a token",
        "Tokens by how many FFN experts they get, mean over the last tenth of the measured steps.",
        svg_data_uri(figure),
        "Mean over the layers: "
        + ", ".join(
            f"{share} of the tokens get {n}"
            for n, share in enumerate(formatting.shares(mean.tolist()))
        )
        + ".",
    )
