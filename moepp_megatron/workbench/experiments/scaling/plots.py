"""Plots of a scaling test: MoE++ and vanilla over rank counts, one set per mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from moepp_megatron.workbench.experiments.scaling.efficiency import ScaleRecord
from moepp_megatron.workbench.experiments.scaling.table import KIND_NAMES
from moepp_megatron.workbench.report.drawing import (
    BLUE,
    MUTED,
    VERMILION,
    legend_above,
    new_figure,
    svg_data_uri,
)
from moepp_megatron.workbench.report.plot import Plot

Value = Callable[[ScaleRecord], float | None]

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
    plots = [
        _step_time(lines, mode),
        _rate(lines),
        _efficiency(lines, mode),
        _against_vanilla(lines),
        _bytes(lines),
        _share(lines),
    ]
    return [plot for plot in plots if plot is not None]


def _axes(lines: list[KindSeries]) -> Axes:
    axes = new_figure().add_subplot()
    counts = sorted({r.nproc for line in lines for r in line.best})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(counts[0] / 1.19, counts[-1] * 1.19)
    axes.set_xlabel("ranks")
    return axes


def _draw(
    axes: Axes, lines: list[KindSeries], value: Value, spread: tuple[Value, Value] | None = None
) -> None:
    """Lines through the chosen layouts, rings for the others, bars from least to most."""
    for line in lines:
        colour, marker = _LOOKS[line.kind]
        points = [(r, v) for r in line.best if (v := value(r)) is not None]
        x, y = [r.nproc for r, _ in points], [v for _, v in points]
        name = KIND_NAMES[line.kind]
        axes.plot(x, y, color=colour, marker=marker, markersize=5, label=name)
        if spread is not None:
            ends = [(spread[0](r) or 0.0, spread[1](r) or 0.0) for r, _ in points]
            axes.vlines(x, [e[0] for e in ends], [e[1] for e in ends], color=colour, alpha=0.55)
        rings = [(r.nproc, v) for r in line.others if (v := value(r)) is not None]
        axes.plot(
            [x for x, _ in rings],
            [y for _, y in rings],
            color=colour,
            marker=marker,
            markersize=5,
            markerfacecolor="none",
            linestyle="none",
        )


def _others(lines: list[KindSeries]) -> str:
    shown = any(line.others for line in lines)
    return " Lines: the layout in which MoE++ is fastest. Rings: others." if shown else ""


def _ideal(axes: Axes, lines: list[KindSeries], value: Callable[[ScaleRecord, int], float]) -> None:
    """Draw perfect scaling from each model's first point."""
    counts = sorted({r.nproc for line in lines for r in line.best})
    for index, line in enumerate(lines):
        first = line.best[0]
        axes.plot(
            counts,
            [value(first, count) for count in counts],
            color=MUTED,
            linewidth=1.3,
            linestyle=":",
            label="perfect" if index == len(lines) - 1 else None,
        )


def _words(lines: list[KindSeries], value: Value, unit: str) -> str:
    """A plot in words, for readers who cannot see it."""
    return "; ".join(
        f"{KIND_NAMES[line.kind]}: "
        + ", ".join(f"{v:.3g}{unit} on {r.nproc}" for r in line.best if (v := value(r)) is not None)
        for line in lines
    )


def _finished(axes: Axes, title: str, caption: str, alt: str) -> Plot:
    legend_above(axes)
    figure = axes.get_figure(root=True)
    assert figure is not None, "made with its figure"
    return Plot(title, caption, svg_data_uri(figure), alt)


def _step_time(lines: list[KindSeries], mode: str) -> Plot:
    axes = _axes(lines)

    def milliseconds(r: ScaleRecord) -> float:
        return r.step_time_s * 1e3

    strong = mode == "strong"
    _ideal(
        axes,
        lines,
        lambda first, n: milliseconds(first) * (first.nproc / n if strong else 1.0),
    )
    spread = (lambda r: r.step_time_min_s * 1e3, lambda r: r.step_time_max_s * 1e3)
    _draw(axes, lines, milliseconds, spread)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("milliseconds")
    caption = "Median of the repetitions; bars from the fastest to the slowest."
    alt = _words(lines, milliseconds, " ms")
    return _finished(axes, "Step time", caption + _others(lines), alt)


