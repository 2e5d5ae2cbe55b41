"""Compares two profiles in words and a plot."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from moepp_megatron.workbench.profiling.compare import (
    Change,
    ProfileComparison,
    amount,
    duration,
    in_words,
    kind_name,
)
from moepp_megatron.workbench.report.drawing import GREEN, INK, MUTED, PAPER, VERMILION, new_figure

# More than these are read in the words.
_MOST_BARS = 14


def comparison_text(comparison: ProfileComparison) -> str:
    """The comparison as text for a terminal, one sentence per line."""
    title = f"{comparison.after.name} against {comparison.before.name}"
    return "\n".join([title, *(f"  {line}" for line in in_words(comparison))])


def comparison_figure(comparison: ProfileComparison) -> Figure:
    """A bar for each change, the largest on top: left and green for less, right and red for more.

    Bars are exposed time where it is known, with a mark for the whole time; else the whole time.
    Draw it within `plot_style()`.
    """
    bars = _bars(comparison)
    figure = new_figure(8.6, 1.35 + 0.34 * len(bars))
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    unit = _unit(bars)
    for place, (_, us, marked_us, _) in enumerate(bars):
        axes.barh(place, us / unit[0], height=0.62, color=GREEN if us < 0 else VERMILION)
        if marked_us is not None:
            axes.plot(
                marked_us / unit[0], place, "D", color=INK, markerfacecolor=PAPER, markersize=4
            )
    _labels(axes, bars, unit)
    exposed = any(change.exposed for change in comparison.changes)
    of = "a rank's step" if comparison.unit == "step" else "a call"
    axes.set_xlabel(f"change of {'exposed ' if exposed else ''}time in {of} [{unit[1]}]")
    figure.suptitle(_title(comparison), x=0.01, ha="left", fontsize=10.5)
    handles: list[Patch | Line2D] = [
        Patch(color=GREEN, label="less"),
        Patch(color=VERMILION, label="more"),
    ]
    if exposed:
        handles.append(_mark())
    figure.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=8, handlelength=1.2)
    return figure


def _mark() -> Line2D:
    return Line2D(
        [],
        [],
        color=INK,
        marker="D",
        markerfacecolor=PAPER,
        markersize=4,
        linestyle="",
        label="with the part that work hides",
    )


# Name, change, change of the whole time or None, before and after in words.
_Bar = tuple[str, float, float | None, str]


def _bars(comparison: ProfileComparison) -> list[_Bar]:
    large, small = comparison.notable()
    shown, left = large[:_MOST_BARS], [*large[_MOST_BARS:], *small]
    bars: list[_Bar] = [_bar(change) for change in shown]
    bars += [(name, us, None, "") for name, us in comparison.parts_us.items()]
    bars.sort(key=lambda bar: -abs(bar[1]))
    if left:
        kinds = "1 other kind" if len(left) == 1 else f"{len(left)} other kinds"
        bars.append((kinds, sum(change.us for change in left), None, ""))
    return bars


def _bar(change: Change) -> _Bar:
    whole = None
    if change.exposed:
        before, after = change.before, change.after
        whole = (after.time_us if after else 0.0) - (before.time_us if before else 0.0)
    words = f"{duration(change.before_us)} -> {duration(change.after_us)}"
    return kind_name(change.row), change.us, whole, words


def _unit(bars: list[_Bar]) -> tuple[float, str]:
    largest = max((abs(bar[1]) for bar in bars), default=0.0)
    return (1e3, "ms") if largest >= 1e3 else (1.0, "us")


def _labels(axes: Axes, bars: list[_Bar], unit: tuple[float, str]) -> None:
    """Draw names on the left and numbers on the right, with room for both."""
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    ends = [end / unit[0] for _, us, whole, _ in bars for end in (us, whole or 0.0)]
    low, high = min(0.0, *ends, 0.0), max(0.0, *ends, 0.0)
    margin = 0.05 * (high - low) or 1.0
    axes.set_xlim(low - margin, high + margin)
    for place, (_, us, _, words) in enumerate(bars):
        sign = "+" if us > 0 else "-" if us < 0 else ""
        axes.annotate(
            f"{sign}{duration(abs(us))}" + (f"   ({words})" if words else ""),
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
            color=INK if words else MUTED,
            annotation_clip=False,
        )


def _title(comparison: ProfileComparison) -> str:
    names = f"{comparison.after.name} against {comparison.before.name}"
    before, after = comparison.before.step_us, comparison.after.step_us
    if comparison.step_us is None or before is None or after is None:
        return names
    return f"{names}\na step: {duration(before)} -> {duration(after)}, {amount(comparison.step_us)}"
