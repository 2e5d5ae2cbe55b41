"""Findings of a profile: sentences and headline numbers, the most expensive first."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from moepp_megatron.tools.profiling.analysis import Profile
from moepp_megatron.tools.profiling.measures.classes import CallClass
from moepp_megatron.tools.report.blocks import Card
from moepp_megatron.tools.report.formatting import data_size, percent

# Below this the busiest rank's load is not worth a remedy.
_EVEN = 1.1


class FindingCost(NamedTuple):
    """The cost of one purpose per step; milliseconds, mean over ranks and steps."""

    purpose: str
    exposed_ms: float
    wait_ms: float
    time_ms: float


def costs(profile: Profile) -> list[FindingCost]:
    """Costs by purpose, the most exposed first."""
    unit = 1e3 * len(profile.rank_steps)
    sums: dict[str, list[CallClass]] = defaultdict(list)
    for kind in profile.classes:
        sums[kind.name.purpose].append(kind)
    result = [
        FindingCost(
            purpose,
            sum(kind.exposed_us for kind in classes) / unit,
            sum(kind.wait_us for kind in classes) / unit,
            sum(kind.time_us for kind in classes) / unit,
        )
        for purpose, classes in sums.items()
    ]
    return sorted(result, key=lambda cost: -cost.exposed_ms)


def cards(profile: Profile) -> list[Card]:
    """The headline numbers of the page."""
    step = f"of a step of {_ms(profile.step_us)}; mean over ranks and steps"
    result = [Card("Exposed communication", percent(profile.exposed_share), step, accent=True)]
    for cost in costs(profile)[:1]:
        note = (
            f"{_ms(1e3 * cost.exposed_ms)} exposed a step and rank; {_ms(1e3 * cost.wait_ms)} of "
            f"{_ms(1e3 * cost.time_ms)} waiting for late ranks"
        )
        result.append(Card("Largest cost", cost.purpose, note))
    rank, label = profile.critical_rank, "Critical rank"
    if rank is None:
        result.append(Card(label, "unknown", "needs the traces of all ranks of a group"))
    else:
        caused = profile.caused_us[rank]
        share = percent(caused / sum(profile.caused_us.values()))
        mean = _ms(caused / len(profile.steps))
        note = f"others waited {mean} a step for it, {share} of all waiting"
        result.append(Card(label, f"rank {rank}", note))
    if (waiting := _waiting(profile)) is not None:
        note = "of all time in collectives; the rest is transfer"
        result.append(Card("Waiting for late ranks", percent(waiting), note))
    if profile.all_layers:
        measured = sum(layer.measured for layer in profile.all_layers)
        note = {
            True: "equal, to the byte, to what routing makes necessary",
            False: "NOT equal to what routing makes necessary: see the table",
            None: "not held against the routing, which was not recorded",
        }[profile.equals_formula]
        result.append(Card("All-to-all a step", data_size(measured / len(profile.steps)), note))
    return result


def findings(profile: Profile) -> list[str]:
    """The findings as sentences, the most important first."""
    sentences = [
        f"A step takes {_ms(profile.step_us)} on its slowest rank. "
        f"{percent(profile.exposed_share)} of it is communication that no computation hides."
    ]
    total = sum(cost.exposed_ms for cost in costs(profile))
    spent = [
        f"{cost.purpose} ({_ms(1e3 * cost.exposed_ms)}, {percent(cost.exposed_ms / total)})"
        for cost in costs(profile)[:2]
        if cost.exposed_ms > 0
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


def _ms(us: float) -> str:
    if us >= 1e6:
        return f"{us / 1e6:,.2f} s"
    return f"{us / 1e3:,.1f} ms" if us >= 100 else f"{us:,.1f} us"
