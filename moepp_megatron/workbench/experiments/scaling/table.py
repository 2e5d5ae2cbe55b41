"""Prints records of `moepp scale`, and writes them as scale.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.workbench.experiments.scaling.efficiency import ScaleRecord
from moepp_megatron.workbench.report.terminal import titled_table, wide_console

MODE_TITLES = {
    "strong": "Strong scaling: the global batch stays",
    "weak": "Weak scaling: the global batch grows with the ranks",
}
KIND_NAMES = {"moepp": "MoE++", "vanilla": "vanilla"}


def short_layout(layout: str) -> str:
    """Degrees above 1, such as "EP2 TP2"; degrees of 1 are left out."""
    pairs = (part.split("=") for part in layout.split(","))
    return " ".join(f"{key.upper()}{number}" for key, number in pairs if number != "1") or "-"


def print_records(records: Sequence[ScaleRecord]) -> None:
    """Print one table per mode."""
    console = wide_console(highlight=True)
    for mode, title in MODE_TITLES.items():
        chosen = [record for record in records if record.mode == mode]
        if chosen:
            console.print(_table(title, chosen))
    console.print(
        "Spread: slowest less fastest repetition. Efficiency: tokens per second and rank, relative "
        "to the smallest count. All-to-all: MB that leave their ranks in the forward passes; share "
        "of the step in which a rank waits in all-to-alls, measured in separate steps."
    )


def _table(title: str, records: Sequence[ScaleRecord]) -> Table:
    table = titled_table(title, narrow=True)
    table.add_column("ranks", justify="right")
    for name in ("layout", "model"):
        table.add_column(name, no_wrap=True)
    names = ("batch", "step ms", "spread", "tokens/s", "efficiency", "a2a MB", "a2a share")
    for name in (*names, "of vanilla's time"):
        table.add_column(name, justify="right")
    for r in records:
        spread = (r.step_time_max_s - r.step_time_min_s) / r.step_time_s
        compared = r.kind == "moepp" and r.speedup is not None
        table.add_row(
            str(r.nproc),
            short_layout(r.layout),
            KIND_NAMES[r.kind],
            str(r.global_batch_size),
            f"{r.step_time_s * 1e3:.1f}",
            f"{spread:.0%}",
            f"{r.tokens_per_s:,.0f}",
            f"{r.efficiency:.2f}",
            f"{r.a2a_bytes / 1e6:.2f}",
            "-" if r.a2a_share is None else f"{r.a2a_share:.1%}",
            f"{1 / r.speedup:.2f}" if compared and r.speedup is not None else "",
        )
    return table


def write_records(path: Path, records: Sequence[ScaleRecord]) -> Path:
    """Write the records as a list of objects."""
    write_atomic(path, (json.dumps([asdict(r) for r in records], indent=1) + "\n").encode())
    return path
