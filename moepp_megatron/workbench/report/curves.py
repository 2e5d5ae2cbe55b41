"""Plots over the course of training."""

import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from moepp_megatron.catalogue import OF_RECORD, Drawn
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.alerts import mark_alerts
from moepp_megatron.workbench.report.drawing import (
    BLUE,
    GREEN,
    MUTED,
    VERMILION,
    draw_healthy,
    draw_level,
    draw_noisy,
    legend_above,
    new_figure,
    step_axis,
    svg_data_uri,
    thin,
)
from moepp_megatron.workbench.report.healthy import healthy_range
from moepp_megatron.workbench.report.plot import Plot
from moepp_megatron.workbench.report.run_data import RunData
from moepp_megatron.workbench.report.savings import vanilla_a2a_bytes


def curve_plots(run: RunData) -> list[Plot]:
    """All plots over steps, in the order of the page: what the catalogue draws, among the rest."""
    placed = [
        (0, loss_plot(run)),
        (1, _ffn_share_plot(run)),
        (2, _a2a_plot(run)),
        (4, speed_plot(run)),
        (6, _gradient_plot(run)),
    ]
    placed += [
        (drawn.place, plain_plot(run, key, drawn)) for key, drawn in own_plots(run, "training")
    ]
    return [plot for _, plot in sorted(placed, key=itemgetter(0))]


def own_plots(run: RunData, section: str) -> list[tuple[str, Drawn]]:
    """Metrics that have a plot of their own in a section, in order, of those in the records."""
    found = []
    for key, row in OF_RECORD.items():
        if row.drawn is None or row.drawn.section != section:
            continue
        values = [value for r in run.records if (value := getattr(r, key)) is not None]
        if any(values) if row.drawn.unless_zero else values:
            found.append((key, row.drawn))
    return sorted(found, key=lambda each: each[1].place)


def loss_plot(run: RunData) -> Plot:
    """Training and validation loss, with the loss of guessing evenly over the vocabulary."""
    title = "Loss"
    guess = math.log(run.config.model.vocab_size)
    caption = (
        "Language-model loss in nats, token mean over the global batch. Dotted: "
        f"ln(vocabulary) = {formatting.number(guess, 2)}, the loss of an even guess."
    )
    steps, losses = _series(run.records, lambda r: r.loss)
    valid_steps, valid = _series(run.records, lambda r: r.valid_loss)
    if len(steps) < 2:
        return _too_short(title, caption, "loss", losses)
    figure = new_figure(13.2, 3.6)
    axes = figure.subplots()
    draw_noisy(axes, steps, losses, BLUE, "training")
    if valid:
        axes.plot(
            valid_steps, valid, color=VERMILION, marker="o", markersize=4.5, label="validation"
        )
    axes.axhline(guess, color=MUTED, linestyle=":", linewidth=1.2, label="even guess")
    mark_alerts(axes, run.alerts, steps)
    axes.set_ylabel("loss (nats)")
    step_axis(axes)
    legend_above(axes, ncols=4)
    alt = _course("Training loss", steps, losses, formatting.number)
    if valid:
        alt += f" {_course('Validation loss', valid_steps, valid, formatting.number)}"
    else:
        caption += " No validation loss was recorded in this run."
    return Plot(title, caption, svg_data_uri(figure), alt, wide=True)


def _ffn_share_plot(run: RunData) -> Plot:
    """FFN share of all selections against its target."""
    title = "FFN share of all selections"
    phi = run.config.phi
    if run.config.experts.num_zero_computation_experts == 0:
        return Plot(
            title,
            "",
            None,
            "This layer has no zero-computation experts: every selection goes to an FFN expert.",
        )
    wanted = [phi if r.ffn_target is None else r.ffn_target for r in run.records]
    has_budget = any(r.ffn_target is not None for r in run.records)
    name = "target" if has_budget else "phi"
    what = f"phi = tau F / (tau F + Z) = {formatting.percent(phi)}, the share under perfect balance"
    if has_budget:
        what = f"the target of moe.budget, {formatting.percent(wanted[-1])} in the last step"
    caption = f"Dashed: {what}. What lies below 100% is expert work that was not done."
    steps, shares = _series(run.records, lambda r: r.ffn_fraction)
    if len(steps) < 2:
        return _too_short(title, caption, "FFN share", shares, formatting.percent)
    figure = new_figure()
    axes = figure.subplots()
    draw_noisy(axes, steps, shares, BLUE, "measured")
    axes.plot(
        [r.step for r in run.records], wanted, "--", color=VERMILION, linewidth=1.5, label=name
    )
    mark_alerts(axes, run.alerts, steps)
    axes.set_ylim(0, 1.02)
    _share_axis(axes)
    step_axis(axes)
    legend_above(axes)
    alt = _course("FFN share", steps, shares, formatting.percent)
    return Plot(
        title, caption, svg_data_uri(figure), f"{alt} {name} is {formatting.percent(wanted[-1])}."
    )


