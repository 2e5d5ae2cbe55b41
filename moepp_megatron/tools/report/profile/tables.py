"""Tables of a profile, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from moepp_megatron.tools.profiling.summary import ProfileSummary
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.terminal import titled_table, wide_console

_NO = "-"
_PEAKS = {
    "rated": "Peak: the rated bandwidth of the link.",
    "unknown": "Peak: unknown here.",
}
# Text of a cell by the name of its column.
_Cells = dict[str, Callable[[Any], str]]


@dataclass(frozen=True)
class TextTable:
    """A table of text.

    Attributes:
        title: Heading.
        unit: What the numbers are of, and their units.
        note: How to read it.
        columns: Names.
        rows: Cells.
        words: Number of columns, from the left, that hold words.
    """

    title: str
    unit: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int


def profile_tables(document: dict[str, Any]) -> list[TextTable]:
    """The tables of a profile, given as `profiling.document` makes it."""
    tables = [
        _table(
            "Collectives",
            "mean of a step and rank; ms, bandwidth in GB/s of the transfer without waiting",
            "Waiting: until the last rank of the group had started. Bandwidth by nccl-tests' "
            "formulas. " + _PEAKS[document["ceiling"]],
            _COLLECTIVE,
            document["collectives"],
            4,
        )
    ]
    if document["all_to_all"]:
        sums: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
        for row in document["all_to_all"]:
            sums.setdefault((row["layer"], row["direction"], row["pass"]), []).append(row)
        tables.append(
            _table(
                "All-to-all of hidden vectors",
                "a step, over the recorded ranks; = means equal to the byte",
                "Formula: selections whose FFN expert is on another rank, times the bytes of a "
                "vector (T K phi D b (EP - 1) / EP with the step's own counts), for the "
                "dispatcher that ran. Side: gates and maps that travel along.",
                _LAYER,
                list(sums.values()),
                3,
            )
        )
    tables.append(
        _table(
            "Ranks",
            "milliseconds",
            "What neither computes nor communicates is waiting for something else. Expert rows: "
            "what the rank's FFN experts computed in the forward passes, all layers.",
            _RANK,
            document["rank_steps"],
            0,
        )
    )
    return tables


def _table(
    title: str, unit: str, note: str, cells: _Cells, items: Sequence[Any], words: int
) -> TextTable:
    rows = [[cell(item) for cell in cells.values()] for item in items]
    return TextTable(title, unit, note, list(cells), rows, words)


def print_tables(sentences: Sequence[str], tables: Sequence[TextTable]) -> None:
    """Print findings in words, then tables."""
    console = wide_console(highlight=True)
    for sentence in sentences:
        console.print(sentence, highlight=False)
    for one in tables:
        table = titled_table(f"{one.title}: {one.unit}", *one.columns, words=one.words)
        for row in one.rows:
            table.add_row(*row)
        console.print(table)


def print_summary(summary: ProfileSummary) -> None:
    """Print a recording of collectives only: sums per rank over the recording."""
    unit = "ms, waiting for late ranks included, and GB/s"
    table = _table("Collectives of a rank", unit, "", _SUMMARY, summary.rows, 2)
    print_tables([f"{summary.name}, {summary.ranks} ranks"], [table])


def _ms(value: float | None) -> str:
    if value is None:
        return _NO
    return f"{value:,.1f}" if value >= 10 else f"{value:,.3f}"


def _rate(value: float | None) -> str:
    if value is None:
        return _NO
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}" if value >= 1e-3 else f"{value:.1e}"


def _mean_size(key: str) -> Callable[[list[dict[str, Any]]], str]:
    return lambda entries: formatting.data_size(fmean(entry[key] for entry in entries))


def _formula(entries: list[dict[str, Any]]) -> str:
    expected = [entry for entry in entries if entry["expected_bytes"] is not None]
    if not expected:
        return _NO
    verdict = " =" if all(entry["equal"] for entry in expected) else " differs"
    return _mean_size("expected_bytes")(expected) + verdict


_COLLECTIVE: _Cells = {
    "serves": lambda one: one["purpose"],
    "pass": lambda one: one["pass"] or _NO,
    "operation": lambda one: one["operation"],
    "group": lambda one: ", ".join(str(name) for name in (one["group"], one["group_size"]) if name),
    "calls": lambda one: f"{one['calls']:g}",
    "size a call": lambda one: formatting.data_size(one["bytes_per_call"]),
    "time": lambda one: _ms(one["time_ms"]),
    "waiting": lambda one: _ms(one["wait_ms"]),
    "exposed": lambda one: _ms(one["exposed_ms"]),
    "algbw": lambda one: _rate(one["algorithm_gb_s"]),
    "busbw": lambda one: _rate(one["bus_gb_s"]),
    "of peak": lambda one: (
        _NO if one["peak_share"] is None else formatting.percent(one["peak_share"])
    ),
}
_LAYER: _Cells = {
    "layer": lambda entries: str(entries[0]["layer"]),
    "direction": lambda entries: entries[0]["direction"],
    "pass": lambda entries: entries[0]["pass"],
    "measured": _mean_size("measured_bytes"),
    "formula": _formula,
    "deduplicated": _mean_size("deduplicated_bytes"),
    "even load": _mean_size("even_load_bytes"),
    "vanilla": _mean_size("vanilla_bytes"),
    "side": _mean_size("side_bytes"),
}
_RANK: _Cells = {
    "step": lambda one: str(one["step"]),
    "rank": lambda one: str(one["rank"]),
    "step time": lambda one: _ms(one["step_ms"]),
    "computes": lambda one: _ms(one["compute_ms"]),
    "communicates": lambda one: _ms(one["communication_ms"]),
    "exposed": lambda one: _ms(one["exposed_ms"]),
    "share": lambda one: formatting.percent(one["exposed_share"]),
    "expert rows": lambda one: _NO if one["expert_rows"] is None else f"{one['expert_rows']:,}",
}
_SUMMARY: _Cells = {
    "operation": lambda row: row.operation,
    "group": lambda row: row.group or _NO,
    "calls": lambda row: f"{row.calls:g}",
    "bytes": lambda row: _NO if row.bytes is None else formatting.data_size(row.bytes),
    "time": lambda row: f"{row.time_us / 1e3:,.3f}" if row.time_us else _NO,
    "algbw": lambda row: _rate(row.algorithm_gb_s),
    "busbw": lambda row: _rate(row.bus_gb_s),
}
