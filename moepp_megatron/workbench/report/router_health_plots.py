"""Plots of the routers' health; docs/routing.md says what each number means."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from moepp_megatron.catalogue import IN_LAYERS, Drawn
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.observe.numbers import layer_numbers
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.curves import drawn_metrics, plain_plot
from moepp_megatron.workbench.report.drawing import (
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
from moepp_megatron.workbench.report.healthy import QUICKSTART_EXPERTS, healthy_range
from moepp_megatron.workbench.report.plot import Plot
from moepp_megatron.workbench.report.run_data import RunData
from moepp_megatron.workbench.report.summary import tail


class _HealthSeries(NamedTuple):
    """Numbers of all MoE layers over steps.

    Attributes:
        values: Function from a record to its [MoE layers] numbers, or None if it has none.
    """

    label: str
    colour: str
    values: Callable[[StepMetrics], Sequence[float] | None]


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
    """What the catalogue draws of single MoE layers, in the order of the page."""
    # Where the plot is not simply of the metric's numbers.
    series = {
        # As a share of log E, so that the range serves any number of experts.
        "gate_entropy": (
            _measured("gate_entropy", scale=1.0 / math.log(run.config.experts.num_experts)),
        ),
        "logit_variance": (
            _measured("logit_variance", "with residual"),
            _measured("own_logit_variance", "without", VERMILION),
        ),
        "residual_ratio": (_measured("residual_ratio", first=1),),
        "row_cosine_max": (
            _measured("row_cosine"),
            _measured("row_cosine_max", "largest", VERMILION),
        ),
        "min_ffn_load": (_HealthSeries("mean", BLUE, _idlest(run.config.experts.num_ffn_experts)),),
    }
    healthy = {"gate_entropy": _entropy_range()}
    plots = [
        _BandPlot(
            row.drawn,
            row.drawn.caption or row.sentence,
            series.get(name) or (_measured(name),),
            is_share=row.unit == "share" or name == "gate_entropy",
            healthy=healthy.get(name, healthy_range(name)),
        )
        for name, row in IN_LAYERS.items()
        if row.drawn is not None
    ]
    return sorted(plots, key=lambda plot: plot.drawn.place)


def _measured(
    name: str, label: str = "mean", colour: str = BLUE, scale: float = 1.0, first: int = 0
) -> _HealthSeries:
    """Router health of the MoE layers from `first` on, times `scale`."""

    def values(record: StepMetrics) -> Sequence[float] | None:
        numbers = (record.router_health or {}).get(name)
        return None if numbers is None else [value * scale for value in numbers[first:]]

    return _HealthSeries(label, colour, values)


def _entropy_range() -> tuple[float, float] | None:
    ends = healthy_range("gate_entropy")
    return ends and (ends[0] / math.log(QUICKSTART_EXPERTS), ends[1] / math.log(QUICKSTART_EXPERTS))


def _idlest(num_ffn_experts: int) -> Callable[[StepMetrics], Sequence[float] | None]:
    def values(record: StepMetrics) -> Sequence[float] | None:
        if not record.layer_expert_share:
            return None
        shares = np.asarray(record.layer_expert_share, dtype=np.float64)[:, :num_ffn_experts]
        means = shares.mean(axis=1)
        return np.divide(
            shares.min(axis=1), means, out=np.full(len(means), math.nan), where=means > 0
        ).tolist()

    return values


def _band_plot(run: RunData, plot: _BandPlot) -> Plot | None:
    """The plot; None if fewer than two records have any of its numbers."""
    drawn = [(each, *_table(run.records, each)) for each in plot.series]
    drawn = [(each, steps, table) for each, steps, table in drawn if len(steps) >= 2]
    if not drawn:
        return None
    figure = new_figure()
    axes = figure.subplots()
    words = []
    for each, steps, table in drawn:
        _draw_band(axes, each, steps, table)
        last = table[-1][np.isfinite(table[-1])]
        words.append(
            f"{each.label} {_show(plot, float(last.mean()))} at step {steps[-1]}, "
            f"layers from {_show(plot, float(last.min()))} to {_show(plot, float(last.max()))}"
        )
    draw_healthy(axes, plot.healthy)
    if plot.drawn.level is not None:
        draw_level(axes, plot.drawn.level)
    if plot.drawn.is_logarithmic and all(
        (table[np.isfinite(table)] > 0).all() for _, _, table in drawn
    ):
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


def _table(records: Sequence[StepMetrics], series: _HealthSeries) -> tuple[list[int], np.ndarray]:
    """Steps, and [steps, MoE layers] numbers, of records in which any layer's is finite."""
    steps, rows = [], []
    for record in records:
        values = series.values(record)
        if values is not None and any(map(math.isfinite, values)):
            steps.append(record.step)
            rows.append(list(values))
    widths = {len(row) for row in rows}
    if len(widths) != 1:
        return [], np.empty((0, 0))
    return steps, np.asarray(rows, dtype=np.float64)


def _draw_band(axes: Axes, series: _HealthSeries, steps: Sequence[int], table: np.ndarray) -> None:
    x, low = thin(steps, np.nanmin(table, axis=1))
    _, high = thin(steps, np.nanmax(table, axis=1))
    _, mean = thin(steps, np.nanmean(table, axis=1))
    if table.shape[1] > 1:
        axes.fill_between(x, low, high, color=series.colour, alpha=0.15, linewidth=0)
    line = smooth(mean) if len(x) >= 60 else mean
    axes.plot(x, line, color=series.colour, label=series.label)


def _show(plot: _BandPlot, value: float) -> str:
    return formatting.percent(value) if plot.is_share else formatting.significant(value)


def _ffn_histogram(run: RunData) -> Plot | None:
    """How many tokens of each MoE layer get 0, 1, ..., K FFN experts."""
    measured = [r for r in run.records if r.layer_ffn_histogram]
    if not measured:
        return None
    tables = [record.layer_ffn_histogram for record in tail(measured)]
    shares = np.asarray(tables, dtype=np.float64).mean(axis=0)
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
