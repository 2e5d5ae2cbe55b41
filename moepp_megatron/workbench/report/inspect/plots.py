"""Plots of the page: by layer, by position in the window, by frequency, loss by FFN experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moepp_megatron.experts import KIND_NAMES
from moepp_megatron.workbench.inspection.aggregates import TokenGroup
from moepp_megatron.workbench.inspection.findings import Findings
from moepp_megatron.workbench.inspection.trace import Trace
from moepp_megatron.workbench.report.drawing import (
    BLUE,
    GRID,
    KIND_COLOURS,
    MUTED,
    VERMILION,
    new_figure,
    svg_data_uri,
)
from moepp_megatron.workbench.report.plot import Plot

_MODEL_COLOURS = (BLUE, VERMILION)
# Tokens of a group below which its mean is not drawn.
_FEWEST = 5


def inspection_plots(traces: Sequence[Trace], findings: Sequence[Findings]) -> list[Plot]:
    """All plots, in the order of the page."""
    plots = [
        _kinds_by_layer(trace, found, name)
        for trace, found, name in zip(traces, findings, _names(traces), strict=True)
    ]
    return [*plots, *_lines(traces, findings), _loss(traces)]


def _names(traces: Sequence[Trace]) -> list[str]:
    return [""] if len(traces) == 1 else [f", {letter}" for letter in "AB"[: len(traces)]]


def _kinds_by_layer(trace: Trace, found: Findings, name: str) -> Plot:
    figure = new_figure()
    axes = figure.subplots()
    places = np.arange(len(found.by_layer))
    below = np.zeros(len(places))
    for index, kind in enumerate(KIND_NAMES):
        if trace.experts.by_kind[index] == 0:
            continue
        shares = np.asarray([layer.kinds[index] for layer in found.by_layer])
        axes.bar(places, shares, 0.72, bottom=below, color=KIND_COLOURS[kind], label=kind)
        below += shares
    axes.axhline(trace.balanced_share, color="white", linewidth=2.4)
    axes.axhline(trace.balanced_share, color=MUTED, linewidth=1.2, linestyle="--")
    labels = [str(layer) for layer in trace.layers]
    every = -(-len(labels) // 24)
    axes.set_xticks(places[::every], labels[::every])
    axes.set_xlabel("MoE layer")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False)
    figure.legend(loc="outside upper center", ncols=4)
    values = [layer.ffn for layer in found.by_layer]
    return Plot(
        f"Selections by layer{name}",
        "Share of each kind of expert in the selections of a layer; dashed: FFN share under "
        "perfect balance.",
        svg_data_uri(figure),
        f"Stacked bars of {len(values)} MoE layers; FFN experts per token between "
        f"{min(values):.2f} and {max(values):.2f}.",
    )


def _lines(traces: Sequence[Trace], findings: Sequence[Findings]) -> list[Plot]:
    return [
        _line_plot(
            "FFN experts by place in the window",
            "first and last place of the range",
            "Mean over tokens and layers; the band is the standard error. Early tokens have "
            "little text before them.",
            traces,
            [found.by_position for found in findings],
        ),
        _line_plot(
            "FFN experts by frequency",
            "occurrences of the token in this text",
            "Mean over tokens and layers of tokens that occur so often; the band is the standard "
            "error.",
            traces,
            [found.by_frequency for found in findings],
        ),
    ]


def _line_plot(
    title: str,
    label: str,
    caption: str,
    traces: Sequence[Trace],
    models: Sequence[Sequence[TokenGroup]],
) -> Plot:
    shown = [group for group in models[0] if group.count >= _FEWEST]
    if len(shown) < 2:
        return Plot(title, "", None, f"The text is too short: a range needs {_FEWEST} tokens.")
    names = [group.name for group in shown]
    figure = new_figure()
    axes = figure.subplots()
    for index, groups in enumerate(models):
        kept = [group for group in groups if group.name in names]
        values = np.asarray([group.ffn for group in kept])
        errors = np.asarray([group.ffn_error for group in kept])
        colour = _MODEL_COLOURS[index]
        axes.plot(values, color=colour, marker="o", markersize=3.5, label="AB"[index])
        axes.fill_between(
            range(len(kept)), values - errors, values + errors, color=colour, alpha=0.18, lw=0
        )
    _finish(axes, traces[0].topk, names, label)
    if len(models) > 1:
        figure.legend(loc="outside upper center", ncols=2)
    means = [group.ffn for group in shown]
    return Plot(
        title,
        caption,
        svg_data_uri(figure),
        f"Line of {len(shown)} ranges; FFN experts per token between {min(means):.2f} and "
        f"{max(means):.2f}.",
    )


def _finish(axes: Axes, topk: int, names: Sequence[str], label: str) -> None:
    every = -(-len(names) // 9)
    axes.set_xticks(range(0, len(names), every), names[::every])
    axes.set_xlabel(label)
    axes.set_ylabel("FFN experts per token")
    low, high = axes.get_ylim()
    # Never zoomed in so far that noise looks like a trend.
    middle, reach = (low + high) / 2, max(high - low, 0.3 * topk) / 2
    axes.set_ylim(max(0.0, middle - reach), min(float(topk), middle + reach))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))


def _loss(traces: Sequence[Trace]) -> Plot:
    """Distribution of the tokens' losses by how many FFN experts they got."""
    title = "Loss by FFN experts"
    figure = new_figure()
    axes = figure.subplots()
    topk, drawn = traces[0].topk, 0
    width = 0.7 / len(traces)
    for index, trace in enumerate(traces):
        known = np.isfinite(trace.losses)
        nearest = np.rint(trace.ffn_mean[known]).astype(int)
        for count in range(topk + 1):
            losses = trace.losses[known][nearest == count]
            if len(losses) < _FEWEST:
                continue
            place = count + (index - (len(traces) - 1) / 2) * width
            low, middle, high = np.quantile(losses, (0.25, 0.5, 0.75))
            colour = _MODEL_COLOURS[index]
            axes.bar(place, high - low, width * 0.8, bottom=low, color=colour, alpha=0.3)
            axes.hlines(middle, place - width * 0.4, place + width * 0.4, color=colour, lw=2)
            axes.annotate(
                f"{len(losses):,}",
                (place, high),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=MUTED,
            )
            drawn += 1
    if not drawn:
        return Plot(title, "", None, f"The text is too short: a bar needs {_FEWEST} tokens.")
    axes.set_xticks(range(topk + 1))
    axes.set_xlabel("FFN experts per token, mean over layers, rounded")
    axes.set_ylabel("loss (nats)")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
    axes.grid(visible=False, axis="x")
    axes.yaxis.grid(color=GRID)
    return Plot(
        title,
        "A token's own loss: how surprising it was. Box: the middle half of the tokens, line: the "
        "median, number: tokens.",
        svg_data_uri(figure),
        f"Loss of the tokens with 0 to {topk} FFN experts.",
    )
