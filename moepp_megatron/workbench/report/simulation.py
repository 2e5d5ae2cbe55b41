"""`moepp plan --simulate` on the terminal, and its plot: step times, and one step's pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.patches import Patch, Rectangle
from rich.table import Table

from moepp_megatron.workbench.planning.simulation.result import Timeline
from moepp_megatron.workbench.planning.simulation.study import Study
from moepp_megatron.workbench.report.drawing import BLUE, GREEN, INK, MUTED, VERMILION, png_figure
from moepp_megatron.workbench.report.terminal import titled_table, wide_console

_KINDS = {
    "forward": ("forward", BLUE),
    "backward": ("backward", GREEN),
    "both": ("both together", "#cc79a7"),
}


def print_study(study: Study) -> None:
    """Print step times, the cost of each cause, the gain of other exchanges, and goodput."""
    console = wide_console()
    played = study.played
    each = played.ranks_per_column
    a_stage = (
        " a stage" if any(bar.rank for bar in played.timeline.bars) else ", without a pipeline,"
    )
    console.print(
        f"simulated: {len(played.totals):,} steps of layout 1, {played.passes:,} passes per step "
        f"on {_number(played.columns, 'column')} of {_number(each, 'rank')}{a_stage} that move "
        f"together, {played.held_up:.1%} of them with a slow node; seed {study.assumptions.seed}",
        soft_wrap=True,
    )
    console.print(_steps(study))
    console.print(_causes(study))
    if study.choices:
        console.print(_choices(study))
    if study.others:
        console.print(_others(study))
    console.print(_goodput(study))


def _number(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def _table(title: str, *columns: str) -> Table:
    table = titled_table(title)
    table.add_column(columns[0])
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _steps(study: Study) -> Table:
    played = study.played
    table = _table("step time, seconds", "", "median", "p95", "p99", "max", "work", "bubble")
    for name, one in (("even, nothing slow", study.even), ("as assumed", played)):
        quantiles = (one.median, one.quantile(0.95), one.quantile(0.99), float(one.totals.max()))
        # What is left after everything else may be rounding below 0.
        shares = (one.work, max(one.bubble, 0.0))
        mean = float(one.totals.mean())
        table.add_row(
            name, *(f"{value:.3f}" for value in quantiles), *(f"{s / mean:.1%}" for s in shares)
        )
    table.caption = f"the plan's formula at even load: {study.planned_s:.3f}"
    return table


def _causes(study: Study) -> Table:
    even = study.even.median
    table = _table("what the tail costs", "cause alone", "mean step s", "against even")
    rows = [*study.causes.items(), ("all together", float(study.played.totals.mean()))]
    for name, seconds in rows:
        change = seconds / even - 1
        table.add_row(name, f"{seconds:.3f}", "none" if abs(change) < 5e-4 else f"{change:+.1%}")
    return table


def _choices(study: Study) -> Table:
    table = _table("another exchange, all causes", "", "mean step s", "change")
    base = None
    for number, (name, seconds) in enumerate(study.choices.items()):
        # They come in pairs: without, with.
        base = seconds if number % 2 == 0 else base
        assert base is not None, "the first of a pair has no partner before it"
        table.add_row(name, f"{seconds:.3f}", f"{seconds / base - 1:+.1%}" if number % 2 else "-")
    return table


def _others(study: Study) -> Table:
    table = _table("layouts again, all causes", "", "formula s", "mean step s", "against 1")
    base = float(study.played.totals.mean())
    table.add_row("1", "", f"{base:.3f}", "-")
    for number, (planned, seconds) in enumerate(study.others, start=2):
        change = f"{seconds / base - 1:+.1%}"
        table.add_row(str(number), f"{planned:.3f}", f"{seconds:.3f}", change)
    return table


def _goodput(study: Study) -> Table:
    goodput, faults = study.goodput, study.assumptions.faults
    title = f"{len(goodput.share):,} runs of {study.assumptions.days:g} days"
    table = _table(title, "", "")
    table.show_header = False
    low, middle = np.quantile(goodput.share, (0.05, 0.5))
    chosen = "best (Daly)" if faults.checkpoint_s is None else "as set"
    rows = (
        ("goodput: time spent on steps that are kept", f"{middle:.2%} (p5 {low:.2%})"),
        ("the same by Daly's formula", f"{goodput.expected:.2%}"),
        ("checkpoints", f"{goodput.saving:.2%}, every {goodput.interval_s / 60:.1f} min {chosen}"),
        ("steps done again", f"{goodput.lost:.2%}"),
        ("restarts", f"{goodput.restarting:.2%}, {goodput.failures:.1f} failures a run"),
        ("tokens/s in the long term", f"{study.tokens_per_s:,.0f}"),
    )
    for name, value in rows:
        table.add_row(name, value)
    return table


def varies(study: Study) -> bool:
    """Whether steps differ by more than rounding.

    Without a pipeline and with every expert on each rank, no rank waits because of unevenness.
    """
    totals = study.played.totals
    return bool(np.ptp(totals) > 1e-6 * np.median(totals))


def plot_study(path: Path, study: Study, title: str) -> None:
    """Plot the distribution of step times above one step's passes by pipeline rank."""
    timeline = study.played.timeline
    ranks = 1 + max(bar.rank for bar in timeline.bars)
    height = max(1.6, 0.32 * ranks + 0.9)
    is_varied = varies(study)
    with png_figure(path, 10.5, (3.0 if is_varied else 0.9) + height) as figure:
        if is_varied:
            upper, lower = figure.subplots(2, 1, height_ratios=(2.4, height))
            _draw_steps(upper, study)
        else:
            lower = figure.subplots()
            title += f": every step takes {study.played.median:.3f} s, for nothing in it varies"
        figure.suptitle(title, x=0.01, ha="left", color=INK)
        _draw_timeline(lower, timeline, ranks, study.played.columns)


