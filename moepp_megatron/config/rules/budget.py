"""Rules of `moe.budget`."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rows import Rule, first, group, refuse
from moepp_megatron.config.schema import Config


def _within_what_tokens_select(config: Config) -> Iterator[Problem]:
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

RULES: tuple[Rule, ...] = (
    group(
        lambda c: c.moe.budget.acts and c.moe.num_zero_computation_experts == 0,
        first(
            refuse(
                "moe.budget.target_ffn_per_token",
                lambda c: c.moe.budget.target_ffn_per_token is not None,
                _NO_CHOICE,
                "add zero-computation experts, or drop moe.budget",
            ),
            refuse(
                "moe.budget.controller",
                lambda c: True,
                _NO_CHOICE,
                "add zero-computation experts, or drop moe.budget",
            ),
        ),
    ),
    group(
        lambda c: c.moe.num_zero_computation_experts > 0,
        _within_what_tokens_select,
    ),
    group(
        lambda c: c.moe.budget.acts and c.moe.budget.held_by != "bias",
        refuse(
            "moe.balance_coeff",
            lambda c: c.moe.balance_coeff <= 0,
            "must be above 0 with moe.budget.controller {moe.budget.held_by}, because tau acts "
            "through the balance loss",
            "use 0.01, or moe.budget.controller bias",
        ),
    ),
    refuse(
        "moe.capacity_factor",
        lambda c: c.moe.capacity_factor is not None and c.moe.budget.acts,
        "must be null with moe.budget, because the capacities follow from a fixed moe.tau",
        "use null, or drop moe.budget",
    ),
)
