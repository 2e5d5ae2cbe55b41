"""Shows results of `moepp bench collectives`: tables in the form of nccl-tests, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from rich.table import Table
from rich.text import Text

from moepp_megatron.workbench.bench.collective_cases import KINDS
from moepp_megatron.workbench.bench.collectives import CollectiveResult
from moepp_megatron.workbench.report.drawing import BLUE, GREEN, INK, VERMILION, png_figure
from moepp_megatron.workbench.report.terminal import titled_table, wide_console

# Okabe and Ito's palette, a marker each for print.
_LOOKS = {
    "all-to-all": (VERMILION, "o", "-"),
    "all-to-all uneven": (VERMILION, "o", ":"),
    "all-reduce": (BLUE, "s", "-"),
    "all-gather": (GREEN, "^", "-"),
    "reduce-scatter": ("#cc79a7", "v", "-"),
    "send/receive": (INK, "D", "-"),
}


def label(result: CollectiveResult) -> str:
    """Name of the operation in tables."""
    return next(
        kind.label
        for kind in KINDS.values()
        if (kind.operation.value, kind.even) == (result.operation, result.even)
    )


def _binary_size(size: float) -> str:
    """Bytes in the form of nccl-tests' options: 4K, 16M."""
    for unit, name in ((2**30, "G"), (2**20, "M"), (2**10, "K")):
        if size >= unit:
            return f"{size / unit:.4g}{name}"
    return f"{size:.0f}"


def print_tables(results: Sequence[CollectiveResult]) -> None:
    """Print one table per group size."""
    console = wide_console(highlight=True, width=100)
    for size in dict.fromkeys(r.group_size for r in results):
        console.print(_table([r for r in results if r.group_size == size]))
    console.print(
        "Time of a call: median over repetitions, each of its slowest rank. algbw = size / time, "
        "busbw by nccl-tests' factors, GB = 1e9 bytes. Groups of neighbouring ranks work at the "
        "same time. Uneven: rank p of n receives (p + 1) / n of what the last one receives, which "
        "is the size."
    )


def _table(results: Sequence[CollectiveResult]) -> Table:
    first = results[0]
    nodes = f", over {first.nodes} machines" if first.nodes > 1 else ""
    title = f"Groups of {first.group_size} ranks{nodes}, {first.backend}"
    names = ("size B", "count", "type", "time us", "algbw GB/s", "busbw GB/s", "wrong")
    table = titled_table(title, "operation", *names, words=1, narrow=True)
    before = label(first)
    for r in results:
        name = label(r)
        if name != before:
            table.add_section()
        table.add_row(
            name if name != before or r is first else "",
            str(r.size_bytes),
            str(r.count),
            r.dtype,
            f"{r.time_us:.1f}",
            f"{r.algorithm_gb_s:.3f}",
            f"{r.bus_gb_s:.3f}",
            Text(str(r.wrong), style="bold red" if r.wrong else ""),
        )
        before = name
    return table


def plot(path: Path, results: Sequence[CollectiveResult]) -> None:
    """Plot bus bandwidth over size, one line per operation, one panel per group size."""
    sizes = list(dict.fromkeys(r.group_size for r in results))
    with png_figure(path, 1.8 + 4.2 * len(sizes), 3.9) as figure:
        panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
        for axes, size in zip(panels, sizes, strict=True):
            _panel(axes, [r for r in results if r.group_size == size])
        panels[0].set_ylabel("bus bandwidth, GB/s")
        first = results[0]
        figure.suptitle(
            f"Collectives alone ({first.backend}, {first.dtype})", x=0.01, ha="left", fontsize=11
        )
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", fontsize=8.5)


def _panel(axes: Axes, results: Sequence[CollectiveResult]) -> None:
    for name in dict.fromkeys(label(r) for r in results):
        colour, marker, line = _LOOKS[name]
        chosen = sorted((r for r in results if label(r) == name), key=lambda r: r.size_bytes)
        axes.plot(
            [r.size_bytes for r in chosen],
            [r.bus_gb_s for r in chosen],
            color=colour,
            marker=marker,
            linestyle=line,
            markersize=4,
            linewidth=1.5,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _binary_size(value)))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("size, bytes")
    axes.set_title(f"{results[0].group_size} ranks", loc="left", fontsize=10)
