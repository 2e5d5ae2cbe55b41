"""Prints a profile in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moepp_megatron.runtime.terminal import Console
from moepp_megatron.workbench.profiling.summary import ProfileSummary
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.profile.rows import (
    COLLECTIVE_COLUMNS,
    LAYER_COLUMNS,
    NO,
    RANK_COLUMNS,
    collective_rows,
    layer_rows,
    rank_rows,
)
from moepp_megatron.workbench.report.terminal import titled_table, wide_console

# The widest table fits.
_LOG_WIDTH = 150


def print_profile(document: dict[str, Any], findings: Sequence[str]) -> None:
    """Print findings in words, then tables.

    Args:
        document: Result of `profiling.document`.
        findings: Sentences.
    """
    console = wide_console(highlight=True, width=_LOG_WIDTH)
    for sentence in findings:
        console.print(f"- {sentence}", highlight=False)
    _print(
        console,
        "Collectives per step and rank: times in ms, bandwidth in GB/s of the transfer alone",
        COLLECTIVE_COLUMNS,
        collective_rows(document),
        words=4,
    )
    if document["all_to_all"]:
        _print(
            console,
            "All-to-all of hidden vectors per step, over the recorded ranks (= equal to the byte)",
            LAYER_COLUMNS,
            layer_rows(document),
            words=3,
        )
    _print(console, "Ranks, ms", RANK_COLUMNS, rank_rows(document), words=0)


def print_summary(summary: ProfileSummary) -> None:
    """Print a recording of collectives only: sums per rank over the recording."""
    console = wide_console(highlight=True, width=_LOG_WIDTH)
    rows = [
        (
            row.operation,
            row.group or NO,
            f"{row.calls:g}",
            NO if row.bytes is None else formatting.data_size(row.bytes),
            f"{row.time_us / 1e3:,.3f}" if row.time_us else NO,
            NO if row.wait_us is None else f"{row.wait_us / 1e3:,.3f}",
            NO if row.algorithm_gb_s is None else f"{row.algorithm_gb_s:.3g}",
            NO if row.bus_gb_s is None else f"{row.bus_gb_s:.3g}",
        )
        for row in summary.rows
    ]
    console.print(f"{summary.name}, {summary.ranks} ranks", highlight=False)
    columns = ("operation", "group", "calls", "bytes", "time", "waiting", "algbw", "busbw")
    _print(console, "Collectives of a rank, ms and GB/s of the transfer", columns, rows, words=2)


def _print(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: int,
) -> None:
    table = titled_table(title, *columns, words=words)
    for row in rows:
        table.add_row(*row)
    console.print(table)
