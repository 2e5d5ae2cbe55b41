"""Formats the numbers of a pilot for its page and its table."""

from __future__ import annotations

import math
from collections.abc import Callable

from moepp_megatron.workbench.experiments.pilot.result import (
    Answer,
    ArmOutcome,
    Interval,
    PilotResult,
    Verdict,
)
from moepp_megatron.workbench.experiments.pilot.statistics import t_quantile
from moepp_megatron.workbench.experiments.pilot.words import plain_factor
from moepp_megatron.workbench.report import formatting

NOTHING = "-"
NOT_MEASURED = "not measured here"

# Nobody repeats a pilot more often to learn what is this close.
MAX_SEEDS = 20
# With which a spread is worth going by.
FEWEST_SEEDS = 3


def ratio(value: float) -> str:
    """A ratio to vanilla, three decimals."""
    return plain_factor(value, ".3f") if value > 0 else formatting.number(value, 3)


def loss(value: float) -> str:
    """Nats, four decimals."""
    return formatting.number(value, 4)


def signed(value: float) -> str:
    """A difference in nats; its sign is always there."""
    return f"{value:+,.4f}" if math.isfinite(value) else formatting.NOT_FINITE


def seconds(value: float) -> str:
    """Time of a step: milliseconds below a second, else seconds."""
    if not math.isfinite(value):
        return formatting.NOT_FINITE
    return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.3f} s"


def energy(joules: float) -> str:
    """Energy of a token, in joules or millijoules."""
    if not math.isfinite(joules):
        return formatting.NOT_FINITE
    return f"{joules:,.3g} J" if joules >= 1 else f"{joules * 1e3:,.3g} mJ"


def megabytes(count: float) -> str:
    """Bytes in units of 1e6."""
    return formatting.number(count / 1e6, 2) if count else "0"


def has_ends(interval: Interval) -> bool:
    """Whether there was more than one seed to take an interval from."""
    return interval.low is not None and interval.high is not None


def ends(interval: Interval, show: Callable[[float], str]) -> str:
    """An interval's ends, such as `0.82 to 0.93`; empty without an interval."""
    if interval.low is None or interval.high is None:
        return ""
    return f"{show(interval.low)} to {show(interval.high)}"


def with_ends(interval: Interval, show: Callable[[float], str]) -> str:
    """A mean with its interval, such as `0.87 (0.82 to 0.93)`, or the mean alone."""
    text = ends(interval, show)
    return f"{show(interval.mean)} ({text})" if text else show(interval.mean)


def answer_class(answer: Answer | None) -> str:
    """The answer's class in the style sheet and in the terminal's colours."""
    return {"pays": "pays", "does not pay": "loses", "undecided": "open", None: "none"}[answer]


def chosen(result: PilotResult) -> Verdict | None:
    """The verdict that the page reports: that of the recommended arm, else the most favourable."""
    for verdict in result.verdicts:
        if verdict.arm == result.recommended:
            return verdict
    return result.verdicts[0] if result.verdicts else None


def is_open(result: PilotResult) -> bool:
    """Whether nothing is recommended because the most favourable arm is undecided."""
    best = chosen(result)
    if result.recommended is not None or best is None:
        return False
    return (best.at_target or best.at_pilot) == "undecided"


def recommendation(result: PilotResult) -> str:
    """The recommended arm, or why there is none."""
    if result.recommended is not None:
        return result.recommended
    return "none yet: undecided" if is_open(result) else "none: stay with vanilla"


def outcome_of(result: PilotResult, arm: str) -> ArmOutcome | None:
    """The arm's outcome by its name; None where no run of it has finished."""
    return next((outcome for outcome in result.arms if outcome.arm.name == arm), None)


def baseline(result: PilotResult) -> ArmOutcome | None:
    """The outcome of vanilla."""
    return next((outcome for outcome in result.arms if outcome.arm.kind == "vanilla"), None)


def seeds_to_decide(interval: Interval | None, seeds: int) -> int | None:
    """Seeds with which the interval of a ratio would end before 1, if mean and spread stayed.

    Args:
        interval: A ratio whose interval contains 1; None gives None.
        seeds: Number of its seeds.

    Returns:
        At least one more than `seeds`, or None: more than `MAX_SEEDS`, or an unknown spread.
    """
    if interval is None or interval.low is None or interval.high is None:
        return None
    if not 2 <= seeds < MAX_SEEDS:
        return None
    if not 0 < interval.low <= interval.mean <= interval.high < math.inf:
        return None
    spread = math.log(interval.high / interval.low) / 2 / _reach(seeds)
    for more in range(seeds + 1, MAX_SEEDS + 1):
        if spread * _reach(more) < abs(math.log(interval.mean)):
            return more
    return None


def _reach(seeds: int) -> float:
    """Half of a mean's interval over the standard deviation of a single value."""
    return t_quantile(0.975, seeds - 1) / math.sqrt(seeds)


def one_run(interval: Interval, seeds: int) -> float | None:
    """How far a single new run may be from the mean, 95% prediction interval; None if unknown.

    For two seeds it would be 22 times the standard deviation, which is useless.

    The interval of a mean over n seeds is t s / sqrt(n) to either side, that of one further value
    t s sqrt(1 + 1/n).
    """
    if interval.low is None or interval.high is None or seeds < FEWEST_SEEDS:
        return None
    return (interval.high - interval.low) / 2 * math.sqrt(seeds + 1)
