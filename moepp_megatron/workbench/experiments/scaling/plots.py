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


@dataclass(frozen=True)
class _Drawn:
    """One quantity over rank counts."""

    # title: Heading.
    # unit: Label of the vertical axis; "%" for shares.
    # caption: Text below.
    # value: The quantity; None where it was not measured.
    # ends: The least and the largest of the repetitions.
    # perfect: Perfect scaling of a model's first record, at another count.
    # top: What the vertical axis reaches at least.

    title: str
    unit: str
    caption: str
    value: Value
    ends: tuple[Value, Value] | None = None
    perfect: Callable[[ScaleRecord, int], float] | None = None
    top: float = 0.0


def _relative(r: ScaleRecord) -> float | None:
    return None if r.kind != "moepp" or r.speedup is None else 1 / r.speedup


_EFFICIENCY = _Drawn(
    "Efficiency", "%",
    "Tokens per second and rank, relative to the smallest count.",
    lambda r: r.efficiency, perfect=lambda first, n: 1.0, top=1.1,
)  # fmt: skip
_RATE = _Drawn(
    "Throughput", "tokens/s", "Tokens of a step over its time, all ranks together.",
    lambda r: r.tokens_per_s,
    (lambda r: r.tokens / r.step_time_max_s, lambda r: r.tokens / r.step_time_min_s),
    lambda first, n: first.tokens_per_s * n / first.nproc,
)  # fmt: skip
_AGAINST_VANILLA = _Drawn(
    "MoE++ against vanilla", "share of vanilla's step time",
    "Median of the ratios within a repetition. The dotted line is phi, what would be left if a "
    "step were nothing but FFN experts: a limit, not a forecast.",
    _relative, perfect=lambda first, n: first.phi, top=1.1,
)  # fmt: skip
_BYTES = _Drawn(
    "All-to-all bytes", "MB per step",
    "Hidden vectors that leave their ranks in a step's forward passes, all ranks together. The "
    "backward passes send as much again.",
    lambda r: r.a2a_bytes / 1e6,
)  # fmt: skip
_SHARE = _Drawn(
    "All-to-all share of time", "%",
    "Time in which a rank waits in all-to-alls, mean over ranks, of the whole step; measured in "
    "separate steps. Waiting for a rank that comes late is part of it.",
    lambda r: r.a2a_share,
)  # fmt: skip


def _step_time(mode: str) -> _Drawn:
    return _Drawn(
        "Step time", "ms", "Median of the repetitions; bars from the fastest to the slowest.",
        lambda r: r.step_time_s * 1e3,
        (lambda r: r.step_time_min_s * 1e3, lambda r: r.step_time_max_s * 1e3),
        lambda first, n: first.step_time_s * 1e3 * (first.nproc / n if mode == "strong" else 1.0),
    )  # fmt: skip


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
    drawn = [_step_time(mode), _RATE, _EFFICIENCY, _AGAINST_VANILLA, _BYTES, _SHARE]
    return [plot for one in drawn if (plot := _plot(one, lines)) is not None]


def _plot(drawn: _Drawn, lines: Sequence[KindSeries]) -> Plot | None:
    """Lines through the chosen layouts, rings for the others; None where nothing was measured."""
    lines = [line for line in lines if any(drawn.value(r) is not None for r in line.best)]
    if not lines:
        return None
    axes = _axes(lines)
    for line in lines:
        _draw(axes, line, drawn)
    axes.set_ylim(0, max(axes.get_ylim()[1], drawn.top))
    axes.set_ylabel("" if drawn.unit == "%" else drawn.unit)
    axes.yaxis.set_major_formatter(
        PercentFormatter(1.0, decimals=0)
        if drawn.unit == "%"
        else FuncFormatter(lambda value, _: f"{value:,.6g}")
    )
    legend_above(axes)
    caption = drawn.caption
    if any(line.others for line in lines):
        caption += " Lines: the layout in which MoE++ is fastest. Rings: others."
    figure = axes.get_figure(root=True)
    assert figure is not None, "made with its figure"
    return Plot(drawn.title, caption, svg_data_uri(figure), _words(drawn, lines))


def _axes(lines: Sequence[KindSeries]) -> Axes:
    axes = new_figure().add_subplot()
    counts = sorted({r.nproc for line in lines for r in line.best})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(counts[0] / 1.19, counts[-1] * 1.19)
    axes.set_xlabel("ranks")
    return axes


def _draw(axes: Axes, line: KindSeries, drawn: _Drawn) -> None:
    colour, marker = _LOOKS[line.kind]
    if drawn.perfect is not None:
        counts = [r.nproc for r in line.best]
        perfect = [drawn.perfect(line.best[0], count) for count in counts]
        axes.plot(counts, perfect, color=MUTED, linewidth=1.3, linestyle=":")
    points = [(r, v) for r in line.best if (v := drawn.value(r)) is not None]
    x, y = [r.nproc for r, _ in points], [v for _, v in points]
    axes.plot(x, y, color=colour, marker=marker, markersize=5, label=KIND_NAMES[line.kind])
    if drawn.ends is not None:
        low, high = ([end(r) or 0.0 for r, _ in points] for end in drawn.ends)
        axes.vlines(x, low, high, color=colour, alpha=0.55)
    rings = [(r.nproc, v) for r in line.others if (v := drawn.value(r)) is not None]
    for x_ring, y_ring in rings:
        axes.plot(x_ring, y_ring, marker, color=colour, markersize=5, markerfacecolor="none")


def _words(drawn: _Drawn, lines: Sequence[KindSeries]) -> str:
    """A plot in words, for readers who cannot see it."""
    return "; ".join(
        f"{KIND_NAMES[line.kind]}, {drawn.unit}: "
        + ", ".join(f"{v:.3g} on {r.nproc}" for r in line.best if (v := drawn.value(r)) is not None)
        for line in lines
    )
