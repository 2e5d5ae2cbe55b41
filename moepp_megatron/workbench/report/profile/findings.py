"""Describes the findings of a profile in words, the most expensive first."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from moepp_megatron.workbench.profiling.analysis import Profile
from moepp_megatron.workbench.profiling.measures.classes import CallClass
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.cards import Card

# Below this the busiest rank's load is not worth a remedy.
_EVEN = 1.1


@dataclass(frozen=True)
class CostLine:
    """The cost of one purpose per step; milliseconds, mean over ranks and steps."""

    purpose: str
    exposed_ms: float
    wait_ms: float
    time_ms: float


def costs(profile: Profile) -> list[CostLine]:
    """Costs by purpose, the most exposed first."""
    count = sum(len(ranks) for ranks in profile.times.values())
    sums: dict[str, list[CallClass]] = defaultdict(list)
    for one in profile.classes:
        sums[one.name.purpose].append(one)
    found = [
        CostLine(
            purpose,
            sum(one.exposed_us for one in classes) / 1e3 / count,
            sum(one.wait_us for one in classes) / 1e3 / count,
            sum(one.time_us for one in classes) / 1e3 / count,
        )
        for purpose, classes in sums.items()
    ]
    return sorted(found, key=lambda cost: -cost.exposed_ms)


@dataclass(frozen=True)
class Vectors:
    """All-to-all bytes of hidden vectors over all analysed steps; see `LayerBytes`."""

    measured: int
    plain: int
    deduplicated: int
    vanilla: float
    is_equal: bool | None


def vectors(profile: Profile) -> Vectors | None:
    """The bytes of hidden vectors; None if no all-to-all of a layer was recorded."""
    every = [one for step in profile.steps for one in profile.layers[step]]
    if not every:
        return None
    return Vectors(
        sum(one.measured for one in every),
        sum(one.plain for one in every),
        sum(one.deduplicated for one in every),
        sum(one.vanilla for one in every),
        profile.equals_formula,
    )


def cards(profile: Profile) -> list[Card]:
    """The headline numbers of the page."""
    found = [
        Card(
            "Exposed communication",
            formatting.percent(profile.exposed_share),
            f"of a step of {_ms(profile.step_us / 1e3)}; mean over ranks and steps",
            accent=True,
        )
    ]
    largest = next(iter(costs(profile)), None)
    if largest is not None:
        found.append(
            Card(
                "Largest cost",
                largest.purpose,
                f"{_ms(largest.exposed_ms)} exposed a step and rank; "
                f"{_ms(largest.wait_ms)} of {_ms(largest.time_ms)} waiting for late ranks",
            )
        )
    found.append(_critical_card(profile))
    total, waiting = _time_and_wait(profile)
    if total > 0 and any(one.matched for one in profile.classes):
        found.append(
            Card(
                "Waiting for late ranks",
                formatting.percent(waiting / total),
                "of all time in collectives; the rest is transfer",
            )
        )
    moved = vectors(profile)
    if moved is not None:
        found.append(_bytes_card(moved, len(profile.steps)))
    return found


def _critical_card(profile: Profile) -> Card:
    rank = profile.critical_rank
    if rank is None:
        return Card("Critical rank", "unknown", "needs the traces of all ranks of a group")
    ms = profile.caused_us[rank] / 1e3 / len(profile.steps)
    share = profile.caused_us[rank] / sum(profile.caused_us.values())
    return Card(
        "Critical rank",
        f"rank {rank}",
        f"others waited {_ms(ms)} a step for it, {formatting.percent(share)} of all waiting",
    )


def _bytes_card(moved: Vectors, steps: int) -> Card:
    note = {
        True: "equal, to the byte, to what routing makes necessary",
        False: "NOT equal to what routing makes necessary: see the table",
        None: "not held against the routing, which was not recorded",
    }[moved.is_equal]
    return Card("All-to-all a step", formatting.data_size(moved.measured / steps), note)


def findings(profile: Profile) -> list[str]:
    """The findings as sentences, the most important first."""
    found = [_exposure(profile), *_largest(profile)]
    found += _lateness(profile)
    found += _slow(profile) + _load(profile)
    moved = vectors(profile)
    if moved is not None and moved.plain:
        found.append(_bytes(moved))
    found += _unseen(profile)
    return found


def _exposure(profile: Profile) -> str:
    return (
        f"A step takes {_ms(profile.step_us / 1e3)} on its slowest rank. "
        f"{formatting.percent(profile.exposed_share)} of it is communication that no computation "
        "hides."
    )


def _largest(profile: Profile) -> list[str]:
    spent = [cost for cost in costs(profile) if cost.exposed_ms > 0][:2]
    if not spent:
        return []
    total = sum(cost.exposed_ms for cost in costs(profile))
    parts = [
        f"{cost.purpose} ({_ms(cost.exposed_ms)}, {formatting.percent(cost.exposed_ms / total)})"
        for cost in spent
    ]
    return [f"Most of it goes to {' and '.join(parts)}."]


def _lateness(profile: Profile) -> list[str]:
    rank = profile.critical_rank
    total, waiting = _time_and_wait(profile)
    if rank is None or total <= 0:
        return []
    share = waiting / total
    first = (
        f"{formatting.percent(share)} of the time in collectives is waiting for ranks that start "
        f"late, most often for rank {rank}."
    )
    if share > 0.5 and profile.slow is None:
        first += (
            " A faster link or fewer bytes would not help there: the ranks' work is uneven "
            "(experts' load, micro-batches, a slow machine)."
        )
    return [first]


def _slow(profile: Profile) -> list[str]:
    slow = profile.slow
    if slow is None:
        return []
    return [
        f"Rank {slow.rank} is slow: it computes {slow.time_ratio:.2f} times as long as the mean of "
        f"the other ranks of its experts, for {slow.rows_ratio:.2f} times their rows. No routing "
        "evens that; look at its machine (moepp doctor: clocks, throttling, other processes)."
    ]


def _load(profile: Profile) -> list[str]:
    load = profile.load
    if load is None:
        return []
    ratio = f"{load.busiest_over_mean:.2f}"
    if load.busiest_over_mean < _EVEN:
        return [
            f"Experts' load hardly differs between ranks: in a layer the busiest computes {ratio} "
            "times the rows of the mean rank."
        ]
    return [
        f"Experts' load differs between ranks: in a layer the busiest computes {ratio} times the "
        f"rows of the mean rank; rank {load.busiest} computes most."
        + ("" if profile.slow is not None else " A larger moe.balance_coeff evens it.")
    ]


def _bytes(moved: Vectors) -> str:
    saved = 1 - moved.measured / moved.vanilla if moved.vanilla else 0.0
    text = (
        f"The all-to-all carried {formatting.data_size(moved.measured)} of hidden vectors, "
        f"{formatting.percent(saved)} less than if every selection went to an FFN expert under "
        "an even load."
    )
    if moved.measured > moved.deduplicated > 0:
        less = 1 - moved.deduplicated / moved.measured
        text += (
            f" Sending a token once to each rank (moe.dispatcher: alltoall_dedup) would carry "
            f"{formatting.percent(less)} less."
        )
    return text


def _unseen(profile: Profile) -> list[str]:
    missing = profile.world_size - len(profile.ranks)
    if missing <= 0:
        return []
    return [
        f"{missing} of {profile.world_size} ranks were not recorded: calls with them count no "
        "waiting, and bytes are those of the recorded ranks."
    ]


def _time_and_wait(profile: Profile) -> tuple[float, float]:
    matched = [one for one in profile.classes if one.matched]
    return sum(one.time_us for one in matched), sum(one.wait_us for one in matched)


def _ms(value: float) -> str:
    if value >= 1e3:
        return f"{value / 1e3:,.2f} s"
    return f"{value:,.1f} ms" if value >= 0.1 else f"{value * 1e3:,.1f} us"
