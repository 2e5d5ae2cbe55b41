"""Section `resilience`: the checks of a running run, and when they act."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.schema.section import Section, Unit


class ResilienceSection(Section):
    """Settings for bad batches, silent divergence, hangs and stragglers."""

    guard: Annotated[bool, Unit("-")] = True
    """Skip batches whose loss or gradients are not finite or whose loss jumps; costs a reduction
    and a broadcast of three numbers a step"""
    guard_threshold: Annotated[float, Unit("1"), Field(gt=0.0)] = 10.0
    """Spreads above the course of the losses from which a loss is a jump, once 20 losses are known;
    10 tolerates the tails of ordinary batch noise"""
    guard_max_consecutive_skips: Annotated[int, Unit("batches"), Field(ge=1)] = 5
    """Batches refused in a row after which their cause is sought (docs/guard.md); more than a
    damaged file spoils, few enough not to wait on a model that is already broken"""
    guard_new_data: Annotated[Literal["accept", "pause", "stop"], Unit("-")] = "accept"
    """Response if the data have changed: take such batches from then on, save and end with exit
    status 75, or end as after a failure; each with an alert"""
    guard_max_rollbacks: Annotated[int, Unit("rollbacks"), Field(ge=0)] = 3
    """Rollbacks in a row to the newest checkpoint, where the model is damaged, without a step
    beyond the failing one, before the run fails; 0 fails at once"""
    divergence_interval: Annotated[int, Unit("steps"), Field(ge=0)] = 1000
    """Steps between comparisons of the parameters that ranks share; each reads all parameters once,
    so 1000 steps keep it far below a thousandth of the time; 0 is off"""
    hang_timeout_s: Annotated[float, Unit("s"), Field(ge=0.0)] = 600.0
    """Longest time without progress within a training step before all ranks write their stacks and
    end; many times any step, yet cheap against a night lost; 0 is off"""
    hang_slow_phase_timeout_s: Annotated[float, Unit("s"), Field(gt=0.0)] = 1800.0
    """The same for what may take long: the first step, evaluation, saving, loading"""
    straggler_interval: Annotated[int, Unit("steps"), Field(ge=0)] = 50
    """Steps between comparisons of the ranks' own time (step time less waiting for other ranks);
    long enough to average over routing noise; 0 is off"""
    straggler_threshold: Annotated[float, Unit("1"), Field(gt=1.0)] = 1.5
    """Own time over the ranks' median from which the slowest rank is named"""
