"""The commonest rule, with a remedy that can be typed in."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem


def nearest_multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` just below and above `value`, as "4 or 8"."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"


def must_divide(
    name: str, value: int, divisor: int, divisor_text: str, reason: str = ""
) -> Iterator[Problem]:
    """Yield a problem unless `divisor` divides `value`.

    Args:
        name: Dotted name of the setting.
        value: Its value.
        divisor: What must divide it.
        divisor_text: The divisor's name and value, such as `parallel.x (4)`.
        reason: Added to the rule where the divisor does not explain itself.
    """
    if value % divisor:
        yield Problem(
            name,
            value,
            f"must be divisible by {divisor_text}{reason}",
            f"use {nearest_multiples(value, divisor)}",
        )
