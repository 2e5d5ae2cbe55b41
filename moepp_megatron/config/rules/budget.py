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
    name = "controller" if moe.budget.controller != "none" else "target_ffn_per_token"
    yield Problem(
        f"moe.budget.{name}",
        getattr(moe.budget, name),
        "must come with zero-computation experts, because every token takes "
        f"moe.router_topk ({moe.router_topk}) FFN experts without them",
        "add zero-computation experts, or drop moe.budget",
    )


def _budget_is_within_what_tokens_select(config: Config) -> Iterator[Problem]:
    """A token selects K experts; if all K are FFN experts, no tau balances them."""
    moe = config.moe
    for key in ("target_ffn_per_token", "start_ffn_per_token"):
        value = getattr(moe.budget, key)
        highest = moe.router_topk
        # At the start the target may be K: there tau ends at its largest value.
        fits = value is None or value < highest or (value == highest and key.startswith("start"))
        if not fits:
            yield Problem(
                f"moe.budget.{key}",
                value,
                f"must be below moe.router_topk ({highest}), the experts that a token selects",
                f"use for example {0.75 * highest:g}",
            )


def _bias_controller_has_a_bias(config: Config) -> Iterator[Problem]:
    """The bias controller moves the selection bias."""
    moe = config.moe
    if moe.budget.controller == "bias" and not moe.selection_bias:
        yield Problem(
            "moe.budget.controller",
            "bias",
            "must come with moe.selection_bias, which is false",
            "set moe.selection_bias to true, or use controller tau",
        )


def _tau_acts_through_the_balance_loss(config: Config) -> Iterator[Problem]:
    """Tau has no effect if the balance loss is off."""
    moe = config.moe
    if moe.balance_coeff > 0 or not moe.budget.acts or moe.budget.controller == "bias":
        return
    yield Problem(
        "moe.balance_coeff",
        moe.balance_coeff,
        f"must be above 0 with moe.budget.controller {moe.budget.controller}, because tau acts "
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
    _bias_controller_has_a_bias,
    _tau_acts_through_the_balance_loss,
    _capacity_follows_a_fixed_tau,
)
