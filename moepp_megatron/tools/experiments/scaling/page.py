"""The records of a scaling test: `scale.json`, `scaling.html`, and the table in the terminal.

Efficiency is tokens per second and rank, relative to the smallest rank count that was measured:

    strong   t_1 n_1 / (t_n n_n): 1 where twice the ranks take half the time for the same batch
    weak     (tokens/s / n)_n / (tokens/s / n)_1: 1 where a rank is not slowed down by company

Both are the same expression, since the batch is constant in strong scaling. Where several layouts
were measured at the smallest count, the fastest one is the reference. MoE++ is compared with MoE++,
vanilla with vanilla.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moepp_megatron.tools.experiments.scaling.points import MODES, Point
from moepp_megatron.tools.experiments.timed_step import BothSteps
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import (
    Block,
    Cell,
    Page,
    PageSection,
    Plot,
    Table,
    Text,
    number,
    write_blocks,
)
from moepp_megatron.tools.report.drawing import LINE_COLOURS, plot_style
from moepp_megatron.tools.report.lines import Frame, PlotLine, line_plot
from moepp_megatron.tools.report.series import Series
from moepp_megatron.tools.report.terminal import print_uncut, table_of

_NAMES = {"moepp": "MoE++", "vanilla": "vanilla"}
_HEAD = (
    *("Scaling", "Ranks", "Layout", "Model", "Batch", "Step, ms", "Tokens/s", "Efficiency"),
    *("Of vanilla's", "All-to-all, MB"),
)


@dataclass(frozen=True)
class _ScaleRecord:
    """One model at one point in one mode, an object of scale.json."""

    nproc: int
    layout: str  # as for `--layout`
    kind: str  # "moepp" or "vanilla"
    mode: str  # "strong" or "weak"
    global_batch_size: int
    step_time_s: float  # median
    tokens_per_s: float  # all ranks
    efficiency: float  # see the top of the file
    speedup: float  # vanilla's step time over MoE++'s at this point, median of the rounds' ratios
    a2a_bytes: int  # hidden vectors' bytes that leave their ranks, forward, as in metrics.jsonl
    a2a_time_s: float | None  # each waited for at once, mean over ranks; None: other dispatchers


def scale_records(results: Mapping[Point, BothSteps]) -> list[_ScaleRecord]:
    """Records of the finished points, by mode, rank count, layout and kind."""
    records = []
    for mode in MODES:
        done = [(point, both) for point, both in results.items() if mode in point.modes]
        fewest = min((point.nproc for point, _ in done), default=0)
        reference = {
            kind: max(_rate(both, kind) for point, both in done if point.nproc == fewest)
            for kind in (_NAMES if done else ())
        }
        for point, both in done:
            for kind, first in reference.items():
                rate = _rate(both, kind)
                record = _ScaleRecord(
                    nproc=point.nproc,
                    layout=point.layout,
                    kind=kind,
                    mode=mode,
                    global_batch_size=point.global_batch_size,
                    step_time_s=getattr(both, f"{kind}_ms") / 1e3,
                    tokens_per_s=rate,
                    efficiency=(rate / point.nproc) / (first / fewest),
                    speedup=both.speedup,
                    a2a_bytes=getattr(both, f"{kind}_a2a_bytes"),
                    a2a_time_s=getattr(both, f"{kind}_a2a_time_s"),
                )
                records.append(record)
    return records


def _rate(both: BothSteps, kind: str) -> float:
    """Tokens per second, all ranks."""
    milliseconds: float = getattr(both, f"{kind}_ms")
    return both.tokens / milliseconds * 1e3


def print_records(records: Sequence[_ScaleRecord]) -> None:
    """Print the table."""
    print_uncut(table_of(_table(records)))


def write_scaling_page(
    path: Path, name: str, records: Sequence[_ScaleRecord], missing: Sequence[str]
) -> None:
    """Write the page, which needs no other file and no network; ReportError if it cannot."""
    modes = [mode for mode in MODES if any(record.mode == mode for record in records)]
    with plot_style():
        plots = [_plot(mode, [r for r in records if r.mode == mode]) for mode in modes]
    left = [f"{name} has no result; DIR/logs/{name}.log may say why." for name in missing]
    blocks: list[Block] = [*plots, _table(records), Text(left, "note")]
    page = Page(
        kind="MoE++ scaling test",
        title=name,
        sections=[PageSection("", blocks)],
        sources="points/*.json",
        command="moepp scale",
    )
    write_blocks(path, page)


def _table(records: Sequence[_ScaleRecord]) -> Table:
    rows = []
    for r in records:
        rows.append(
            [
                Cell(r.mode),
                number(str(r.nproc)),
                Cell(_short_layout(r.layout)),
                Cell(_NAMES[r.kind]),
                number(str(r.global_batch_size)),
                number(f"{r.step_time_s * 1e3:,.1f}"),
                number(formatting.count(r.tokens_per_s)),
                number(formatting.percent(r.efficiency)),
                number(f"{1 / r.speedup:.2f}" if r.kind == "moepp" else ""),
                number(f"{r.a2a_bytes / 1e6:,.2f}"),
            ]
        )
    return Table(_HEAD, rows)


def _short_layout(layout: str) -> str:
    """Degrees above 1, such as "EP2 TP2"; degrees of 1 are left out."""
    pairs = (part.split("=") for part in layout.split(","))
    return " ".join(f"{key.upper()}{number}" for key, number in pairs if number != "1") or "-"


def _plot(mode: str, records: Sequence[_ScaleRecord]) -> Plot:
    """Efficiency over rank counts, of each model in its fastest layout."""
    lines = []
    for (kind, name), colour in zip(_NAMES.items(), LINE_COLOURS, strict=False):
        fastest: dict[int, float] = {}
        for r in records:
            if r.kind == kind:
                fastest[r.nproc] = max(r.efficiency, fastest.get(r.nproc, 0.0))
        points = Series(np.array([*fastest], float), np.array([*fastest.values()], float))
        lines.append(PlotLine(name, points, colour, marker="o"))
    frame = Frame(
        "efficiency",
        formatting.percent,
        x="ranks",
        bottom=0.0,
        levels=[("perfect", 1.0)],
        change=lambda axes: axes.set_xscale("log", base=2),
    )
    return line_plot(f"{mode.capitalize()} scaling", "", lines, frame)