def _draw_steps(axis: Axes, study: Study) -> None:
    played = study.played
    axis.hist(played.totals, bins=min(40, max(len(played.totals) // 5, 5)), color=BLUE, alpha=0.8)
    lines = (
        ("even load, nothing slow", study.even.median, GREEN),
        ("median", played.median, INK),
        ("p99", played.quantile(0.99), VERMILION),
    )
    for name, place, colour in lines:
        axis.axvline(place, color=colour, label=f"{name} {place:.3f} s")
    axis.set_xlabel("seconds per step")
    axis.set_ylabel("steps")
    axis.grid(axis="x", visible=False)
    axis.legend(loc="lower left", ncols=3, fontsize=8.5, bbox_to_anchor=(0.0, 1.0))


def _draw_timeline(axis: Axes, timeline: Timeline, ranks: int, columns: int) -> None:
    """Draw one step's passes: white is idle, later model chunks are darker.

    Args:
        axis: Empty axes.
        timeline: Timeline of the column that ends last.
        ranks: Pipeline ranks; 1 without a pipeline.
        columns: Data-parallel columns that wait for each other at the end.
    """
    chunks = 1 + max(bar.chunk for bar in timeline.bars)
    for kind, (_, colour) in _KINDS.items():
        for chunk in range(chunks):
            boxes = [
                Rectangle((bar.start, bar.rank - 0.4), bar.end - bar.start, 0.8)
                for bar in timeline.bars
                if bar.kind == kind and bar.chunk == chunk
            ]
            shade = 0.45 + 0.55 * (chunk + 1) / chunks
            # Edges would hide the passes where there are thousands.
            width = 0.3 if len(timeline.bars) < 3000 else 0.0
            axis.add_collection(
                PatchCollection(
                    boxes, facecolor=colour, alpha=shade, edgecolor="white", linewidth=width
                )
            )
    end = max(bar.end for bar in timeline.bars)
    if timeline.total > end:
        axis.add_patch(Rectangle((end, -0.4), timeline.total - end, ranks - 0.2, color="#e69f00"))
    axis.set_xlim(0, timeline.total)
    axis.set_ylim(ranks - 0.4, -0.6)
    if ranks > 1:
        axis.set_yticks(range(ranks))
        axis.set_ylabel("pipeline rank")
    else:
        axis.set_yticks([0], ["no pipeline"])
    column = "; the column that ends last" if columns > 1 else ""
    axis.set_xlabel(f"seconds from the step's start; white: idle{column}")
    axis.grid(visible=False)
    used = {bar.kind for bar in timeline.bars}
    handles = [
        Patch(color=colour, label=name) for kind, (name, colour) in _KINDS.items() if kind in used
    ]
    if timeline.total > end:
        waiting = "waiting for other columns, gradients, optimizer"
        label = waiting if columns > 1 else "gradients, optimizer"
        handles.append(Patch(color="#e69f00", label=label))
    axis.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=4,
        fontsize=8.5,
        labelcolor=MUTED,
    )
