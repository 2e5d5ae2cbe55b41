"""Plots over the course of training."""

import math
from collections.abc import Sequence
from operator import itemgetter

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.ticker import EngFormatter

from moepp_megatron.catalogue import OF_RECORD, Drawn, Record
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import Plot
from moepp_megatron.tools.report.drawing import LINE_COLOURS, MUTED, VERMILION, short_name
from moepp_megatron.tools.report.lines import Frame, PlotLine, healthy_range, line_plot
from moepp_megatron.tools.report.run_data import RunData
from moepp_megatron.tools.report.savings import vanilla_a2a_bytes
from moepp_megatron.tools.report.series import finite


def curve_plots(run: RunData) -> list[Plot]:
    """All plots over steps, in the order of the page: what the catalogue draws, among the rest."""
    placed = [(0, _loss_plot(run)), (1, _ffn_share_plot(run)), (2, _a2a_plot(run))]
    placed += [
        (drawn.place, plain_plot(run, key, drawn)) for key, drawn in drawn_metrics(run, "training")
    ]
    return [plot for _, plot in sorted(placed, key=itemgetter(0))]


def section_plots(run: RunData, section: str) -> list[Plot]:
    """The catalogue's plots of a section, of those in the records."""
    return [plain_plot(run, key, drawn) for key, drawn in drawn_metrics(run, section)]


def drawn_metrics(run: RunData, section: str) -> list[tuple[str, Drawn]]:
    """Metrics that have a plot of their own in a section, in order, of those in the records."""
    drawn = []
    for key, row in OF_RECORD.items():
        if row.drawn is None or row.drawn.section != section:
            continue
        values = run.numbers.values(key)
        values = values[~np.isnan(values)]
        # Of what every record has there is a plot, or a sentence that it is finite nowhere.
        is_recorded = len(values) or Record.model_fields[key].is_required()
        if values.any() if row.drawn.unless_zero else is_recorded:
            drawn.append((key, row.drawn))
    return sorted(drawn, key=lambda each: each[1].place)


def _loss_plot(run: RunData) -> Plot:
    """Training and validation loss, with the loss of guessing evenly over the vocabulary."""
    guess = math.log(run.config.model.vocab_size)
    valid = run.numbers.series("valid_loss")
    caption = (
        "Language-model loss in nats, token mean over the global batch. Dotted: "
        f"ln(vocabulary) = {formatting.number(guess, 2)}, the loss of an even guess."
    )
    if not len(valid.x):
        caption += " No validation loss was recorded in this run."
    lines = [
        PlotLine("training", run.numbers.series("loss")),
        PlotLine("validation", valid, VERMILION, marker="o"),
    ]
    frame = Frame(
        "loss (nats)",
        alerts=run.alerts,
        wide=True,
        height=3.6,
        change=lambda axes: axes.axhline(
            guess, color=MUTED, linestyle=":", linewidth=1.2, label="even guess"
        ),
    )
    return line_plot("Loss", caption, lines, frame)


def _ffn_share_plot(run: RunData) -> Plot:
    """FFN share of all selections against its target."""
    title, phi = "FFN share of all selections", run.config.phi
    if run.config.moe.num_zero_computation_experts == 0:
        text = "This layer has no zero-computation experts: every selection goes to an FFN expert."
        return Plot(title, "", None, text)
    target = run.numbers.values("ffn_target")
    has_budget = bool(np.isfinite(target).any())
    wanted = np.where(np.isfinite(target), target, phi)
    what = f"phi = tau F / (tau F + Z) = {formatting.percent(phi)}, the share under perfect balance"
    if has_budget:
        what = f"the target of moe.budget, {formatting.percent(wanted[-1])} in the last step"
    caption = f"Dashed: {what}. What lies below 100% is expert work that was not done."
    lines = [
        PlotLine("measured", run.numbers.series("ffn_fraction")),
        PlotLine(
            "target" if has_budget else "phi",
            finite(run.numbers.values("step"), wanted),
            VERMILION,
            "--",
            raw=True,
        ),
    ]
    frame = Frame("", formatting.percent, bottom=0, top=1.02, alerts=run.alerts)
    return line_plot(title, caption, lines, frame)


def _a2a_plot(run: RunData) -> Plot:
    """All-to-all bytes per step, measured and of the vanilla layer."""
    title, mib = "All-to-all bytes per step", 1024.0**2
    steps, sent = run.numbers.values("step"), run.numbers.values("a2a_bytes")
    if not np.any(sent):
        size = run.config.parallel.expert_model_parallel_size
        text = (
            "No hidden vector left its rank: there was no all-to-all traffic "
            f"(parallel.expert_model_parallel_size is {size})."
        )
        return Plot(title, "", None, text)
    caption = (
        "Bytes of hidden vectors that leave their rank through the dispatcher, all ranks and MoE "
        "layers, forward."
    )
    lines = [PlotLine("this run", finite(steps, sent / mib))]
    if run.config.moe.num_zero_computation_experts:
        how = run.config.moe.dispatcher
        both = zip(sent, run.numbers.values("ffn_fraction"), strict=True)
        scaled = (vanilla_a2a_bytes(how, *each) for each in both)
        whole = finite(
            steps, np.fromiter((math.nan if b is None else b for b in scaled), float) / mib
        )
        if len(whole.x):
            lines.append(PlotLine("vanilla layer", whole, MUTED))
            rule = "as much" if how == "allgather" else "bytes / FFN share"
            caption += f" The vanilla layer, in the same layout, would send {rule}."
    return line_plot(title, caption, lines, Frame("MiB", bottom=0))


def plain_plot(run: RunData, key: str, drawn: Drawn, names: Sequence[str] | None = None) -> Plot:
    """One metric of the records over steps, with what to compare it with.

    One with labels has a line for each; `names` chooses and orders them.
    """
    row = OF_RECORD[key]
    is_share, is_rate = row.unit == "share", drawn.axis.endswith("/s")
    scale = 1e12 if key == "model_tflops" else 1.0
    rate = EngFormatter(drawn.axis, places=1)
    show = formatting.percent if is_share else rate.format_data if is_rate else formatting.number
    frame = Frame(
        "" if is_rate else drawn.axis,
        show,
        bottom=0 if is_share else None,
        levels=[] if drawn.level is None else [drawn.level],
        healthy=healthy_range(key),
        alerts=run.alerts if row.labels else (),
        change=(lambda axes: axes.yaxis.set_major_formatter(rate)) if is_rate else None,
    )
    steps, known = run.numbers.values("step"), run.numbers.names(key) if row.labels else [""]
    shown = known if names is None else [name for name in names if name in known]
    ordered = row.axes[:1] in (("layer",), ("ffn_experts",))
    spread = colormaps["viridis"](np.linspace(0.05, 0.85, len(shown)))
    colours = [*map(to_hex, spread)] if ordered else LINE_COLOURS
    lines = [
        PlotLine(
            short_name(name or drawn.title),
            finite(steps, scale * run.numbers.values(key, name)),
            colour,
            marker="o" if drawn.has_marks else "",
        )
        for name, colour in zip(shown, colours, strict=False)
    ]
    return line_plot(drawn.title, drawn.caption or row.sentence, lines, frame)
