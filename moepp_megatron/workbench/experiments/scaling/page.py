"""`scaling.html`: the result of a scaling test, and the meaning of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moepp_megatron.config import Config
from moepp_megatron.workbench.experiments.scaling.efficiency import ScaleRecord
from moepp_megatron.workbench.experiments.scaling.grid import ScalingGrid
from moepp_megatron.workbench.experiments.scaling.plots import scaling_plots, series
from moepp_megatron.workbench.experiments.scaling.runs import Measuring, ScalingRuns
from moepp_megatron.workbench.experiments.scaling.table import KIND_NAMES, MODE_TITLES, short_layout
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.blocks import (
    Cell,
    Page,
    Section,
    Table,
    Text,
    number,
    write_blocks,
)
from moepp_megatron.workbench.report.cards import Card
from moepp_megatron.workbench.report.drawing import plot_style

_HEAD = (
    *("Ranks", "Layout", "Model", "Batch", "Step, ms", "Fastest, slowest", "Tokens/s"),
    *("Efficiency", "All-to-all, MB", "Waiting, ms (ranks)", "Share"),
)
_TERMS = (
    (
        "Routing and data",
        "Routing is held at perfect balance: FFN experts get exactly the share phi of all "
        "selections, in vanilla all of them, every expert as many as any other. Tokens are random. "
        "So nothing here depends on training, or says how balanced a trained router is.",
    ),
    (
        "Efficiency",
        "Strong scaling keeps the global batch: t1 n1 / (tn n), with t1 the step time at the "
        "smallest count n1. Weak scaling keeps the batch of a rank: tokens per second and rank, "
        "relative to the smallest count. Each model is compared with itself; where several layouts "
        "were measured at the smallest count, with its fastest.",
    ),
    (
        "Layout",
        "TP tensor, PP pipeline, CP context, EP expert, ETP expert-tensor parallel ranks; those of "
        "1 are left out, and the rest of the ranks is data parallel.",
    ),
    (
        "All-to-all bytes",
        "Bytes of hidden vectors that leave their ranks in the forward passes of a step, all ranks "
        "and layers, counted from the routing (a2a_bytes in metrics.jsonl). scale.json also has "
        "a2a_sent_bytes: forward and backward, counted at the call.",
    ),
    (
        "Waiting in all-to-alls",
        "With gloo the host's time inside all-to-alls and inside waiting for them; with NCCL the "
        "time that the compute stream waits for them. Transfers that hide behind computation do "
        "not count, waiting for a rank that comes late does. Mean over ranks, in parentheses the "
        "least and the most; medians over steps that were not used for the step time.",
    ),
)


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

    Raises:
        ReportError: It cannot be written.
    """
    with plot_style():
        sections = [
            Section(title, [*scaling_plots(records, mode), Table(_HEAD, _rows(records, mode))])
            for mode, title in MODE_TITLES.items()
            if any(record.mode == mode for record in records)
        ]
    gaps = _gaps(grid, folder)
    if gaps:
        sections.append(Section("Not measured", [Table((), gaps)]))
    terms = [("How it was measured", _method(measuring)), *_TERMS]
    rows = [[Cell(term), Cell(text, "comment")] for term, text in terms]
    sections.append(Section("What the numbers mean", [Table((), rows)]))
    text = Text([config.to_yaml()], "code", fold="Before layouts and batches of the points")
    sections.append(Section("Configuration", [text]))
    page = Page(
        kind="MoE++ scaling test",
        title=config.run.name,
        lead=_sentence(records),
        facts=_facts(config, records),
        warnings=_warnings(records),
        cards=_cards(records),
        sections=sections,
        sources="points/*.json",
        command="moepp scale",
    )
    return write_blocks(folder.path / "scaling.html", page)


def _is_crowded(record: ScaleRecord) -> bool:
    """Whether ranks share processor cores."""
    return record.device == "cpu" and record.nproc > record.cores * record.hosts


def _largest(records: Sequence[ScaleRecord], mode: str) -> dict[str, ScaleRecord]:
    """Records of MoE++'s fastest layout at the largest count that all kinds have, by kind."""
    # Counts at which ranks share cores are used only if there are no others.
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
                "Waiting in all-to-alls",
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


def _rows(records: Sequence[ScaleRecord], mode: str) -> list[list[Cell]]:
    return [_row(record) for record in records if record.mode == mode]


def _row(r: ScaleRecord) -> list[Cell]:
    waits = "-"
    if r.a2a_time_s is not None and r.a2a_time_min_s is not None and r.a2a_time_max_s:
        waits = (
            f"{r.a2a_time_s * 1e3:.1f} ({r.a2a_time_min_s * 1e3:.1f} to "
            f"{r.a2a_time_max_s * 1e3:.1f})"
        )
    return [
        number(str(r.nproc)),
        Cell(short_layout(r.layout)),
        Cell(KIND_NAMES[r.kind]),
        number(str(r.global_batch_size)),
        number(f"{r.step_time_s * 1e3:,.1f}"),
        number(f"{r.step_time_min_s * 1e3:,.1f} to {r.step_time_max_s * 1e3:,.1f}"),
        number(formatting.count(r.tokens_per_s)),
        number(formatting.percent(r.efficiency)),
        number(f"{r.a2a_bytes / 1e6:,.2f}"),
        number(waits),
        number("-" if r.a2a_share is None else formatting.percent(r.a2a_share)),
    ]


def _gaps(grid: ScalingGrid, folder: ScalingRuns) -> list[list[Cell]]:
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
    return [[Cell(what), Cell(why, "comment")] for what, why in gaps]


def _method(measuring: Measuring) -> str:
    both = len(measuring.kinds) > 1
    turns = "the two models take turns, repetition by repetition" if both else "one model alone"
    return (
        f"Each point is a job of its own: {measuring.warmup} steps of warm-up, then "
        f"{measuring.repeats} repetitions of {measuring.steps} steps; {turns}. A step is a whole "
        "training step, optimizer included, ended by a barrier, and its time is that of the "
        "slowest rank."
    )
