"""Plots of a scaling test: MoE++ and vanilla over rank counts, one set per mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from moepp_megatron.tools.experiments.scaling.records import ScaleRecord
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import Plot
from moepp_megatron.tools.report.drawing import BLUE, VERMILION
from moepp_megatron.tools.report.lines import Frame, PlotLine, line_plot
from moepp_megatron.tools.report.series import finite

KIND_NAMES = {"moepp": "MoE++", "vanilla": "vanilla"}
_LOOKS = {"moepp": (BLUE, "o"), "vanilla": (VERMILION, "s")}


@dataclass(frozen=True)
class KindSeries:
    """One model over rank counts.

    Attributes:
        kind: "moepp" or "vanilla".
        best: Records of MoE++'s fastest layout at each count, the same for both models, so that
            only the model differs.
        others: Other layouts.
    """

    kind: str
    best: list[ScaleRecord]
    others: list[ScaleRecord]


def series(records: Sequence[ScaleRecord]) -> list[KindSeries]:
    """One series per model, MoE++ first; `records` are of one mode."""
    kinds = [kind for kind in _LOOKS if any(r.kind == kind for r in records)]
    chosen: dict[int, ScaleRecord] = {}
    for r in (r for r in records if r.kind == kinds[0]):
        if r.nproc not in chosen or r.step_time_s < chosen[r.nproc].step_time_s:
            chosen[r.nproc] = r
    layouts = {(nproc, r.layout) for nproc, r in chosen.items()}
    return [
        KindSeries(
            kind,
            sorted(
                (r for r in records if r.kind == kind and (r.nproc, r.layout) in layouts),
                key=lambda r: r.nproc,
            ),
            [r for r in records if r.kind == kind and (r.nproc, r.layout) not in layouts],
        )
        for kind in kinds
    ]


def scaling_plots(records: Sequence[ScaleRecord], mode: str) -> list[Plot]:
    """The plots of one mode."""
    lines = series([r for r in records if r.mode == mode])
    phi = lines[0].best[0].phi
    return [
        _plot(
            lines,
            "Step time",
            "ms",
            "Median of the repetitions; bars from the fastest to the "
            "slowest. Dotted: perfect scaling.",
            lambda r: r.step_time_s * 1e3,
            lambda r: (r.step_time_min_s * 1e3, r.step_time_max_s * 1e3),
            lambda first, n: first.step_time_s * 1e3 * (first.nproc / n if mode == "strong" else 1),
        ),
        _plot(
            lines,
            "Throughput",
            "tokens/s",
            "Tokens of a step over its time, all ranks together.",
            lambda r: r.tokens_per_s,
            lambda r: (r.tokens / r.step_time_max_s, r.tokens / r.step_time_min_s),
            lambda first, n: first.tokens_per_s * n / first.nproc,
        ),
        _plot(
            lines,
            "Efficiency",
            "%",
            "Tokens per second and rank, relative to the smallest count.",
            lambda r: r.efficiency,
            level=("perfect", 1.0),
        ),
        _plot(
            lines,
            "MoE++ against vanilla",
            "share of vanilla's step time",
            "Median of the ratios within a repetition. phi is what would be left if a step were "
            "nothing but FFN experts: a limit, not a forecast.",
            lambda r: None if r.kind != "moepp" or r.speedup is None else 1 / r.speedup,
            level=("phi", phi),
        ),
        _plot(
            lines,
            "All-to-all bytes",
            "MB per step",
            "Hidden vectors that leave their ranks in a step's forward passes, all ranks together. "
            "The backward passes send as much again.",
            lambda r: r.a2a_bytes / 1e6,
        ),
    ]


def _plot(
    lines: Sequence[KindSeries],
    title: str,
    unit: str,
    caption: str,
    value: Callable[[ScaleRecord], float | None],
    ends: Callable[[ScaleRecord], tuple[float, float]] | None = None,
    perfect: Callable[[ScaleRecord, int], float] | None = None,
    level: tuple[str, float] | None = None,
) -> Plot:
    """A quantity through the chosen layouts, and rings for the others."""

    def line(each: KindSeries, records: Sequence[ScaleRecord]) -> PlotLine:
        colour, marker = _LOOKS[each.kind]
        values = np.array([value(r) for r in records], dtype=np.float64)
        points = finite(np.array([r.nproc for r in records], dtype=np.float64), values)
        return PlotLine(KIND_NAMES[each.kind], points, colour, marker=marker)

    drawn = [line(each, each.best) for each in lines]

    def change(axes: Axes) -> None:
        counts = sorted({r.nproc for each in lines for r in each.best})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(counts[0] / 1.19, counts[-1] * 1.19)
        for each in lines:
            colour, _ = _LOOKS[each.kind]
            if perfect is not None:
                ideal = [perfect(each.best[0], count) for count in counts]
                axes.plot(counts, ideal, color=colour, linewidth=1.3, linestyle=":")
            if ends is not None:
                bars = [ends(r) for r in each.best]
                axes.vlines(
                    [r.nproc for r in each.best], *zip(*bars, strict=True), color=colour, alpha=0.55
                )
            rings = line(each, each.others)
            axes.plot(*rings.points, rings.marker, color=colour, markerfacecolor="none")
        axes.autoscale(axis="y")
        axes.set_ylim(0, axes.get_ylim()[1] * (1.1 if level else 1))

    if any(each.others for each in lines):
        caption += " Lines: the layout in which MoE++ is fastest. Rings: others."
    is_share = unit == "%"
    frame = Frame(
        "" if is_share else unit,
        formatting.percent if is_share else formatting.significant,
        x="ranks",
        levels=[level] if level else (),
        change=change,
    )
    return line_plot(title, caption, drawn, frame)
