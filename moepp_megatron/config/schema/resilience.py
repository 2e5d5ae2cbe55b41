"""Section `resilience`: the checks of a running run, and when they act."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moepp_megatron.config.schema.section import Section, unit


class ResilienceSection(Section):
    """Settings for bad batches, silent divergence, hangs and stragglers."""

    guard: bool = Field(
        default=True,
        description="Skip batches whose loss or gradients are not finite or whose loss jumps; "
        "costs a reduction and a broadcast of three numbers a step",
        json_schema_extra=unit("-"),
    )
    guard_window: int = Field(
        default=128,
        ge=8,
        description="Newest losses that a loss is compared with; enough for a steady median, few "
        "enough that a falling loss stays near it. No loss counts as a jump before a quarter of "
        "the window is full",
        json_schema_extra=unit("steps"),
    )
    guard_threshold: float = Field(
        default=10.0,
        gt=0.0,
        description="Robust z-score (distance above the window's median over 1.4826 MAD) from "
        "which a loss is a jump; 10 leaves alone the tails of ordinary batch noise",
        json_schema_extra=unit("1"),
    )
    guard_max_consecutive_skips: int = Field(
        default=5,
        ge=1,
        description="Batches refused in a row after which their cause is sought (docs/guard.md); "
        "more than a damaged file spoils, few enough not to wait on a model that is already broken",
        json_schema_extra=unit("batches"),
    )
    guard_new_data: Literal["accept", "pause", "stop"] = Field(
        default="accept",
        description="What is done if it is that the data have changed: such batches are taken from "
        "then on, the run saves and ends with exit status 75, or it ends as after a failure; each "
        "with an alert",
        json_schema_extra=unit("-"),
    )
    guard_max_rollbacks: int = Field(
        default=3,
        ge=0,
        description="Rollbacks in a row to the newest checkpoint, where the model is damaged, "
        "without a step beyond the failing one, before the run fails; 0 fails at once",
        json_schema_extra=unit("rollbacks"),
    )
    divergence_interval: int = Field(
        default=1000,
        ge=0,
        description="Steps between comparisons of the parameters that ranks share; each reads all "
        "parameters once, so 1000 steps keep it far below a thousandth of the time; 0 is off",
        json_schema_extra=unit("steps"),
    )
    hang_timeout_s: float = Field(
        default=600.0,
        ge=0.0,
        description="Longest time without progress within a training step before all ranks write "
        "their stacks and end; many times any step, yet cheap beside a night lost; 0 is off",
        json_schema_extra=unit("s"),
    )
    hang_slow_phase_timeout_s: float = Field(
        default=1800.0,
        gt=0.0,
        description="The same for what may take long: the first step, evaluation, saving, loading",
        json_schema_extra=unit("s"),
    )
    straggler_interval: int = Field(
        default=50,
        ge=0,
        description="Steps between comparisons of the ranks' own time (step time less waiting for "
        "other ranks); long enough to average over routing noise; 0 is off",
        json_schema_extra=unit("steps"),
    )
    straggler_threshold: float = Field(
        default=1.5,
        gt=1.0,
        description="Own time over the ranks' median from which the slowest rank is named",
        json_schema_extra=unit("1"),
    )
