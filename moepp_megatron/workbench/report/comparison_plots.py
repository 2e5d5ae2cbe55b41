"""The curves of several runs over each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes

from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.comparison import ComparedRun
from moepp_megatron.workbench.report.drawing import LINE_COLOURS, short_name
from moepp_megatron.workbench.report.lines import Dashes, Frame, Line, line_plot
from moepp_megatron.workbench.report.plot import Plot
from moepp_megatron.workbench.report.series import finite, values

_DASHES: tuple[Dashes, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
# Colours first, then the next dashes.
_LOOKS = [(colour, dashes) for dashes in _DASHES for colour in LINE_COLOURS]

Axis = Callable[[ComparedRun], np.ndarray | None]


def comparison_plots(runs: Sequence[ComparedRun]) -> list[Plot]:
    """Loss over tokens, time and FLOPs; FFN share and step time over tokens."""

    def validation(axes: Axes) -> None:
        for run, (colour, _) in zip(runs, _LOOKS, strict=False):
            x, y = finite(run.tokens, values(run.data.records, "valid_loss"))
            axes.plot(x, y, "D", color=colour, markersize=4.5)

    loss, seconds = "loss (nats)", "training time (s)"
    return [
        _plot(runs, "Loss over tokens", _tokens, "loss",
              "Token mean over the global batch. Diamonds: validation loss.",
              Frame(loss, x="tokens", wide=True, height=4.0, change=validation)),
        _plot(runs, "Loss over time", lambda r: r.seconds, "loss",
              "Time in training steps, without start, evaluation and checkpoints. It compares "
              "machines and layouts as well as models.", Frame(loss, x=seconds, height=3.6)),
        _plot(runs, "Loss over FLOPs", lambda r: r.flops, "loss",
              "Forward and backward pass; experts that tokens did not take do not count.",
              Frame(loss, x="model FLOP", height=3.6)),
        _plot(runs, "FFN share of all selections", _tokens, "ffn_fraction",
              "What lies below 100% is expert work that was not done.",
              Frame("FFN share", formatting.percent, "tokens", 0, 1.02, height=3.6)),
        _plot(runs, "Step time", _tokens, "step_time_s",
              "Wall time of a step. Single slow steps, as the first, may lie above the picture.",
              Frame("seconds", x="tokens", height=3.6, change=_without_peaks)),
    ]  # fmt: skip


def _tokens(run: ComparedRun) -> np.ndarray:
    return run.tokens


def _without_peaks(axes: Axes) -> None:
    """Cut the axis where the first step, which warms up, would flatten all others."""
    medians = [np.median(np.asarray(line.get_ydata(), np.float64)) for line in axes.get_lines()]
    axes.set_ylim(0, min(axes.get_ylim()[1], 3 * max(medians)))


def _plot(
    runs: Sequence[ComparedRun], title: str, axis: Axis, key: str, caption: str, frame: Frame
) -> Plot:
    """One number of all runs over one axis; runs without two points are named instead."""
    lines, absent = [], []
    for run, (colour, dashes) in zip(runs, _LOOKS, strict=False):
        x = axis(run)
        points = finite(*(2 * [np.empty(0)] if x is None else (x, values(run.data.records, key))))
        if len(points.x) < 2:
            absent.append(run.name)
        else:
            lines.append(Line(short_name(run.name), points, colour, dashes))
    if absent:
        caption += f" Fewer than two points: {', '.join(absent)}."
    if not lines:
        return Plot(title, caption, None, f"No run has two finite points ({', '.join(absent)}).")
    plot = line_plot(title, caption, lines, frame)
    return dataclasses.replace(plot, alt=f"{title}. {plot.alt}")
