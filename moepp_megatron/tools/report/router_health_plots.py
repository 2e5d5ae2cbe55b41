"""Plots of the routers' health; docs/routing.md says what each number means."""

import math
from operator import itemgetter

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import PercentFormatter

from moepp_megatron.catalogue import IN_LAYERS, Metric
from moepp_megatron.observe.numbers import layer_numbers
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import Plot
from moepp_megatron.tools.report.curves import section_plots
from moepp_megatron.tools.report.drawing import (
    BLUE,
    VERMILION,
    name_layers,
    new_figure,
    svg_data_uri,
)
from moepp_megatron.tools.report.healthy import QUICKSTART_EXPERTS, healthy_range
from moepp_megatron.tools.report.lines import Frame, PlotLine, line_plot
from moepp_megatron.tools.report.run_data import RunData
from moepp_megatron.tools.report.series import BAND, Series, mean_of
from moepp_megatron.tools.report.summary import tail

# Plots of more than their own metric: metrics and their names in the legend.
_LINES = {
    "logit_variance": {"logit_variance": "with residual", "own_logit_variance": "without"},
    "row_cosine_max": {"row_cosine": "mean", "row_cosine_max": "largest"},
}


def health_plots(run: RunData) -> list[Plot]:
    """All plots that the records have numbers for; none for a vanilla run."""
    if run.config.is_vanilla:
        return []
    drawn = [(row.drawn.place, name, row) for name, row in IN_LAYERS.items() if row.drawn]
    drawn.sort(key=itemgetter(0))
    plots = [_band_plot(run, name, row) for _, name, row in drawn]
    plots += [*_ffn_histogram(run), *section_plots(run, "router")]
    return [plot for plot in plots if plot.image is not None]


def _band_plot(run: RunData, name: str, row: Metric) -> Plot:
    """Means over the MoE layers in front of the range from the least to the greatest."""
    drawn = row.drawn
    assert drawn is not None, name
    # As a share of log E, so that the range serves any number of experts.
    is_entropy = name == "gate_entropy"
    scale = 1.0 / math.log(run.config.experts.num_experts) if is_entropy else 1.0
    healthy = healthy_range(name)
    if is_entropy and healthy is not None:
        healthy = (
            healthy[0] / math.log(QUICKSTART_EXPERTS),
            healthy[1] / math.log(QUICKSTART_EXPERTS),
        )
    metrics = _LINES.get(name, {name: "mean"})
    lines, least = [], math.inf
    for (metric, label), colour in zip(metrics.items(), (BLUE, VERMILION), strict=False):
        bands = [run.numbers.series(metric, part) for part in BAND]
        low, mean, high = (scale * band.y for band in bands)
        lines.append(PlotLine(label, Series(bands[0].x, mean), colour, band=(low, high)))
        least = min(least, low.min(initial=math.inf))
    is_logarithmic = drawn.is_logarithmic and least > 0
    frame = Frame(
        drawn.axis,
        formatting.percent if row.unit == "share" or is_entropy else formatting.significant,
        bottom=0 if least >= 0 and not is_logarithmic else None,
        levels=[] if drawn.level is None else [drawn.level],
        healthy=healthy,
        change=(lambda axes: axes.set_yscale("log")) if is_logarithmic else None,
    )
    about = "Line: mean over the MoE layers; band: from the least to the greatest."
    return line_plot(drawn.title, f"{drawn.caption or row.sentence} {about}", lines, frame)


def _ffn_histogram(run: RunData) -> list[Plot]:
    """Plot tokens of each MoE layer with 0, 1, ..., K FFN experts."""
    measured = run.records[np.flatnonzero(~np.isnan(run.numbers.values("layer_ffn_histogram")))]
    shares = mean_of(record.layer_ffn_histogram for record in tail(measured))
    if shares is None:
        return []
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
    plot = Plot(
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
    return [plot]
