"""Section `moe.budget`: the target of FFN experts per token, and its controller."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moepp_megatron.config.schema.section import Section, unit


class BudgetSection(Section):
    """The budget of FFN experts per token, its controller and its schedule."""

    target_ffn_per_token: float | None = Field(
        default=None,
        gt=0.0,
        description="FFN experts a token takes on average, of the moe.router_topk selected; takes "
        "the place of moe.tau. null: what moe.tau gives under perfect balance",
        json_schema_extra=unit("experts"),
    )
    controller: Literal["none", "bias", "tau"] = Field(
        default="none",
        description="What moves the measured share to the target: a bias on the selection of FFN "
        "experts (LongCat-Flash), or tau in the balance loss, or nothing",
        json_schema_extra=unit("-"),
    )
    gain: float | None = Field(
        default=None,
        gt=0.0,
        description="How strongly the controller acts: step of the bias for each share that is "
        "missing (null: 0.01), or of log tau for each unit of log odds (null: 1)",
        json_schema_extra=unit("1"),
    )
    decay: float = Field(
        default=0.9,
        ge=0.0,
        lt=1.0,
        description="Weight of the past in the measured share's moving average; 0 takes each step "
        "as it is",
        json_schema_extra=unit("1"),
    )
    scope: Literal["layer", "model"] = Field(
        default="layer",
        description="Hold each MoE layer to the target, or only their mean",
        json_schema_extra=unit("-"),
    )
    start_ffn_per_token: float | None = Field(
        default=None,
        gt=0.0,
        description="Where the target starts; null: at target_ffn_per_token",
        json_schema_extra=unit("experts"),
    )
    ramp_begin: int = Field(
        default=0,
        ge=0,
        description="Steps that the target stays at its start",
        json_schema_extra=unit("steps"),
    )
    ramp_steps: int = Field(
        default=0,
        ge=0,
        description="Steps in which it then moves to the target, on a straight line",
        json_schema_extra=unit("steps"),
    )

    @property
    def acts(self) -> bool:
        """Whether training differs from one with `moe.tau` alone."""
        return self.target_ffn_per_token is not None or self.controller != "none"

    @property
    def controller_gain(self) -> float:
        """The gain, the default resolved."""
        if self.gain is not None:
            return self.gain
        return 0.01 if self.controller == "bias" else 1.0
