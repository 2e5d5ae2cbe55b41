"""The curves of several runs over each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, PercentFormatter

from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.comparison import ComparedRun
from moepp_megatron.workbench.report.drawing import (
    LINE_COLOURS,
    draw_noisy,
    legend_above,
    new_figure,
    plain,
    short_name,
    svg_data_uri,
)
from moepp_megatron.workbench.report.plot import Plot

_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))

Axis = Callable[[ComparedRun], np.ndarray | None]
Value = Callable[[StepMetrics], float | None]
Show = Callable[[float], str]


def comparison_plots(runs: Sequence[ComparedRun]) -> list[Plot]:
    """Loss over tokens, time and FLOPs; FFN share and step time over tokens."""
    return [
        _loss_plot(runs),
        _plot(runs, "Loss over time", lambda r: r.seconds, "training time (s)", _loss,
              "loss (nats)",
              "Time in training steps, without start, evaluation and checkpoints. It compares "
              "machines and layouts as well as models."),
        _plot(runs, "Loss over FLOPs", lambda r: r.flops, "model FLOP", _loss, "loss (nats)",
              "Forward and backward pass; experts that tokens did not take do not count."),
        _plot(runs, "FFN share of all selections", _tokens, "tokens",
              lambda r: r.ffn_fraction, "FFN share",
              "What lies below 100% is expert work that was not done.", formatting.percent),
        _plot(runs, "Step time", _tokens, "tokens", lambda r: r.step_time_s, "seconds",
              "Wall time of a step. Single slow steps, as the first, may lie above the picture.",
              beside=_without_peaks),
    ]  # fmt: skip


def _tokens(run: ComparedRun) -> np.ndarray:
    return run.tokens


def _loss(record: StepMetrics) -> float:
    return record.loss


def _loss_plot(runs: Sequence[ComparedRun]) -> Plot:
    """Training loss over tokens, with the validation losses."""

    def validation(axes: Axes) -> None:
        for run, (colour, _) in zip(runs, _looks(), strict=False):
            valid = run.series(lambda r: r.valid_loss)
            there = np.isfinite(valid)
            axes.plot(run.tokens[there], valid[there], "D", color=colour, markersize=4.5)

    caption = "Token mean over the global batch. Diamonds: validation loss."
    return _plot(
        runs, "Loss over tokens", _tokens, "tokens", _loss, "loss (nats)", caption,
        beside=validation, is_wide=True,
    )  # fmt: skip


def _without_peaks(axes: Axes) -> None:
    """Cut the axis where the first step, which warms up, would flatten all others."""
    medians = [np.median(np.asarray(line.get_ydata(), np.float64)) for line in axes.get_lines()]
    axes.set_ylim(0, min(axes.get_ylim()[1], 3 * max(medians)))


def _plot(
    runs: Sequence[ComparedRun],
    title: str,
    axis: Axis,
    axis_label: str,
    value: Value,
    label: str,
    caption: str,
    show: Show = formatting.number,
    beside: Callable[[Axes], None] | None = None,
    is_wide: bool = False,
) -> Plot:
    """One number of all runs over one axis; runs without two points are named instead."""
    figure = new_figure(*((13.2, 4.0) if is_wide else (6.4, 3.6)))
    axes = figure.subplots()
    words, absent = [], []
    for run, (colour, dashes) in zip(runs, _looks(), strict=False):
        x, y = _points(run, axis, value)
        if len(x) < 2:
            absent.append(run.name)
            continue
        name = plain(short_name(run.name))
        draw_noisy(axes, x.tolist(), y.tolist(), colour, name, dashes)
        words.append(f"{run.name}: {show(float(y[0]))}, at the end {show(float(y[-1]))}")
    if absent:
        caption += f" Fewer than two points: {', '.join(absent)}."
    if not words:
        return Plot(title, caption, None, f"No run has two finite points ({', '.join(absent)}).")
    if beside is not None:
        beside(axes)
    axes.set_xlabel(axis_label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel(label)
    if show is formatting.percent:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    legend_above(axes, ncols=4 if is_wide else 2)
    alt = f"{title}. {'; '.join(words)}."
    return Plot(title, caption, svg_data_uri(figure), alt, wide=is_wide)


def _points(run: ComparedRun, axis: Axis, value: Value) -> tuple[np.ndarray, np.ndarray]:
    """The finite points of a curve."""
    x, y = axis(run), run.series(value)
    if x is None:
        return np.empty(0), np.empty(0)
    kept = np.isfinite(x) & np.isfinite(y)
    return x[kept], y[kept]


def _looks() -> Iterator[tuple[str, str | tuple[int, tuple[float, ...]]]]:
    """Colour and dashes of each run: colours first, then the next dashes."""
    return ((colour, dashes) for dashes in _DASHES for colour in LINE_COLOURS)
