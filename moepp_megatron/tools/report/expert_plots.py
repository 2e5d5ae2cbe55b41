"""Plots of the selections: by expert, by kind, by MoE layer."""

import numpy as np
from matplotlib.axes import Axes

from moepp_megatron.experts import KIND_NAMES
from moepp_megatron.observe.numbers import layer_numbers
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import Plot
from moepp_megatron.tools.report.drawing import (
    CELL_INK,
    KIND_COLOURS,
    KIND_INKS,
    name_layers,
    new_figure,
    svg_data_uri,
)
from moepp_megatron.tools.report.lines import Frame, PlotLine, line_plot
from moepp_megatron.tools.report.run_data import RunConfig, RunData
from moepp_megatron.tools.report.series import mean_of
from moepp_megatron.tools.report.summary import tail, window

# Beyond these, text in a cell or at a tick can no longer be read.
_MAX_NAMED_EXPERTS = 48
_MAX_NUMBERED_CELLS = 500


def expert_plots(run: RunData) -> list[Plot]:
    """All plots over experts, in the order of the page."""
    kinds = [] if len(set(run.config.moe.kinds)) == 1 else [_kinds_over_time(run)]
    return [_layer_heat_map(run), *kinds]


def _balanced_share(config: RunConfig, kind: str) -> float:
    """Share of one expert of this kind under perfect balance."""
    if kind == "FFN":
        return config.phi / config.moe.num_ffn_experts
    return (1.0 - config.phi) / config.moe.num_zero_computation_experts


def _layer_heat_map(run: RunData) -> Plot:
    """Share of every expert in every MoE layer."""
    title = "Expert share by MoE layer"
    records = tail(run.records)
    shares = mean_of(r.layer_expert_share for r in records if r.layer_expert_share)
    if shares is None or not np.isfinite(shares).all():
        return Plot(
            title,
            "",
            None,
            "The shares of the experts in each layer (layer_expert_share) were not recorded at "
            "the end of this run.",
            wide=True,
        )
    layers, experts = shares.shape
    figure = new_figure(13.2, min(9.0, 1.6 + 0.36 * layers))
    axes = figure.subplots()
    balanced = np.asarray([_balanced_share(run.config, kind) for kind in run.config.moe.kinds])
    # One fixed scale: pages of different runs can be compared by eye.
    image = axes.imshow(
        shares / balanced, cmap="PuOr_r", aspect="auto", vmin=0, vmax=2, interpolation="nearest"
    )
    bar = figure.colorbar(image, ax=axes, pad=0.01, extend="max", label="share / balanced share")
    bar.outline.set_visible(False)
    _name_experts(axes, run.config)
    name_layers(axes, layer_numbers(run.config.moe_layers, layers))
    if shares.size <= _MAX_NUMBERED_CELLS:
        _number_cells(axes, shares, balanced)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    low, high = shares.min(), shares.max()
    return Plot(
        title,
        "Numbers: an expert's share of the layer's selections in percent, mean over the last tenth "
        f"of the records ({window(run)}). Colour: that share "
        "over the one under perfect balance, orange for more, purple for less. Rows: MoE layers by "
        "their number in the model.",
        svg_data_uri(figure),
        f"Heat map of {layers} MoE layers by {experts} experts; shares between "
        f"{formatting.percent(low)} and {formatting.percent(high)}.",
        wide=True,
    )


def _kinds_over_time(run: RunData) -> Plot:
    """Share of each kind of expert over steps."""
    lines = [
        PlotLine(kind, run.numbers.series("kind_share", kind), KIND_COLOURS[kind])
        for kind in KIND_NAMES
        if kind in run.config.moe.kinds
    ]
    frame = Frame("", formatting.percent, bottom=0, wide=True)
    caption = "Share of all selections, mean over MoE layers."
    return line_plot("Expert share by kind", caption, lines, frame)


def _name_experts(axes: Axes, config: RunConfig) -> None:
    """Names at the ticks, each in its kind's colour; too many experts are named by kind."""
    names, kinds = config.moe.names, config.moe.kinds
    if len(names) <= _MAX_NAMED_EXPERTS:
        axes.set_xticks(range(len(names)), labels=names, rotation=45, ha="right")
    else:
        firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        axes.set_xticks(firsts, labels=[kinds[i] for i in firsts], rotation=45, ha="right")
        kinds = [kinds[i] for i in firsts]
    for label, kind in zip(axes.get_xticklabels(), kinds, strict=True):
        label.set_color(KIND_INKS[kind])


def _number_cells(axes: Axes, shares: np.ndarray, balanced: np.ndarray) -> None:
    for (layer, expert), share in np.ndenumerate(shares):
        extreme = not 0.35 < share / balanced[expert] < 1.65
        colour = "white" if extreme else CELL_INK
        text = formatting.percent(share).removesuffix("%")
        axes.text(expert, layer, text, ha="center", va="center", color=colour, fontsize=8.5)