def _rate(lines: list[KindSeries]) -> Plot:
    axes = _axes(lines)
    _ideal(axes, lines, lambda first, n: first.tokens_per_s * n / first.nproc)
    spread = (lambda r: r.tokens / r.step_time_max_s, lambda r: r.tokens / r.step_time_min_s)
    _draw(axes, lines, lambda r: r.tokens_per_s, spread)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylabel("tokens/s")
    alt = _words(lines, lambda r: r.tokens_per_s, " tokens/s")
    caption = "Tokens of a step over its time, all ranks together." + _others(lines)
    return _finished(axes, "Throughput", caption, alt)


def _efficiency(lines: list[KindSeries], mode: str) -> Plot:
    axes = _axes(lines)
    axes.axhline(1.0, color=MUTED, linewidth=1.0, linestyle=":", label="perfect")
    _draw(axes, lines, lambda r: r.efficiency)
    top = max(r.efficiency for line in lines for r in [*line.best, *line.others])
    axes.set_ylim(0, max(1.1, top * 1.05))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("efficiency")
    formula = {
        "strong": "t1 n1 / (tn n): step time at the smallest count and at n ranks.",
        "weak": "Tokens per second and rank, relative to the smallest count.",
    }[mode]
    alt = _words(lines, lambda r: r.efficiency, "")
    return _finished(axes, "Efficiency", formula + _others(lines), alt)


def _against_vanilla(lines: list[KindSeries]) -> Plot | None:
    moepp = [line for line in lines if line.kind == "moepp"]
    if not moepp or moepp[0].best[0].speedup is None:
        return None
    axes = _axes(moepp)
    axes.axhline(1.0, color=VERMILION, linewidth=1.2, label="vanilla")
    phi = moepp[0].best[0].phi
    axes.axhline(
        phi, color=MUTED, linewidth=1.0, linestyle=":", label=f"experts alone: phi = {phi:.2f}"
    )

    def relative(r: ScaleRecord) -> float | None:
        return None if r.speedup is None else 1 / r.speedup

    _draw(axes, moepp, relative)
    top = max(relative(r) or 0.0 for r in [*moepp[0].best, *moepp[0].others])
    axes.set_ylim(0, max(1.15, 1.1 * top))
    axes.set_ylabel("share of vanilla's step time")
    caption = (
        "MoE++'s step time over vanilla's, median of the ratios within a repetition. The dotted "
        "line is what would be left if a step were nothing but FFN experts: a limit, not a "
        "forecast." + _others(moepp)
    )
    return _finished(axes, "MoE++ against vanilla", caption, _words(moepp, relative, ""))


def _bytes(lines: list[KindSeries]) -> Plot:
    axes = _axes(lines)

    def megabytes(r: ScaleRecord) -> float:
        return r.a2a_bytes / 1e6

    _draw(axes, lines, megabytes)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MB per step (1e6 bytes)")
    caption = (
        "Hidden vectors that leave their ranks in a step's forward passes, all ranks together. "
        "The backward passes send as much again." + _others(lines)
    )
    return _finished(axes, "All-to-all bytes", caption, _words(lines, megabytes, " MB"))


def _share(lines: list[KindSeries]) -> Plot:
    title = "All-to-all share of time"
    if all(r.a2a_share is None for line in lines for r in line.best):
        return Plot(title, "", None, "This dispatcher has no all-to-alls that could be timed.")
    axes = _axes(lines)
    _draw(axes, lines, lambda r: r.a2a_share)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("share of the step")
    caption = (
        "Time in which a rank waits in all-to-alls, mean over ranks, of the whole step; "
        "measured in separate steps. Waiting for a rank that comes late is part of it."
        + _others(lines)
    )
    return _finished(axes, title, caption, _words(lines, lambda r: r.a2a_share, " of the step"))
