"""Section `moe.budget`: the target of FFN experts per token, and its controller."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.schema.section import Section, Unit

Controller = Literal["none", "bias", "tau"]


class BudgetSection(Section):
    """The budget of FFN experts per token, its controller and its schedule."""

    target_ffn_per_token: Annotated[float | None, Unit("experts"), Field(gt=0.0)] = None
    """FFN experts a token takes on average, of the moe.router_topk selected; takes the place of
    moe.tau. null: what moe.tau gives under perfect balance"""
    controller: Controller | None = None
    """Controller of the measured share: a bias on the selection of FFN experts, tau in the balance
    loss, or none. null: bias where there is a target, else none"""
    response: Annotated[float, Unit("1"), Field(gt=0.0, le=1.0)] = 0.7
    """Part of the bias that was missing in a step that is added after it, as measured; with
    controller bias and gain null"""
    gain: Annotated[float | None, Unit("1"), Field(gt=0.0)] = None
    """A fixed gain: step of the bias for each share that is missing (LongCat-Flash; null: the bias
    follows moe.budget.response), or of log tau for each unit of log odds (null: 1)"""
    decay: Annotated[float, Unit("1"), Field(ge=0.0, lt=1.0)] = 0.9
    """Weight of the past in the measured share's moving average; 0 takes each step as it is. Of tau
    and of a fixed gain"""
    scope: Literal["layer", "model"] = "layer"
    """Hold each MoE layer to the target, or only their mean"""
    start_ffn_per_token: Annotated[float | None, Unit("experts"), Field(gt=0.0)] = None
    """Where the target starts; null: at target_ffn_per_token"""
    ramp_begin: Annotated[int, Unit("steps"), Field(ge=0)] = 0
    """Steps that the target stays at its start"""
    ramp_steps: Annotated[int, Unit("steps"), Field(ge=0)] = 0
    """Steps in which it then moves to the target, on a straight line"""

    @property
    def held_by(self) -> Controller:
        """The controller, the default resolved."""
        if self.controller is not None:
            return self.controller
        return "none" if self.target_ffn_per_token is None else "bias"

    @property
    def measures_gain(self) -> bool:
        """True if the bias moves by the measured shortfall, not by a fixed gain."""
        return self.held_by == "bias" and self.gain is None

    @property
    def acts(self) -> bool:
        """True if training differs from one with only `moe.tau`."""
        return self.target_ffn_per_token is not None or self.held_by != "none"

    @property
    def fixed_gain(self) -> float | None:
        """The gain, the default resolved; None where it is measured."""
        return 1.0 if self.gain is None and self.held_by == "tau" else self.gain
