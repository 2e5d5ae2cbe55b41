"""Plots of the selections: by expert, by kind, by MoE layer."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

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
    step_axis,
    svg_data_uri,
    thin,
)
from moepp_megatron.tools.report.run_data import RunConfig, RunData
from moepp_megatron.tools.report.series import mean_of
from moepp_megatron.tools.report.summary import tail, window

# Beyond these, text in a cell or at a tick can no longer be read.
_MAX_NAMED_EXPERTS = 48
_MAX_NUMBERED_CELLS = 500


def expert_plots(run: RunData) -> list[Plot]:
    """All plots over experts, in the order of the page."""
    return [_layer_heat_map(run), _kinds_over_time(run)]


def _tail_shares(run: RunData) -> np.ndarray | None:
    """[E] float64 mean ``expert_share`` of the run's last tenth; None if not recorded."""
    return mean_of(r.expert_share for r in tail(run.records) if r.expert_share)


def _balanced_share(config: RunConfig, kind: str) -> float:
    """Share of one expert of this kind under perfect balance."""
    if kind == "FFN":
        return config.phi / config.experts.num_ffn_experts
    return (1.0 - config.phi) / config.experts.num_zero_computation_experts


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
    balanced = np.asarray([_balanced_share(run.config, kind) for kind in run.config.experts.kinds])
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
        f"of the records ({window(run)}); a row sums to 100%. Colour: that share "
        "over the one under perfect balance, orange for more, purple for less. Rows: MoE layers by "
        "their number in the model.",
        svg_data_uri(figure),
        f"Heat map of {layers} MoE layers by {experts} experts; shares between "
        f"{formatting.percent(low)} and {formatting.percent(high)}.",
        wide=True,
    )


def _kinds_over_time(run: RunData) -> Plot:
    """Share of each kind of expert over steps, stacked."""
    title = "Expert share by kind"
    present = [kind for kind in KIND_NAMES if kind in run.config.experts.kinds]
    if len(present) == 1:
        text = f"This layer has {present[0]} experts only, so they get every selection."
        return Plot(title, "", None, text)
    shares = [run.numbers.series("kind_share", kind) for kind in present]
    if len(shares[0].x) < 2:
        return Plot(title, "", None, "A curve needs two records with the experts' shares.")
    figure = new_figure(13.2, 2.6)
    axes = figure.subplots()
    bands = [thin(*share) for share in shares]
    axes.stackplot(
        bands[0][0],
        [band for _, band in bands],
        labels=present,
        colors=[KIND_COLOURS[kind] for kind in present],
        linewidth=0,
        alpha=0.9,
    )
    axes.set_ylim(0, 1)
    axes.set_xlim(bands[0][0][0], bands[0][0][-1])
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    step_axis(axes)
    figure.legend(loc="outside upper center", ncols=4)
    mean = _tail_shares(run)
    assert mean is not None, "two records have them"
    return Plot(
        title,
        "Share of all selections, mean over MoE layers.",
        svg_data_uri(figure),
        f"Mean of {window(run)}: {_kinds_in_words(run, mean)}.",
        wide=True,
    )


def _kinds_in_words(run: RunData, shares: np.ndarray) -> str:
    """The share of each kind that the layer has; they add up to 100%."""
    kinds = np.asarray(run.config.experts.kinds)
    present = [kind for kind in KIND_NAMES if (kinds == kind).any()]
    sums = formatting.shares([float(shares[kinds == kind].sum()) for kind in present])
    return ", ".join(f"{kind} {share}" for kind, share in zip(present, sums, strict=True))


def _name_experts(axes: Axes, config: RunConfig) -> None:
    """Names at the ticks, each in its kind's colour; too many experts are named by kind."""
    names, kinds = config.experts.names, config.experts.kinds
    if len(names) <= _MAX_NAMED_EXPERTS:
        axes.set_xticks(range(len(names)), labels=names, rotation=45, ha="right")
    else:
        firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        axes.set_xticks(firsts, labels=[kinds[i] for i in firsts], rotation=45, ha="right")
        kinds = [kinds[i] for i in firsts]
    for label, kind in zip(axes.get_xticklabels(), kinds, strict=True):
        label.set_color(KIND_INKS[kind])


def _number_cells(axes: Axes, shares: np.ndarray, balanced: np.ndarray) -> None:
    texts = [formatting.shares(row.tolist()) for row in shares]
    for (layer, expert), share in np.ndenumerate(shares):
        extreme = not 0.35 < share / balanced[expert] < 1.65
        colour = "white" if extreme else CELL_INK
        text = texts[layer][expert].removesuffix("%")
        axes.text(expert, layer, text, ha="center", va="center", color=colour, fontsize=8.5)
