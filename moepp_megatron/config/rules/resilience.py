"""Rules of the section `resilience`."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem, show
from moepp_megatron.config.rules.ignored import ignored
from moepp_megatron.config.schema import Config

# The watchdog looks at its rank a few times within the timeout; less is mostly scheduling noise.
SHORTEST_HANG_TIMEOUT_S = 1.0


def hang_timeout_is_measurable(config: Config) -> Iterator[Problem]:
    """The timeout is off or long enough to be told from a busy machine."""
    timeout = config.resilience.hang_timeout_s
    if 0 < timeout < SHORTEST_HANG_TIMEOUT_S:
        yield Problem(
            "resilience.hang_timeout_s",
            timeout,
            f"must be 0 (off) or at least {show(SHORTEST_HANG_TIMEOUT_S)}",
            "use 600.0, or 0.0 to switch hang detection off",
        )


def slow_phases_get_more_time(config: Config) -> Iterator[Problem]:
    """A slow phase may take at least as long as an ordinary step."""
    resilience = config.resilience
    if resilience.hang_slow_phase_timeout_s < resilience.hang_timeout_s:
        yield Problem(
            "resilience.hang_slow_phase_timeout_s",
            resilience.hang_slow_phase_timeout_s,
            f"must be at least resilience.hang_timeout_s ({show(resilience.hang_timeout_s)})",
            f"use {show(resilience.hang_timeout_s)} or more, or lower resilience.hang_timeout_s",
        )


RULES = (hang_timeout_is_measurable, slow_phases_get_more_time)


def settings_of_what_is_off(config: Config) -> Iterator[Problem]:
    """Details of a guard, a timeout or a comparison that is switched off."""
    resilience = config.resilience
    off = {
        "guard": ("guard_window", "guard_threshold", "guard_max_consecutive_skips",
                  "guard_max_rollbacks"),
        "hang_timeout_s": ("hang_slow_phase_timeout_s",),
        "straggler_interval": ("straggler_threshold",),
    }  # fmt: skip
    for switch, keys in off.items():
        value = getattr(resilience, switch)
        if value:
            continue
        for key in keys:
            yield from ignored(
                "resilience",
                resilience,
                key,
                f"with resilience.{switch} {show(value)}",
                f"switch resilience.{switch} on, or leave it out",
            )


def rollback_without_checkpoint(config: Config) -> Iterator[Problem]:
    """Rolling back needs a checkpoint of this run."""
    if config.resilience.guard and config.checkpoint.save_interval == 0:
        yield from ignored(
            "resilience",
            config.resilience,
            "guard_max_rollbacks",
            "with checkpoint.save_interval 0",
            "set checkpoint.save_interval above 0, or leave it out",
        )


IGNORED = (settings_of_what_is_off, rollback_without_checkpoint)
