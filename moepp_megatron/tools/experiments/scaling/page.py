"""`scaling.html`: the result of a scaling test, and the meaning of its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moepp_megatron.config import Config
from moepp_megatron.tools.experiments.scaling.plots import KIND_NAMES, scaling_plots, series
from moepp_megatron.tools.experiments.scaling.records import ScaleRecord
from moepp_megatron.tools.experiments.scaling.trials import Measuring
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import (
    Card,
    Cell,
    Page,
    PageSection,
    Table,
    Text,
    number,
    write_blocks,
)
from moepp_megatron.tools.report.drawing import plot_style
from moepp_megatron.tools.report.terminal import print_uncut, table_of

_MODES = {
    "strong": "Strong scaling: the global batch stays",
    "weak": "Weak scaling: the global batch grows with the ranks",
}
_HEAD = (
    *("Ranks", "Layout", "Model", "Batch", "Step, ms", "Tokens/s", "Efficiency"),
    *("Of vanilla's", "All-to-all, MB"),
)
_TERMS = {
    "Routing and data": "Routing is held at perfect balance: FFN experts get exactly the share phi "
    "of all selections, in vanilla all of them, every expert as many as any other. Tokens are "
    "random. So nothing here depends on training, or says how balanced a trained router is.",
    "Efficiency": "Tokens per second and rank, relative to the smallest count. Each model is "
    "compared with itself; where several layouts were measured at the smallest count, with its "
    "fastest.",
    "Layout": "TP tensor, PP pipeline, CP context, EP expert, ETP expert-tensor parallel ranks; "
    "those of 1 are left out, and the rest of the ranks is data parallel.",
    "All-to-all bytes": "Bytes of hidden vectors that leave their ranks in the forward passes of a "
    "step, all ranks and layers, counted from the routing (a2a_bytes in metrics.jsonl).",
}


def build_scaling_page(
    path: Path,
    config: Config,
    measuring: Measuring,
    records: Sequence[ScaleRecord],
    gaps: Mapping[str, str],
) -> Path:
    """Write the page, which needs no other file and no network.

    Args:
        path: The page.
        config: The given configuration, before layouts.
        measuring: How points are measured.
        records: Records of the finished points; at least one.
        gaps: What was not measured, and why.

    Returns:
        `path`.

    Raises:
        ReportError: It cannot be written.
    """
    with plot_style():
        sections = [
            PageSection(title, [*scaling_plots(records, mode), _table(records, mode)])
            for mode, title in _MODES.items()
            if any(record.mode == mode for record in records)
        ]
    if gaps:
        sections.append(PageSection("Not measured", [_comments(gaps)]))
    terms = {"How it was measured": _method(measuring)} | _TERMS
    sections.append(PageSection("What the numbers mean", [_comments(terms)]))
    text = Text([config.to_yaml()], "code", fold="Before layouts and batches of the points")
    sections.append(PageSection("Configuration", [text]))
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
    return write_blocks(path, page)


def print_records(records: Sequence[ScaleRecord]) -> None:
    """Print one table per mode."""
    for mode, title in _MODES.items():
        if any(record.mode == mode for record in records):
            print_uncut(title, table_of(_table(records, mode)), "")


def _comments(rows: Mapping[str, str]) -> Table:
    return Table((), [[Cell(name), Cell(text, "comment")] for name, text in rows.items()])


def _is_crowded(record: ScaleRecord) -> bool:
    """True if ranks share processor cores."""
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
    if len(largest) < 2:
        only = next(iter(largest.values()))
        return (
            f"On {only.nproc} ranks {KIND_NAMES[only.kind]} makes "
            f"{formatting.count(only.tokens_per_s)} tokens a second, "
            f"{formatting.percent(only.efficiency)} of perfect {mode} scaling from "
            f"{only.efficiency_nproc}."
        )
    moepp, vanilla = largest["moepp"], largest["vanilla"]
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
            "cores: there the efficiency shows the overload of the machine, not how the model "
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
    mode = records[0].mode
    largest = _largest(records, mode)
    moepp, vanilla = largest.get("moepp"), largest.get("vanilla")
    cards = []
    if moepp is not None and moepp.speedup is not None:
        note = f"on {_ranks(moepp.nproc)}, {mode}; median of ratios"
        ratio = f"{1 / moepp.speedup:.2f}"
        cards.append(Card("Step time against vanilla", ratio, note, accent=True))
    cards += [
        Card(
            f"{name.capitalize()} efficiency, {KIND_NAMES[kind]}",
            formatting.percent(record.efficiency),
            f"{record.nproc} against {_ranks(record.efficiency_nproc)}",
        )
        for name in _MODES
        for kind, record in _largest(records, name).items()
        if record.nproc > record.efficiency_nproc
    ]
    if moepp is not None and vanilla is not None and vanilla.a2a_bytes:
        ratio = f"{moepp.a2a_bytes / vanilla.a2a_bytes:.3f}"
        cards.append(Card("All-to-all bytes against vanilla", ratio, f"phi is {moepp.phi:.3f}"))
    return cards


def _table(records: Sequence[ScaleRecord], mode: str) -> Table:
    return Table(_HEAD, [_row(record) for record in records if record.mode == mode])


def _row(r: ScaleRecord) -> list[Cell]:
    ratio = ""
    if r.kind == "moepp" and r.speedup is not None:
        ratio = f"{1 / r.speedup:.2f}"
    return [
        number(str(r.nproc)),
        Cell(short_layout(r.layout)),
        Cell(KIND_NAMES[r.kind]),
        number(str(r.global_batch_size)),
        number(
            f"{r.step_time_s * 1e3:,.1f}",
            f"{r.step_time_min_s * 1e3:,.1f} to {r.step_time_max_s * 1e3:,.1f}",
        ),
        number(formatting.count(r.tokens_per_s)),
        number(formatting.percent(r.efficiency)),
        number(ratio),
        number(f"{r.a2a_bytes / 1e6:,.2f}"),
    ]


def short_layout(layout: str) -> str:
    """Degrees above 1, such as "EP2 TP2"; degrees of 1 are left out."""
    pairs = (part.split("=") for part in layout.split(","))
    return " ".join(f"{key.upper()}{number}" for key, number in pairs if number != "1") or "-"


def _method(measuring: Measuring) -> str:
    both = len(measuring.kinds) > 1
    turns = "the two models take turns, repetition by repetition" if both else "one model only"
    return (
        f"Each point is a job of its own: {measuring.warmup} steps of warm-up, then "
        f"{measuring.repeats} repetitions of {measuring.steps} steps; {turns}. A step is a whole "
        "training step, optimizer included, ended by a barrier, and its time is that of the "
        "slowest rank."
    )
