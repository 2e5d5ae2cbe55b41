"""Numbers of a pilot as its page and its table write them."""

from __future__ import annotations

import math
from collections.abc import Callable

from moepp_megatron.workbench.experiments.pilot.result import Answer, Interval, PilotResult
from moepp_megatron.workbench.experiments.pilot.sentences import percent, plain_factor
from moepp_megatron.workbench.report import formatting

NOTHING = "-"
NOT_MEASURED = "not measured here"


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
    """A step: milliseconds below a second, else seconds."""
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
    """Such as `0.82 to 0.93`; empty without an interval."""
    if interval.low is None or interval.high is None:
        return ""
    return f"{show(interval.low)} to {show(interval.high)}"


def with_ends(interval: Interval, show: Callable[[float], str]) -> str:
    """Such as `0.87 (0.82 to 0.93)`, or the mean alone."""
    text = ends(interval, show)
    return f"{show(interval.mean)} ({text})" if text else show(interval.mean)


def probability(value: float | None) -> str:
    """A probability, such as `97.5%`; near 0 and 1 a bound."""
    return NOTHING if value is None else percent(value)


def answer_class(answer: Answer | None) -> str:
    """The answer's class in the style sheet and in the terminal's colours."""
    return {"pays": "pays", "does not pay": "loses", "undecided": "open", None: "none"}[answer]


def recommendation(result: PilotResult) -> str:
    """The recommended arm, or why there is none."""
    if result.recommended is not None:
        return result.recommended
    return "none yet: undecided" if result.is_open else "none: stay with vanilla"
