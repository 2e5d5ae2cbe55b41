"""Section `resilience`: the checks of a running run, and when they act."""

from __future__ import annotations

from typing import Annotated, Literal

from moepp_megatron.config.rows import no_effect_where, no_effect_with, refuse
from moepp_megatron.config.schema.section import Section, Unit

# The watchdog looks at its rank a few times within the timeout; less is mostly scheduling noise.
_SHORTEST_HANG_TIMEOUT_S = 1.0


class ResilienceSection(Section):
    """Settings for bad batches, silent divergence, hangs and stragglers."""

    guard: bool = True
    """Skip batches whose loss or gradients are not finite or whose loss jumps; costs a reduction
    and a broadcast of three numbers a step"""
    guard_threshold: Annotated[float, Unit("1", gt=0.0)] = 10.0
    """Spreads above the course of the losses from which a loss is a jump, once 20 losses are known;
    10 tolerates the tails of ordinary batch noise"""
    guard_max_consecutive_skips: Annotated[int, Unit("batches", ge=1)] = 5
    """Batches refused in a row after which their cause is sought (docs/guard.md); more than a
    damaged file spoils, few enough not to wait on a model that is already broken"""
    guard_new_data: Literal["accept", "pause", "stop"] = "accept"
    """Response if the data have changed: take such batches from then on, save and end with exit
    status 75, or end as after a failure; each with an alert"""
    guard_max_rollbacks: Annotated[int, Unit("rollbacks", ge=0)] = 3
    """Rollbacks in a row to the newest checkpoint, where the model is damaged, without a step
    beyond the failing one, before the run fails; 0 fails at once"""
    divergence_interval: Annotated[int, Unit("steps", ge=0)] = 1000
    """Steps between comparisons of the parameters that ranks share; each reads all parameters once,
    so 1000 steps keep it far below a thousandth of the time; 0 is off"""
    hang_timeout_s: Annotated[float, Unit("s", ge=0.0)] = 600.0
    """Longest time without progress within a training step before all ranks write their stacks and
    end; many times any step, yet cheap against a night lost; 0 is off"""
    hang_slow_phase_timeout_s: Annotated[float, Unit("s", gt=0.0)] = 1800.0
    """The same for what may take long: the first step, evaluation, saving, loading"""
    straggler_interval: Annotated[int, Unit("steps", ge=0)] = 50
    """Steps between comparisons of the ranks' own time (step time less waiting for other ranks);
    long enough to average over routing noise; 0 is off"""
    straggler_threshold: Annotated[float, Unit("1", gt=1.0)] = 1.5
    """Own time over the ranks' median from which the slowest rank is named"""

    own_rules = (
        refuse(
            "resilience.hang_timeout_s",
            lambda c: 0 < c.resilience.hang_timeout_s < _SHORTEST_HANG_TIMEOUT_S,
            f"must be 0 (off) or at least {_SHORTEST_HANG_TIMEOUT_S}",
            "use 600.0, or 0.0 to switch hang detection off",
        ),
        refuse(
            "resilience.hang_slow_phase_timeout_s",
            lambda c: c.resilience.hang_slow_phase_timeout_s < c.resilience.hang_timeout_s,
            "must be at least resilience.hang_timeout_s ({resilience.hang_timeout_s})",
            "use {resilience.hang_timeout_s} or more, or lower resilience.hang_timeout_s",
        ),
    )
    removed = {"guard_window": (128, "leave it out: losses are compared with their course")}
    no_effect = (
        no_effect_with(
            "resilience.guard",
            False,
            "resilience.guard_threshold "
            "resilience.guard_max_consecutive_skips resilience.guard_max_rollbacks "
            "resilience.guard_new_data",
            "switch resilience.guard on",
        ),
        no_effect_with(
            "resilience.hang_timeout_s",
            0.0,
            "resilience.hang_slow_phase_timeout_s",
            "switch resilience.hang_timeout_s on",
        ),
        no_effect_with(
            "resilience.straggler_interval",
            0,
            "resilience.straggler_threshold",
            "switch resilience.straggler_interval on",
        ),
        no_effect_where(
            "resilience.guard and not checkpoint.save_interval",
            "with checkpoint.save_interval 0",
            "resilience.guard_max_rollbacks",
            "set checkpoint.save_interval above 0, or leave it out",
        ),
    )
