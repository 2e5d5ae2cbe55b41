"""Rows of the tables in terminal and page."""

from __future__ import annotations

from typing import Any

from moepp_megatron.workbench.report import formatting

NO = "-"

COLLECTIVE_COLUMNS = (
    "serves",
    "pass",
    "operation",
    "group",
    "calls",
    "size a call",
    "time",
    "waiting",
    "exposed",
    "algbw",
    "busbw",
    "of peak",
)
LAYER_COLUMNS = (
    "layer",
    "direction",
    "pass",
    "measured",
    "formula",
    "deduplicated",
    "even load",
    "vanilla",
    "side",
)
RANK_COLUMNS = (
    "step",
    "rank",
    "step time",
    "computes",
    "communicates",
    "exposed",
    "share",
    "expert rows",
)


def collective_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per kind of collective; times in ms per step and rank, bandwidth in GB/s."""
    return [
        (
            one["purpose"],
            one["pass"] or NO,
            one["operation"],
            f"{one['group']}, {one['group_size']}" if one["group_size"] else one["group"],
            f"{one['calls']:g}",
            formatting.data_size(one["bytes_per_call"]),
            _ms(one["time_ms"]),
            _ms(one["wait_ms"]),
            _ms(one["exposed_ms"]),
            _rate(one["algorithm_gb_s"]),
            _rate(one["bus_gb_s"]),
            NO if one["peak_share"] is None else formatting.percent(one["peak_share"]),
        )
        for one in document["collectives"]
    ]


def layer_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per layer, direction and pass, summed over recorded ranks; mean over steps."""
    sums: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for one in document["all_to_all"]:
        sums.setdefault((one["layer"], one["direction"], one["pass"]), []).append(one)
    rows = []
    for (layer, direction, phase), entries in sums.items():
        known = [one["equal"] for one in entries if one["equal"] is not None]
        verdict = "" if not known else " =" if all(known) else " differs"
        measured = _mean(entries, "measured_bytes")
        expected = [one for one in entries if one["expected_bytes"] is not None]
        formula = (
            formatting.data_size(_mean(expected, "expected_bytes")) + verdict if expected else NO
        )
        rows.append(
            (
                str(layer),
                direction,
                phase,
                formatting.data_size(measured),
                formula,
                *(
                    formatting.data_size(_mean(entries, key))
                    for key in (
                        "deduplicated_bytes",
                        "even_load_bytes",
                        "vanilla_bytes",
                        "side_bytes",
                    )
                ),
            )
        )
    return rows


def rank_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row per step and rank."""
    return [
        (
            str(one["step"]),
            str(one["rank"]),
            _ms(one["step_ms"]),
            _ms(one["compute_ms"]),
            _ms(one["communication_ms"]),
            _ms(one["exposed_ms"]),
            formatting.percent(one["exposed_share"]),
            NO if one["expert_rows"] is None else f"{one['expert_rows']:,}",
        )
        for one in document["rank_steps"]
    ]


def _mean(entries: list[dict[str, Any]], key: str) -> float:
    return sum(float(one[key]) for one in entries) / len(entries)


def _ms(value: float | None) -> str:
    if value is None:
        return NO
    return f"{value:,.1f}" if value >= 10 else f"{value:,.3f}"


def _rate(value: float | None) -> str:
    if value is None:
        return NO
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}" if value >= 1e-3 else f"{value:.1e}"
