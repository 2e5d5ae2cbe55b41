"""Rules of the section `resilience`."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem, show
from moepp_megatron.config.schema import Config

# The watchdog looks at its rank a few times within the timeout; less is mostly scheduling noise.
_SHORTEST_HANG_TIMEOUT_S = 1.0


def _hang_timeout_is_measurable(config: Config) -> Iterator[Problem]:
    """The timeout is off, or longer than the delays of a busy machine."""
    timeout = config.resilience.hang_timeout_s
    if 0 < timeout < _SHORTEST_HANG_TIMEOUT_S:
        yield Problem(
            "resilience.hang_timeout_s",
            timeout,
            f"must be 0 (off) or at least {show(_SHORTEST_HANG_TIMEOUT_S)}",
            "use 600.0, or 0.0 to switch hang detection off",
        )


def _slow_phases_get_more_time(config: Config) -> Iterator[Problem]:
    """A slow phase may take at least as long as an ordinary step."""
    resilience = config.resilience
    if resilience.hang_slow_phase_timeout_s < resilience.hang_timeout_s:
        yield Problem(
            "resilience.hang_slow_phase_timeout_s",
            resilience.hang_slow_phase_timeout_s,
            f"must be at least resilience.hang_timeout_s ({show(resilience.hang_timeout_s)})",
            f"use {show(resilience.hang_timeout_s)} or more, or lower resilience.hang_timeout_s",
        )


RULES = (_hang_timeout_is_measurable, _slow_phases_get_more_time)
