"""`scaling.html`: the result of a scaling test, and the meaning of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moepp_megatron.config import Config
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.version import __version__
from moepp_megatron.workbench.experiments.scaling.efficiency import ScaleRecord
from moepp_megatron.workbench.experiments.scaling.grid import ScalingGrid
from moepp_megatron.workbench.experiments.scaling.plots import scaling_plots, series
from moepp_megatron.workbench.experiments.scaling.runs import Measuring, ScalingRuns
from moepp_megatron.workbench.experiments.scaling.table import KIND_NAMES, MODE_TITLES, short_layout
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.cards import Card
from moepp_megatron.workbench.report.drawing import plot_style
from moepp_megatron.workbench.report.plot import Plot
from moepp_megatron.workbench.report.template import render_template


@dataclass(frozen=True)
class ModeSection:
    """One kind of scaling.

    Attributes:
        title: Heading.
        plots: Plots over rank counts.
        rows: Cells of the table, as text.
    """

    title: str
    plots: list[Plot]
    rows: list[list[str]]


@dataclass(frozen=True)
class _ScalingPage:
    """Everything that the template shows.

    Attributes:
        name: Name of the configuration.
        sentence: The main result, in words.
        warnings: What a reader must know before believing the numbers.
        facts: Short descriptions of what was measured.
        cards: Headline numbers.
        modes: Strong and weak, those that were measured.
        gaps: Points that failed or do not fit, with the reason.
        method: How it was measured.
        config_text: The configuration.
        version: Version of this package.
    """

    name: str
    sentence: str
    warnings: list[str]
    facts: list[str]
    cards: list[Card]
    modes: list[ModeSection]
    gaps: list[tuple[str, str]]
    method: str
    config_text: str
    version: str


def build_scaling_page(
    config: Config,
    grid: ScalingGrid,
    measuring: Measuring,
    folder: ScalingRuns,
    records: Sequence[ScaleRecord],
) -> Path:
    """Write `DIR/scaling.html`, which needs no other file and no network.

    Args:
        config: The given configuration, before layouts.
        grid: All requested points.
        measuring: How points are measured.
        folder: The points.
        records: Records of the finished points; at least one.

    Returns:
        Path of the page.
    """
    with plot_style():
        modes = [
            ModeSection(title, scaling_plots(records, mode), _rows(records, mode))
            for mode, title in MODE_TITLES.items()
            if any(record.mode == mode for record in records)
        ]
    page = _ScalingPage(
        name=config.run.name,
        sentence=_sentence(records),
        warnings=_warnings(records),
        facts=_facts(config, records),
        cards=_cards(records),
        modes=modes,
        gaps=_gaps(grid, folder),
        method=_method(measuring),
        config_text=config.to_yaml(),
        version=__version__,
    )
    html = render_template("scaling.html.j2", page=page)
    path = folder.path / "scaling.html"
    write_atomic(path, html.encode("ascii", "xmlcharrefreplace"))
    return path


def _is_crowded(record: ScaleRecord) -> bool:
    """Whether ranks share processor cores."""
    return record.device == "cpu" and record.nproc > record.cores * record.hosts


def _largest(records: Sequence[ScaleRecord], mode: str) -> dict[str, ScaleRecord]:
    """Records of MoE++'s fastest layout at the largest count that all kinds have, by kind.

    Counts at which ranks share cores are used only if there are no others.
    """
    lines = series([record for record in records if record.mode == mode])
    if not lines:
        return {}
    common = set.intersection(*({r.nproc for r in line.best} for line in lines))
    counts = {r.nproc for r in lines[0].best if not _is_crowded(r)} & common or common
    return {line.kind: next(r for r in line.best if r.nproc == max(counts)) for line in lines}


def _sentence(records: Sequence[ScaleRecord]) -> str:
    mode = records[0].mode
    largest = _largest(records, mode)
    moepp, vanilla = largest.get("moepp"), largest.get("vanilla")
    if moepp is None or vanilla is None:
        only = next(iter(largest.values()))
        return (
            f"On {only.nproc} ranks {KIND_NAMES[only.kind]} makes "
            f"{formatting.count(only.tokens_per_s)} tokens a second, "
            f"{formatting.percent(only.efficiency)} of perfect {mode} scaling from "
            f"{only.efficiency_nproc}."
        )
    text = (
        f"On {_ranks(moepp.nproc)} a step of MoE++ takes {moepp.step_time_s * 1e3:,.1f} ms and one "
        f"of the vanilla model with the same FFN experts {vanilla.step_time_s * 1e3:,.1f} ms"
    )
    if vanilla.a2a_bytes:
        saved = 1 - moepp.a2a_bytes / vanilla.a2a_bytes
        text += f"; it sends {formatting.percent(saved)} fewer bytes from rank to rank"
    return f"{text} ({mode} scaling)."


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _warnings(records: Sequence[ScaleRecord]) -> list[str]:
    warnings = []
    crowded = [r for r in records if _is_crowded(r)]
    if crowded:
        first = min(crowded, key=lambda r: r.nproc)
        warnings.append(
            f"From {_ranks(first.nproc)} on, ranks share {first.cores * first.hosts} processor "
            "cores: there the efficiency says how the machine is overloaded, not how the model "
            "scales, and the numbers on top are those of fewer ranks. MoE++ and vanilla still "
            "compare with each other."
        )
    machines = sorted({f"{r.device}, {r.backend}" for r in records})
    if len(machines) > 1:
        warnings.append(
            f"The points were measured on different devices ({'; '.join(machines)}); efficiency "
            "across them means little."
        )
    spread = max((r.step_time_max_s - r.step_time_min_s) / r.step_time_s for r in records)
    if spread > 0.3:
        warnings.append(
            f"Repetitions of one point differ by up to {formatting.percent(spread)}: something "
            "else used the machine. Medians and ratios within a repetition suffer less."
        )
    return warnings


def _facts(config: Config, records: Sequence[ScaleRecord]) -> list[str]:
    moe, first = config.moe, records[0]
    hosts = max(r.hosts for r in records)
    return [
        f"{config.model.num_layers} layers, hidden {config.model.hidden_size}",
        f"{moe.num_ffn_experts} FFN + {moe.num_zero_computation_experts} zero-computation experts, "
        f"top-{moe.router_topk}, tau {moe.tau:g}",
        config.precision.dtype,
        f"{first.device}, {first.backend}" + (f", {hosts} machines" if hosts > 1 else ""),
        f"dispatcher {moe.dispatcher}",
    ]


def _cards(records: Sequence[ScaleRecord]) -> list[Card]:
    cards = []
    mode = records[0].mode
    largest = _largest(records, mode)
    moepp, vanilla = largest.get("moepp"), largest.get("vanilla")
    if moepp is not None and moepp.speedup is not None:
        cards.append(
            Card(
                "Step time against vanilla",
                f"{1 / moepp.speedup:.2f}",
                f"on {_ranks(moepp.nproc)}, {mode}; median of ratios",
                accent=True,
            )
        )
    for name in MODE_TITLES:
        for kind, record in _largest(records, name).items():
            if record.nproc > record.efficiency_nproc:
                cards.append(
                    Card(
                        f"{name.capitalize()} efficiency, {KIND_NAMES[kind]}",
                        formatting.percent(record.efficiency),
                        f"{record.nproc} against {_ranks(record.efficiency_nproc)}",
                    )
                )
    if moepp is not None and vanilla is not None and vanilla.a2a_bytes:
        cards.append(
            Card(
                "All-to-all bytes against vanilla",
                f"{moepp.a2a_bytes / vanilla.a2a_bytes:.3f}",
                f"phi is {moepp.phi:.3f}",
            )
        )
    if moepp is not None and moepp.a2a_share is not None and moepp.a2a_bytes:
        cards.append(
            Card(
                "Standing still in all-to-alls",
                formatting.percent(moepp.a2a_share),
                f"of MoE++'s step on {_ranks(moepp.nproc)}"
                + (
                    f"; vanilla {formatting.percent(vanilla.a2a_share)}"
                    if vanilla is not None and vanilla.a2a_share is not None
                    else ""
                ),
            )
        )
    return cards


def _rows(records: Sequence[ScaleRecord], mode: str) -> list[list[str]]:
    rows = []
    for r in (r for r in records if r.mode == mode):
        waits = "-"
        if r.a2a_time_s is not None and r.a2a_time_min_s is not None and r.a2a_time_max_s:
            waits = (
                f"{r.a2a_time_s * 1e3:.1f} ({r.a2a_time_min_s * 1e3:.1f} to "
                f"{r.a2a_time_max_s * 1e3:.1f})"
            )
        rows.append(
            [
                str(r.nproc),
                short_layout(r.layout),
                KIND_NAMES[r.kind],
                str(r.global_batch_size),
                f"{r.step_time_s * 1e3:,.1f}",
                f"{r.step_time_min_s * 1e3:,.1f} to {r.step_time_max_s * 1e3:,.1f}",
                formatting.count(r.tokens_per_s),
                formatting.percent(r.efficiency),
                f"{r.a2a_bytes / 1e6:,.2f}",
                waits,
                "-" if r.a2a_share is None else formatting.percent(r.a2a_share),
            ]
        )
    return rows


def _gaps(grid: ScalingGrid, folder: ScalingRuns) -> list[tuple[str, str]]:
    gaps = []
    for point in grid.points:
        file = folder.read(point)
        if file is None:
            gaps.append((point.name, "not measured yet"))
        elif file.status == "failed":
            gaps.append((point.name, f"failed: {file.error}"))
    gaps += [
        (f"{_ranks(each.nproc)}, {each.layout}, {each.mode}", f"does not fit: {each.reason}")
        for each in grid.impossible
    ]
    return gaps


def _method(measuring: Measuring) -> str:
    both = len(measuring.kinds) > 1
    turns = "the two models take turns, repetition by repetition" if both else "one model alone"
    return (
        f"Each point is a job of its own: {measuring.warmup} steps of warm-up, then "
        f"{measuring.repeats} repetitions of {measuring.steps} steps; {turns}. A step is a whole "
        "training step, optimizer included, ended by a barrier, and its time is that of the "
        "slowest rank."
    )