def _a2a_plot(run: RunData) -> Plot:
    """All-to-all bytes per step, measured and of the vanilla layer."""
    title = "All-to-all bytes per step"
    caption = (
        "Bytes of hidden vectors that leave their rank through the dispatcher, all ranks and MoE "
        "layers, forward."
    )
    steps, sent = _series(run.records, lambda r: float(r.a2a_bytes))
    if not any(sent):
        size = run.config.parallel.expert_model_parallel_size
        return Plot(
            title,
            "",
            None,
            "No hidden vector left its rank: there was no all-to-all traffic "
            f"(parallel.expert_model_parallel_size is {size}).",
        )
    if len(steps) < 2:
        return _too_short(title, caption, "bytes", sent, formatting.data_size)
    figure = new_figure()
    axes = figure.subplots()
    mib = 1024.0**2
    draw_noisy(axes, steps, [b / mib for b in sent], BLUE, "this run")
    if run.config.experts.num_zero_computation_experts:
        how = run.config.moe.dispatcher
        scaled = [vanilla_a2a_bytes(how, r.a2a_bytes, r.ffn_fraction) for r in run.records]
        whole = [(step, b / mib) for step, b in zip(steps, scaled, strict=True) if b is not None]
        if whole:
            draw_noisy(axes, [s for s, _ in whole], [b for _, b in whole], MUTED, "vanilla layer")
            rule = "as much" if how == "allgather" else "bytes / FFN share"
            caption += f" The vanilla layer, in the same layout, would send {rule}."
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MiB")
    step_axis(axes)
    legend_above(axes)
    alt = _course("All-to-all bytes", steps, sent, formatting.data_size)
    return Plot(title, caption, svg_data_uri(figure), alt)


def speed_plot(run: RunData) -> Plot:
    """Tokens per second and step time, one above the other."""
    title = "Speed"
    caption = "Tokens of the global batch per second, and wall time of a step."
    steps, speed = _series(run.records, lambda r: r.tokens_per_s)
    if len(steps) < 2:
        return _too_short(title, caption, "tokens/s", speed, formatting.count)
    times = [r.step_time_s for r in run.records if math.isfinite(r.tokens_per_s)]
    image = _two_panels(
        steps, _Panel(speed, "tokens/s", BLUE), _Panel(times, "step time (s)", GREEN)
    )
    alt = _course("Tokens per second", steps, speed, formatting.count)
    return Plot(title, caption, image, f"{alt} {_course('Step time in seconds', steps, times)}")


def _gradient_plot(run: RunData) -> Plot:
    """Gradient norm and learning rate, one above the other."""
    title = "Gradient norm and learning rate"
    caption = "Global gradient norm before clipping, and the learning rate of the step."
    steps, norms = _series(run.records, lambda r: r.grad_norm)
    if len(steps) < 2:
        return _too_short(title, caption, "gradient norm", norms)
    rates = [r.lr for r in run.records if math.isfinite(r.grad_norm)]
    image = _two_panels(
        steps,
        _Panel(norms, "gradient norm", BLUE),
        _Panel(rates, "learning rate", GREEN, noisy=False),
    )
    alt = _course("Gradient norm", steps, norms)
    return Plot(title, caption, image, f"{alt} {_course('Learning rate', steps, rates)}")


def plain_plot(
    run: RunData, key: str, drawn: Drawn, axis: str | None = None, scale: float = 1.0
) -> Plot:
    """One metric of the records, times `scale`, over steps, with what to compare it with."""
    row, title, healthy = OF_RECORD[key], drawn.title, healthy_range(key)
    caption, is_share = drawn.caption or row.sentence, row.unit == "share"
    steps, values = _series(run.records, lambda r: getattr(r, key))
    values = [scale * value for value in values]
    show = formatting.percent if is_share else formatting.number
    if len(steps) < 2:
        return _too_short(title, caption, title, values, show)
    figure = new_figure()
    axes = figure.subplots()
    draw_noisy(axes, steps, values, BLUE, "this run")
    draw_healthy(axes, healthy)
    if drawn.level is not None:
        draw_level(axes, drawn.level)
    if drawn.level is not None or healthy is not None:
        legend_above(axes)
    axes.set_ylabel(drawn.axis if axis is None else axis)
    if is_share:
        axes.set_ylim(bottom=0)
        _share_axis(axes)
    step_axis(axes)
    return Plot(title, caption, svg_data_uri(figure), _course(title, steps, values, show))


class _Panel(NamedTuple):
    values: Sequence[float]
    label: str
    colour: str
    noisy: bool = True


def _two_panels(steps: Sequence[int], *panels: _Panel) -> str:
    figure = new_figure(height=3.6)
    all_axes = figure.subplots(len(panels), 1, sharex=True)
    for axes, panel in zip(all_axes, panels, strict=True):
        if panel.noisy:
            draw_noisy(axes, steps, panel.values, panel.colour)
        else:
            axes.plot(*thin(steps, panel.values), color=panel.colour)
        axes.set_ylabel(panel.label)
    step_axis(all_axes[-1])
    return svg_data_uri(figure)


def _share_axis(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))


def _series(
    records: Sequence[StepMetrics], value: Callable[[StepMetrics], float | None]
) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have a finite value."""
    pairs = [(record.step, value(record)) for record in records]
    kept = [(step, v) for step, v in pairs if v is not None and math.isfinite(v)]
    return [step for step, _ in kept], [v for _, v in kept]


def _course(
    name: str,
    steps: Sequence[int],
    values: Sequence[float],
    show: Callable[[float], str] = formatting.number,
) -> str:
    if len(steps) == 1:
        return f"{name}: {show(values[0])} at step {steps[0]}."
    return (
        f"{name}: {show(values[0])} at step {steps[0]}, {show(values[-1])} at step {steps[-1]}, "
        f"between {show(min(values))} and {show(max(values))}."
    )


def _too_short(
    title: str,
    caption: str,
    name: str,
    values: Sequence[float],
    show: Callable[[float], str] = formatting.number,
) -> Plot:
    """The sentence that replaces a curve with fewer than two finite values."""
    if values:
        text = f"Only one record has a finite value ({name} {show(values[0])}); a curve needs two."
    else:
        text = f"No record of this run has a finite {name}."
    return Plot(title, caption, None, text)
