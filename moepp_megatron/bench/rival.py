"""The vanilla model that a MoE++ configuration is compared with."""

from __future__ import annotations

from moepp_megatron.config import Config, with_overrides


def vanilla(config: Config) -> Config:
    """The same model without zero-computation experts and gating residual.

    megatron-core's balance loss is E / K times the paper's, so its coefficient is that much smaller
    for the same strength.
    """
    moe = config.moe
    coefficient = moe.balance_coeff * moe.router_topk / moe.num_ffn_experts
    return with_overrides(
        config,
        [
            "moe.num_zero_experts=0",
            "moe.num_copy_experts=0",
            "moe.num_constant_experts=0",
            "moe.gating_residual=false",
            f"moe.balance_coeff={coefficient}",
        ],
    )
