"""The configuration of a MoE++ layer's router: megatron-core's, with the count of all experts."""

import copy

from megatron.core.transformer.transformer_config import TransformerConfig

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.upstream_settings import refuse_ignored


def router_config(config: TransformerConfig, moepp: MoEPPConfig) -> TransformerConfig:
    """The configuration of the router only.

    megatron-core sizes the router, the experts and the expert-parallel group by one number,
    `num_moe_experts`, which here counts FFN experts; only this function converts it to the number
    of all experts, among which the router chooses.

    Raises:
        ValueError: Where the two configurations contradict each other, the router would ignore a
            setting (`upstream_settings`), or balance over the global batch would count on from step
            to step.
    """
    refuse_ignored(config, moepp)
    _require_new_counts(config, moepp)
    routing = copy.copy(config)
    routing.num_moe_experts = moepp.num_experts
    # The heterogeneous balance loss replaces megatron-core's.
    routing.moe_router_load_balancing_type = "none"
    routing.moe_aux_loss_coeff = 0.0
    if routing.moe_router_dtype != "fp64":
        routing.moe_router_dtype = "fp32"
    return routing


def _require_new_counts(config: TransformerConfig, moepp: MoEPPConfig) -> None:
    """Refuse balance over the global batch where nobody would reset its counts."""
    types = config.moe_router_load_balancing_type
    if moepp.balance_scope == "global" and "global_aux_loss" not in types:
        raise ValueError(
            f"TransformerConfig.moe_router_load_balancing_type ({types}) must be global_aux_loss "
            "with balance_scope (global), because megatron-core's finalize_model_grads begins the "
            "counts of a step only for that type; use global_aux_loss (its "
            "moe_aux_loss_coeff may be 0), or another balance_scope"
        )
