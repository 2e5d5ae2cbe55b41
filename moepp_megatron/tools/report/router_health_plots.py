"""Plots of the routers' health; docs/routing.md says what each number means."""

import math
from operator import itemgetter

import numpy as np

from moepp_megatron.catalogue import IN_LAYERS, Metric
from moepp_megatron.observe.numbers import layer_numbers
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import Plot, Table, number
from moepp_megatron.tools.report.curves import section_plots
from moepp_megatron.tools.report.drawing import BLUE, VERMILION
from moepp_megatron.tools.report.lines import Frame, PlotLine, healthy_range, line_plot
from moepp_megatron.tools.report.run_data import RunData
from moepp_megatron.tools.report.series import BAND, Series, mean_of
from moepp_megatron.tools.report.summary import tail

# Of the run that the healthy ranges are from; an entropy is drawn as a share of log E.
_QUICKSTART_EXPERTS = 12
# Plots of more than their own metric: metrics and their names in the legend.
_LINES = {
    "logit_variance": {"logit_variance": "with residual", "own_logit_variance": "without"},
    "row_cosine_max": {"row_cosine": "mean", "row_cosine_max": "largest"},
}


def health_plots(run: RunData) -> list[Plot]:
    """All plots that the records have numbers for; none for a vanilla run."""
    if run.config.moe.is_vanilla:
        return []
    drawn = [(row.drawn.place, name, row) for name, row in IN_LAYERS.items() if row.drawn]
    drawn.sort(key=itemgetter(0))
    plots = [_band_plot(run, name, row) for _, name, row in drawn]
    plots += section_plots(run, "router")
    return [plot for plot in plots if plot.image is not None]


def _band_plot(run: RunData, name: str, row: Metric) -> Plot:
    """Means over the MoE layers in front of the range from the least to the greatest."""
    drawn = row.drawn
    assert drawn is not None, name
    # As a share of log E, so that the range serves any number of experts.
    is_entropy = name == "gate_entropy"
    scale = 1.0 / math.log(run.config.moe.num_experts) if is_entropy else 1.0
    healthy = healthy_range(name)
    if is_entropy and healthy is not None:
        most = math.log(_QUICKSTART_EXPERTS)
        healthy = (healthy[0] / most, healthy[1] / most)
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


def histogram_table(run: RunData) -> Table | None:
    """Tokens of each MoE layer with 0, 1, ..., K FFN experts; None where it was not measured."""
    measured = run.records[np.flatnonzero(~np.isnan(run.numbers.values("layer_ffn_histogram")))]
    shares = mean_of(record.layer_ffn_histogram for record in tail(measured))
    if shares is None:
        return None
    rows = [
        [number(str(layer)), *(number(formatting.percent(share)) for share in row)]
        for layer, row in zip(
            layer_numbers(run.config.moe_layers, len(shares)), shares, strict=True
        )
    ]
    head = ("MoE layer", *(f"{count} FFN" for count in range(shares.shape[1])))
    caption = (
        "Tokens by how many FFN experts they get, mean over the last tenth of the measured steps."
    )
    return Table(head, rows, caption)
