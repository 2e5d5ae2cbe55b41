"""Rules of `moe.budget`."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.schema import Config


def _budget_has_something_to_choose(config: Config) -> Iterator[Problem]:
    """Every token gets K FFN experts if there are no zero-computation experts."""
    moe = config.moe
    if not moe.budget.acts or moe.num_zero_computation_experts > 0:
        return
    name = "controller" if moe.budget.target_ffn_per_token is None else "target_ffn_per_token"
    yield Problem(
        f"moe.budget.{name}",
        getattr(moe.budget, name),
        "must come with zero-computation experts, because every token takes "
        f"moe.router_topk ({moe.router_topk}) FFN experts without them",
        "add zero-computation experts, or drop moe.budget",
    )


def _budget_is_within_what_tokens_select(config: Config) -> Iterator[Problem]:
    """A token selects K different experts: at most F FFN experts, at least what is left of Z."""
    moe = config.moe
    others = moe.num_zero_computation_experts
    if others == 0:
        return
    lowest, highest = max(0, moe.router_topk - others), min(moe.router_topk, moe.num_ffn_experts)
    for key in ("target_ffn_per_token", "start_ffn_per_token"):
        value = getattr(moe.budget, key)
        # At the start the target may be at its end: there tau has its largest value.
        if value is None or (value == highest and key.startswith("start")):
            continue
        if value >= highest:
            rule = f"below {highest}, the FFN experts that a token selects at most"
        elif value <= lowest:
            rule = f"above {lowest}, what moe.router_topk leaves beside {others} others"
        else:
            continue
        example = lowest + 0.75 * (highest - lowest)
        yield Problem(f"moe.budget.{key}", value, f"must be {rule}", f"use for example {example:g}")


def _tau_acts_through_the_balance_loss(config: Config) -> Iterator[Problem]:
    """Tau has no effect if the balance loss is off."""
    moe = config.moe
    if moe.balance_coeff > 0 or not moe.budget.acts or moe.budget.held_by == "bias":
        return
    yield Problem(
        "moe.balance_coeff",
        moe.balance_coeff,
        f"must be above 0 with moe.budget.controller {moe.budget.held_by}, because tau acts "
        "through the balance loss",
        "use 0.01, or moe.budget.controller bias",
    )


def _capacity_follows_a_fixed_tau(config: Config) -> Iterator[Problem]:
    """Capacities are computed from one tau (paper, expert capacity)."""
    moe = config.moe
    if moe.capacity_factor is not None and moe.budget.acts:
        yield Problem(
            "moe.capacity_factor",
            moe.capacity_factor,
            "must be null with moe.budget, because the capacities follow from a fixed moe.tau",
            "use null, or drop moe.budget",
        )


RULES = (
    _budget_has_something_to_choose,
    _budget_is_within_what_tokens_select,
    _tau_acts_through_the_balance_loss,
    _capacity_follows_a_fixed_tau,
)
