"""Rules of the section `resilience`."""

from __future__ import annotations

from moepp_megatron.config.rows import Rule, refuse
from moepp_megatron.config.schema import Config

# The watchdog looks at its rank a few times within the timeout; less is mostly scheduling noise.
_SHORTEST_HANG_TIMEOUT_S = 1.0


def _is_shorter_than_a_step(config: Config) -> bool:
    return config.resilience.hang_slow_phase_timeout_s < config.resilience.hang_timeout_s


RULES: tuple[Rule, ...] = (
    refuse(
        "resilience.hang_timeout_s",
        lambda c: 0 < c.resilience.hang_timeout_s < _SHORTEST_HANG_TIMEOUT_S,
        f"must be 0 (off) or at least {_SHORTEST_HANG_TIMEOUT_S}",
        "use 600.0, or 0.0 to switch hang detection off",
    ),
    refuse(
        "resilience.hang_slow_phase_timeout_s",
        _is_shorter_than_a_step,
        "must be at least resilience.hang_timeout_s ({resilience.hang_timeout_s})",
        "use {resilience.hang_timeout_s} or more, or lower resilience.hang_timeout_s",
    ),
)
