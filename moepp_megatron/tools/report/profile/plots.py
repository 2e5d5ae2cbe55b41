"""Plots of a profile's page."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moepp_megatron.tools.profiling.analysis import Profile
from moepp_megatron.tools.report.blocks import Plot
from moepp_megatron.tools.report.drawing import (
    BLUE,
    GREEN,
    GRID,
    INK,
    VERMILION,
    new_figure,
    plot_style,
    svg_data_uri,
)
from moepp_megatron.tools.report.profile.findings import FindingCost, costs

# Okabe and Ito's palette where it goes far enough.
_COLOURS = {
    "dispatch": "#d55e00",
    "combine": "#e69f00",
    "gradient reduce": "#7b5ea7",
    "parameter gather": "#a65e2e",
    "pipeline": "#b5495b",
    "tensor parallel": "#2f8f9d",
    "context parallel": "#6f7f2f",
}
_OTHER, _WAITING = "#9aa5b1", "#e12d39"
# With more ranks, nobody can read the bars.
_MOST_RANKS = 64


def profile_plots(profile: Profile, document: dict[str, Any]) -> list[Plot]:
    """Plots of the step's parts, the cost of communication, and the bytes of each layer."""
    spent = [cost for cost in costs(profile) if cost.time_ms > 0][:9]
    by_rank: dict[int, list[dict[str, Any]]] = {}
    for entry in document["rank_steps"]:
        by_rank.setdefault(entry["rank"], []).append(entry)
    # All ranks, or those with most exposed communication.
    most = sorted(by_rank, key=lambda rank: -sum(entry["exposed_ms"] for entry in by_rank[rank]))
    ranks = {rank: by_rank[rank] for rank in sorted(most[:_MOST_RANKS])}
    # They stand side by side: with few ranks as tall as each other.
    rows = max(len(ranks), len(spent)) if len(ranks) <= 12 else None
    with plot_style():
        plots = [_ranks(ranks, rows), _costs(spent, rows)]
        if document["all_to_all"]:
            plots.append(_layers(document))
    return plots


def _bars(bars: int, rows: int | None, unit: str) -> tuple[Figure, Axes, float]:
    """A figure for this many bars, with room for `rows`, and the bars' height."""
    room = max(rows or bars, 1)
    figure = new_figure(6.4, max(2.0, 1.0 + 0.42 * room))
    axes = figure.subplots()
    axes.set_xlabel(unit)
    axes.grid(visible=False, axis="y")
    # A bar is never thicker than where there is no spare room.
    return figure, axes, 0.8 * min(1.0, 1.6 * bars / room) if bars else 0.8


def _ranks(ranks: dict[int, list[dict[str, Any]]], rows: int | None) -> Plot:
    figure, axes, thick = _bars(len(ranks), rows, "milliseconds per step")
    left = np.zeros(len(ranks))
    for key, label, colour in (
        ("compute_ms", "computes", BLUE),
        ("exposed_ms", "exposed communication", VERMILION),
        ("idle_ms", "neither", GRID),
    ):
        values = np.array([np.mean([step[key] for step in steps]) for steps in ranks.values()])
        axes.barh(
            [str(rank) for rank in ranks], values, thick, left=left, color=colour, label=label
        )
        left += values
    axes.invert_yaxis()
    axes.set_ylabel("rank")
    figure.legend(loc="outside upper left", ncols=3)
    return Plot(
        "Where a step goes",
        "Mean over the analysed steps. Exposed: some collective runs or waits, nothing computes.",
        svg_data_uri(figure),
        "Stacked bars of computation and exposed communication for each rank",
    )


def _costs(costs: list[FindingCost], rows: int | None) -> Plot:
    figure, axes, thick = _bars(len(costs), rows, "milliseconds per step and rank")
    names = [cost.purpose for cost in costs]
    whole = [cost.time_ms for cost in costs]
    axes.barh(names, whole, thick, color=GRID, label="time in collectives")
    colours = [_COLOURS.get(name, _OTHER) for name in names]
    axes.barh(names, [cost.exposed_ms for cost in costs], 0.69 * thick, color=colours)
    axes.plot(
        [cost.wait_ms for cost in costs],
        names,
        linestyle="none",
        marker="|",
        markersize=13,
        markeredgewidth=2.2,
        color=_WAITING,
        label="of it waiting for late ranks",
    )
    axes.invert_yaxis()
    figure.legend(loc="outside upper left", ncols=2)
    return Plot(
        "What communication costs",
        "Coloured: exposed. Grey: all of it; what is only grey is hidden behind computation.",
        svg_data_uri(figure),
        "Bars of time in collectives by purpose",
    )


def _layers(document: dict[str, Any]) -> Plot:
    """Bytes of each layer, all passes, and those of other dispatchers."""
    layers = sorted({row["layer"] for row in document["all_to_all"]})
    mib = 2**20 * len(document["steps"])

    def total(key: str) -> list[float]:
        rows = document["all_to_all"]
        return [sum(row[key] for row in rows if row["layer"] == layer) / mib for layer in layers]

    figure = new_figure(12.8, 3.1)
    axes = figure.subplots()
    places = np.arange(len(layers))
    axes.bar(places, total("vanilla_bytes"), 0.82, color=GRID, label="vanilla, even load")
    axes.bar(places - 0.2, total("measured_bytes"), 0.36, color=BLUE, label="measured")
    axes.bar(places + 0.2, total("deduplicated_bytes"), 0.36, color=GREEN, label="deduplicated")
    axes.hlines(
        total("even_load_bytes"),
        places - 0.41,
        places + 0.41,
        color=INK,
        linewidth=1.2,
        linestyle=(0, (3, 2)),
        label="FFN-only, even load",
    )
    if len(layers) <= 40:
        axes.set_xticks(places, [str(layer) for layer in layers])
    axes.set_xlabel("layer")
    axes.set_ylabel("MiB a step, all ranks")
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside upper left", ncols=4)
    return Plot(
        "All-to-all of hidden vectors by layer",
        "All passes, dispatch and combine. Vanilla: every selection goes to an FFN expert. "
        "Deduplicated: once for each token and rank, the least that can be sent.",
        svg_data_uri(figure),
        "Bars of measured, deduplicated and vanilla bytes for each layer",
        wide=True,
    )
