"""Divisibility, the most common rule, with a remedy that can be typed in."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from math import gcd, isqrt
from operator import attrgetter
from typing import TYPE_CHECKING

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rows import Rule, Text, fill

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config

_MOST_DIVISORS = 8


def nearest_multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` just below and above `value`, as "4 or 8"."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"


def _legal_divisors(value: int, near: int) -> str:
    """The divisors of `value`, as "1, 2, 4 or 8"; of many only the two on either side of `near`."""
    divisors = [number for number in range(1, isqrt(value) + 1) if value % number == 0]
    divisors = sorted({*divisors, *(value // number for number in divisors)})
    if len(divisors) > _MOST_DIVISORS:
        place = bisect(divisors, near)
        divisors = divisors[max(place - 2, 0) : place + 2]
    *others, last = map(str, divisors)
    return f"{', '.join(others)} or {last}" if others else last


def must_divide(
    name: str,
    value: int,
    divisor: int,
    divisor_text: str,
    reason: str = "",
    others: Sequence[int] | None = None,
) -> Iterator[Problem]:
    """Yield a problem unless `divisor` divides `value`.

    Args:
        name: Dotted name of the setting.
        value: Its value.
        divisor: What must divide it.
        divisor_text: The divisor in words, or the name of the setting that it is.
        reason: Added to the rule where the divisor does not explain itself.
        others: The other values that the divisor has to divide, if it is a setting that the user
            may change as well. The remedy then names its legal values first.
    """
    if value % divisor == 0:
        return
    remedy = f"use {nearest_multiples(value, divisor)}"
    if others is not None:
        legal = _legal_divisors(gcd(value, *others), divisor)
        remedy = f"set {divisor_text} to {legal}, or for {name} {remedy}"
        divisor_text += f" ({divisor})"
    yield Problem(name, value, f"must be divisible by {divisor_text}{reason}", remedy)


def divisible(
    name: str,
    divisor: Callable[[Config], int],
    divisor_text: Text,
    reason: str = "",
    others: Sequence[int] | None = None,
) -> Rule:
    """A rule: `divisor` must divide this setting; the texts as in `must_divide`."""
    return lambda config: must_divide(
        name, attrgetter(name)(config), divisor(config), fill(divisor_text, config), reason, others
    )


def batch_sizes(config: Config) -> list[tuple[str, int]]:
    """Each number of sequences that a step of the run has, and the setting that gives it."""
    training = config.training
    sizes = [("training.global_batch_size", training.global_batch_size)]
    if training.batch_ramp is not None:
        sizes += [("training.batch_ramp", size) for size in training.batch_sizes[:-1]]
    return sizes
