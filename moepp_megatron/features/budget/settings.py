"""Section `moe.budget`: the target of FFN experts per token, and its controller."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import model_validator

from moepp_megatron.config.errors import Problem
from moepp_megatron.config.rows import first, group, no_effect_where, refuse, table
from moepp_megatron.config.schema.moe import Controller, EngineMoESection
from moepp_megatron.config.schema.section import Section, Unit

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config


class _BudgetSection(Section):
    """The budget of FFN experts per token, its controller and its schedule."""

    target_ffn_per_token: Annotated[float | None, Unit("experts", gt=0.0)] = None
    """FFN experts a token takes on average, of the moe.router_topk selected; takes the place of
    moe.tau. null: what moe.tau gives under perfect balance"""
    controller: Controller | None = None
    """Controller of the measured share: a bias on the selection of FFN experts, tau in the balance
    loss, or none. null: bias where there is a target, else none"""
    response: Annotated[float, Unit("1", gt=0.0, le=1.0)] = 0.7
    """Part of the bias that was missing in a step that is added after it, as measured; with
    controller bias and gain null"""
    gain: Annotated[float | None, Unit("1", gt=0.0)] = None
    """A fixed gain: step of the bias for each share that is missing (LongCat-Flash; null: the bias
    follows moe.budget.response), or of log tau for each unit of log odds (null: 1)"""
    decay: Annotated[float, Unit("1", ge=0.0, lt=1.0)] = 0.9
    """Weight of the past in the measured share's moving average; 0 takes each step as it is. Of tau
    and of a fixed gain"""
    scope: Literal["layer", "model"] = "layer"
    """Hold each MoE layer to the target, or only their mean"""
    start_ffn_per_token: Annotated[float | None, Unit("experts", gt=0.0)] = None
    """Where the target starts; null: at target_ffn_per_token"""
    ramp_begin: Annotated[int, Unit("steps", ge=0)] = 0
    """Steps that the target stays at its start"""
    ramp_steps: Annotated[int, Unit("steps", ge=0)] = 0
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


def _within_what_tokens_select(config: "Config") -> Iterator[Problem]:
    """A token selects K different experts: at most F FFN experts, at least what is left of Z."""
    moe, others = config.moe, config.moe.num_zero_computation_experts
    lowest, highest = max(0, moe.router_topk - others), min(moe.router_topk, moe.num_ffn_experts)
    remedy = f"use for example {lowest + 0.75 * (highest - lowest):g}"
    for key in ("target_ffn_per_token", "start_ffn_per_token"):
        name, value = f"moe.budget.{key}", getattr(moe.budget, key)
        # At the start the target may be at its end: there tau has its largest value.
        if value is None or (value == highest and key.startswith("start")):
            continue
        if value >= highest:
            rule = f"must be below {highest}, the FFN experts that a token selects at most"
            yield Problem(name, value, rule, remedy)
        elif value <= lowest:
            rule = f"must be above {lowest}, what moe.router_topk leaves with {others} others"
            yield Problem(name, value, rule, remedy)


_NO_CHOICE = (
    "must come with zero-computation experts, because every token takes moe.router_topk "
    "({moe.router_topk}) FFN experts without them"
)


class BudgetSettings(EngineMoESection):  # type: ignore[misc]  # as EngineMoESection
    """The section `moe` with a budget."""

    budget: _BudgetSection = _BudgetSection()
    """FFN experts per token, held during training"""

    @model_validator(mode="after")
    def _bias_of_its_controller(self) -> "BudgetSettings":
        """Switch on the selection bias that the budget's controller moves."""
        # It does not count as given by the user, so that it goes with the controller.
        if self.budget.held_by == "bias" and self.num_zero_computation_experts > 0:
            object.__setattr__(self, "selection_bias", True)
        return self

    @property
    def ffn_share(self) -> float:
        """Fraction of selections that go to FFN experts: the budget's, or else phi.

        Phi is what perfect balance under `tau` gives (arXiv 2410.07348).
        """
        if self.budget.target_ffn_per_token is not None:
            return self.budget.target_ffn_per_token / self.router_topk
        return self.phi(self.tau)

    @property
    def largest_ffn_share(self) -> float:
        """The largest target of the FFN share in the run."""
        start = self.budget.start_ffn_per_token
        return max(self.ffn_share, 0.0 if start is None else start / self.router_topk)

    @property
    def balanced_tau(self) -> float:
        """The tau under which perfect balance gives `ffn_share`."""
        share = self.ffn_share
        if self.budget.target_ffn_per_token is None or share >= 1.0:
            return self.tau
        return self.tau_for(share)

    @property
    def share_controller(self) -> Controller:
        """The controller of the FFN share."""
        return self.budget.held_by

    own_rules = table(
        group(
            "moe.budget.acts and not moe.num_zero_computation_experts",
            first(
                refuse(
                    "moe.budget.target_ffn_per_token",
                    "not moe.budget.target_ffn_per_token null",
                    _NO_CHOICE,
                    "add zero-computation experts, or drop moe.budget",
                ),
                refuse(
                    "moe.budget.controller",
                    "moe.budget.acts",
                    _NO_CHOICE,
                    "add zero-computation experts, or drop moe.budget",
                ),
            ),
        ),
        group(
            "moe.num_zero_computation_experts",
            _within_what_tokens_select,
        ),
        group(
            "moe.budget.acts and not moe.budget.held_by bias",
            refuse(
                "moe.balance_coeff",
                "not moe.balance_coeff",
                "must be above 0 with moe.budget.controller {moe.budget.held_by}, because tau acts "
                "through the balance loss",
                "use 0.01, or moe.budget.controller bias",
            ),
        ),
        refuse(
            "moe.capacity_factor",
            "moe.budget.acts and not moe.capacity_factor null",
            "must be null with moe.budget, because the capacities follow from a fixed moe.tau",
            "use null, or drop moe.budget",
        ),
    )
    no_effect = table(
        no_effect_where(
            "not moe.budget.target_ffn_per_token null",
            "with moe.budget.target_ffn_per_token, from which tau follows",
            "moe.tau",
            "leave one of them out",
        ),
        no_effect_where(
            "moe.budget.held_by none",
            "without moe.budget.controller",
            "moe.budget.response moe.budget.gain moe.budget.decay moe.budget.scope",
            "use bias or tau",
        ),
        no_effect_where(
            "moe.budget.measures_gain",
            "without moe.budget.gain",
            "moe.budget.decay",
            "set it, or leave this out",
        ),
        no_effect_where(
            "moe.budget.held_by bias and not moe.budget.measures_gain",
            "with moe.budget.gain, which is fixed",
            "moe.budget.response",
            "leave one of them out",
        ),
        no_effect_where(
            "moe.budget.held_by tau",
            "with moe.budget.controller tau",
            "moe.budget.response",
            "use bias, or leave it out",
        ),
        no_effect_where(
            "moe.budget.start_ffn_per_token null",
            "without moe.budget.start_ffn_per_token",
            "moe.budget.ramp_begin moe.budget.ramp_steps",
            "set it, or leave this out",
        ),
        no_effect_where(
            "not moe.budget.acts",
            "without moe.budget.target_ffn_per_token or controller",
            "moe.budget.start_ffn_per_token",
            "set one of them, or leave it out",
        ),
        # The measured bias moves all FFN experts alike; the balance loss distinguishes them.
        refuse(
            "moe.balance_coeff",
            "moe.budget.measures_gain and not moe.balance_coeff",
            "leaves nothing that evens out FFN experts among each other with moe.budget.controller "
            "bias and no moe.budget.gain",
            "use 0.01, or set moe.budget.gain for LongCat-Flash's rule, which moves each expert's",
        ),
    )
