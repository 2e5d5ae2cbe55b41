"""Prints a profile on the terminal: sentences, the most expensive first, and tables."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

from rich.table import Table

from moepp_megatron.tools.profiling.analysis import Profile
from moepp_megatron.tools.report.formatting import data_size, percent
from moepp_megatron.tools.report.terminal import titled_table, wide_console

_NO = "-"
# Text of a cell by the name of its column.
_Cells = dict[str, Callable[[Any], str]]
# Below this the busiest rank's load is not worth a remedy.
_EVEN = 1.1


def _findings(profile: Profile) -> list[str]:
    """The findings as sentences, the most important first."""
    sentences = [
        f"A step takes {_duration(profile.step_us)} on its slowest rank. "
        f"{percent(profile.exposed_share)} of it is communication that no computation hides."
    ]
    exposed: dict[str, float] = defaultdict(float)
    for kind in profile.classes:
        exposed[kind.name.purpose] += kind.exposed_us
    total = sum(exposed.values())
    spent = [
        f"{purpose} ({_duration(us / len(profile.rank_steps))}, {percent(us / total)})"
        for purpose, us in sorted(exposed.items(), key=lambda item: -item[1])[:2]
        if us > 0
    ]
    if spent:
        sentences.append(f"Most of it goes to {' and '.join(spent)}.")
    sentences += [*_lateness(profile), *_slow_and_load(profile), *_bytes(profile)]
    missing = profile.world_size - len(profile.ranks)
    if missing > 0:
        sentences.append(
            f"{missing} of {profile.world_size} ranks were not recorded: calls with them count no "
            "waiting, and bytes are those of the recorded ranks."
        )
    return sentences


def _lateness(profile: Profile) -> list[str]:
    rank, share = profile.critical_rank, _waiting(profile)
    if rank is None or share is None:
        return []
    said = (
        f"{percent(share)} of the time in collectives is waiting for ranks that start late, most "
        f"often for rank {rank}."
    )
    if share > 0.5 and profile.slow is None:
        said += (
            " A faster link or fewer bytes would not help there: the ranks' work is uneven "
            "(experts' load, micro-batches, a slow machine)."
        )
    return [said]


def _slow_and_load(profile: Profile) -> list[str]:
    slow, load, sentences = profile.slow, profile.load, []
    if slow is not None:
        sentences.append(
            f"Rank {slow.rank} is slow: it computes {slow.time_ratio:.2f} times as long as the "
            f"mean of the other ranks of its experts, for {slow.rows_ratio:.2f} times their rows. "
            "No routing evens that; look at its machine (moepp doctor: clocks, throttling, other "
            "processes)."
        )
    if load is not None:
        differs = load.busiest_over_mean >= _EVEN
        said = (
            f"Experts' load {'differs' if differs else 'hardly differs'} between ranks: in a layer "
            f"the busiest computes {load.busiest_over_mean:.2f} times the rows of the mean rank"
        )
        if differs:
            said += f"; rank {load.busiest} computes most"
        remedy = " A larger moe.balance_coeff evens it." if differs and slow is None else ""
        sentences.append(f"{said}.{remedy}")
    return sentences


def _bytes(profile: Profile) -> list[str]:
    layers = profile.all_layers
    measured = sum(layer.measured for layer in layers)
    vanilla, fewest = (
        sum(layer.vanilla for layer in layers),
        sum(layer.deduplicated for layer in layers),
    )
    if not any(layer.ffn_only for layer in layers):
        return []
    saved = 1 - measured / vanilla if vanilla else 0.0
    said = (
        f"The all-to-all carried {data_size(measured)} of hidden vectors, {percent(saved)} less "
        "than if every selection went to an FFN expert under an even load."
    )
    if measured > fewest > 0:
        said += (
            " Sending a token once to each rank (moe.dispatcher: alltoall_dedup) would carry "
            f"{percent(1 - fewest / measured)} less."
        )
    return [said]


def _waiting(profile: Profile) -> float | None:
    """Waiting as a share of the time in collectives; None where no call could be matched."""
    matched = [kind for kind in profile.classes if kind.matched]
    total = sum(kind.time_us for kind in matched)
    return sum(kind.wait_us for kind in matched) / total if total > 0 else None


def _duration(us: float) -> str:
    if us >= 1e6:
        return f"{us / 1e6:,.2f} s"
    return f"{us / 1e3:,.1f} ms" if us >= 100 else f"{us:,.1f} us"


def print_profile(profile: Profile, document: dict[str, Any]) -> None:
    """Print findings, then tables."""
    console = wide_console(highlight=True)
    for sentence in _findings(profile):
        console.print(f"- {sentence}", highlight=False)
    means = "mean of a step and rank; ms, bandwidth in GB/s of the transfer without waiting"
    console.print(_table(f"Collectives: {means}", _COLLECTIVE, document["collectives"], 4))
    layers: dict[tuple[int, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in document["all_to_all"]:
        layers[row["layer"], row["direction"], row["pass"]].append(row)
    if layers:
        means = "a step, over the recorded ranks; = means equal to the byte"
        title = f"All-to-all of hidden vectors: {means}"
        console.print(_table(title, _LAYER, layers.values(), 3))
    console.print(_table("Ranks: milliseconds", _RANK, document["rank_steps"], 0))


def _table(title: str, cells: _Cells, items: Iterable[Any], words: int) -> Table:
    table = titled_table(title, *cells, words=words)
    for item in items:
        table.add_row(*(cell(item) for cell in cells.values()))
    return table


def _number(value: float | None) -> str:
    if value is None:
        return _NO
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}" if value >= 1e-3 else f"{value:.1e}"


def _mean_size(key: str) -> Callable[[list[dict[str, Any]]], str]:
    return lambda entries: data_size(fmean(entry[key] for entry in entries))


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
    "size a call": lambda one: data_size(one["bytes_per_call"]),
    "time": lambda one: _number(one["time_ms"]),
    "waiting": lambda one: _number(one["wait_ms"]),
    "exposed": lambda one: _number(one["exposed_ms"]),
    "busbw": lambda one: _number(one["bus_gb_s"]),
    "of peak": lambda one: _NO if one["peak_share"] is None else percent(one["peak_share"]),
}
_LAYER: _Cells = {
    "layer": lambda entries: str(entries[0]["layer"]),
    "direction": lambda entries: entries[0]["direction"],
    "pass": lambda entries: entries[0]["pass"],
    "measured": _mean_size("measured_bytes"),
    "formula": _formula,
    "deduplicated": _mean_size("deduplicated_bytes"),
    "vanilla": _mean_size("vanilla_bytes"),
    "side": _mean_size("side_bytes"),
}
_RANK: _Cells = {
    "step": lambda one: str(one["step"]),
    "rank": lambda one: str(one["rank"]),
    "step time": lambda one: _number(one["step_ms"]),
    "computes": lambda one: _number(one["compute_ms"]),
    "communicates": lambda one: _number(one["communication_ms"]),
    "exposed": lambda one: _number(one["exposed_ms"]),
    "share": lambda one: percent(one["exposed_share"]),
    "expert rows": lambda one: _NO if one["expert_rows"] is None else f"{one['expert_rows']:,}",
}
