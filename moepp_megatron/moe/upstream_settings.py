"""The MoE++ layer's treatment of each of megatron-core's MoE settings. Imports no torch.

megatron-core reads its `TransformerConfig` in its own router and layer, part of which the MoE++
layer replaces. A setting that only the replaced part reads would be silently ignored. So
every field of `TransformerConfig` that concerns experts and routing is in one of the tables below.
A field of a later version that is in none of them fails a test until it is decided, is named in a
run's output, and must keep its default:

    HONOURED   the setting does what megatron-core says
    OURS       MoEPPConfig decides: the setting must agree with it, or keep its default
    REFUSED    the setting must keep the value named here
    IDLE       the setting is read only with another one that is refused
"""

import copy
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any

from moepp_megatron.layer_settings import BALANCE_TYPES
from moepp_megatron.moe.config import MoEPPConfig


@dataclass(frozen=True)
class _Refused:
    """A setting that the layer cannot honour; the first allowed value is the remedy."""

    allowed: tuple[Any, ...]
    reason: str
    instead: str = ""  # to set for the same purpose, if there is anything


@dataclass(frozen=True)
class _Ours:
    """A setting that the field of MoEPPConfig decides; `unset` values count as not set."""

    field: str
    unset: tuple[Any, ...] = ()
    # From the field's value to the setting's that agrees with it.
    meaning: Callable[[Any], Any] = lambda value: value


HONOURED = frozenset(
    {
        # Sizes and places of experts.
        "moe_ffn_hidden_size",
        "moe_layer_freq",
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_gate",
        "moe_shared_expert_glu_interleave_size",
        "use_grouped_gemm_for_shared_expert",
        # What the FFN experts compute with.
        "moe_apply_probs_on_input",
        "moe_grouped_gemm",
        "moe_mlp_glu_interleave_size",
        "moe_single_grouped_bias",
        "moe_single_grouped_weight",
        # What the router keeps of megatron-core's.
        "moe_enable_routing_replay",
        "moe_input_jitter_eps",
        "moe_router_bias_update_rate",
        "moe_router_dtype",
        "moe_z_loss_coeff",
        # Dispatch; `build_dispatcher` and `FFNFlexTokenDispatcher` refuse what they cannot do.
        "moe_deepep_num_sms",
        "moe_enable_deepep",
        "moe_flex_dispatcher_backend",
        "moe_flex_dispatcher_num_sms",
        "moe_hybridep_num_blocks_permute",
        "moe_hybridep_num_blocks_unpermute",
        "moe_hybridep_num_sms",
        "moe_hybridep_num_sms_preprocessing",
        "moe_hybridep_pad_uneven_dispatch_inputs",
        "moe_permute_fusion",
        "moe_permute_fusion_into_hybridep",
        "moe_token_dispatcher_type",
        "overlap_moe_expert_parallel_comm",
        # The loop's.
        "moe_grad_scale_func",
        "moe_layer_recompute",
        "moe_per_layer_logging",
        # `get_moepp_mtp_block_spec`; megatron-core's own MTP layers are refused by `MoEPPLayer`.
        "mtp_num_layers",
    }
)

OURS = {
    "num_moe_experts": _Ours("num_ffn_experts"),
    "moe_router_topk": _Ours("router_topk"),
    "moe_aux_loss_coeff": _Ours("balance_coeff", (0.0,)),
    # "none" only switches megatron-core's own loss off.
    "moe_router_load_balancing_type": _Ours(
        "balance_scope", ("aux_loss", "none"), lambda scope: BALANCE_TYPES[scope]
    ),
    "moe_router_score_function": _Ours("score_function", ("softmax",)),
    # True: megatron-core moves the bias after every batch.
    "moe_router_enable_expert_bias": _Ours("selection_bias", (False,)),
    # True: the gates are the scores before the selection. megatron-core demands it for one expert
    # per token.
    "moe_router_pre_softmax": _Ours(
        "gate_normalization", (False,), lambda normalization: normalization == "none"
    ),
    "moe_router_num_groups": _Ours("num_groups", (None,)),
    "moe_router_group_topk": _Ours("group_topk", (None,)),
    "moe_router_topk_scaling_factor": _Ours("gate_scale", (None,)),
}

_FORCED = "the MoE++ router selects by its logits"
_NCCLEP = "its backend, ncclep, is refused"
_SPEC = "the MoE++ layer spec does not pass it on"

REFUSED = {
    "moe_latent_size": _Refused((None,), "zero-computation experts take the whole vector"),
    "moe_expert_capacity_factor": _Refused(
        (None,), "it knows one kind of expert", "MoEPPConfig.capacity_factor"
    ),
    "moe_token_drop_policy": _Refused(
        ("probs",), "the selections with the largest gates stay within the capacities"
    ),
    "moe_token_dropping": _Refused((False,), "megatron-core does not support it either"),
    **dict.fromkeys(
        ("moe_pad_expert_input_to_capacity", "moe_pad_experts_for_cuda_graph_inference"),
        _Refused((False,), "it counts K selections a token"),
    ),
    "moe_expert_rank_capacity_factor": _Refused((None,), "its overflow is not counted here"),
    "moe_shared_expert_overlap": _Refused(
        (False,),
        "no step of its dispatchers runs shared experts, which the MoE++ layer runs during the "
        "all-to-all anyway",
    ),
    **dict.fromkeys(
        ("mlp_chunks_for_training", "mlp_chunks_for_prefill"),
        _Refused((1,), "a chunk would be routed without its router logits"),
    ),
    "overlap_dispatch_backward_with_experts_wgrad": _Refused(
        (False,), "it waits for the all-to-all where the MoE++ dispatcher only starts it"
    ),
    "moe_router_padding_for_quantization": _Refused(
        (False, None),
        "padding the routing map would select experts that the router did not, and send and count "
        "those rows; experts pad their own rows",
    ),
    "moe_router_padding_for_fp8": _Refused(
        (False, None), "it stands for moe_router_padding_for_quantization, which is refused"
    ),
    "moe_router_topk_limited_devices": _Refused(
        (None,),
        "megatron-core has replaced it by moe_router_num_groups and moe_router_group_topk",
        "those",
    ),
    "moe_router_force_load_balancing": _Refused((False,), _FORCED),
    "moe_router_force_biased": _Refused((None,), _FORCED),
    "moe_router_fusion": _Refused(
        (False,), "the fused kernel knows one kind of expert", "MoEPPConfig.fused"
    ),
    **dict.fromkeys(
        ("moe_paged_stash", "moe_use_grouped_tensor"),
        _Refused((False,), "its rows per expert are counted in every step"),
    ),
    **dict.fromkeys(
        ("moe_dispatch_fwd_dtype", "moe_combine_bwd_dtype"), _Refused(("bf16",), _NCCLEP)
    ),
    **dict.fromkeys(
        ("moe_ncclep_static_shape", "moe_ncclep_zero_copy"), _Refused((False,), _NCCLEP)
    ),
    "transformer_impl": _Refused(
        ("transformer_engine", "local"), "megatron-core's inference layers have their own router"
    ),
    "experimental_attention_variant": _Refused((None,), _SPEC),
    **dict.fromkeys(
        (
            "heterogeneous_block_specs",
            "mla_down_proj_fusion",
            "qk_l2_norm",
            "use_kitchen",
            "use_kitchen_attention",
            "use_te_activation_func",
        ),
        _Refused((False,), _SPEC),
    ),
    "enable_mhc_connections": _Refused((False,), "the MoE++ layer has one residual stream"),
    "mtp_hsm": _Refused((False,), "the layers of further tokens are this package's"),
    "mtp_use_repeated_layer": _Refused(
        (False,), "its router would be counted and balanced as one layer of several depths"
    ),
    "mtp_detach_heads": _Refused(
        (False,), "the loss of further tokens is this package's, and trains the output layer too"
    ),
}

IDLE = {
    "moe_router_quantile_balancing_ema": "moe_router_load_balancing_type",
    "moe_paged_stash_page_size": "moe_paged_stash",
    "moe_paged_stash_buffer_size_factor_cuda": "moe_paged_stash",
    "moe_paged_stash_buffer_size_factor_cpu": "moe_paged_stash",
    "inference_moe_disable_fused_quant_kernels": "transformer_impl",
    "inference_moe_token_dispatcher_type": "transformer_impl",
}


# By its name, the best that a new field can be judged by. Sizes of groups are the layout's.
_CONCERNS_EXPERTS = re.compile(r"^(?!expert_).*(moe|expert|router|routing|mtp_num|mlp_chunks)")


def refuse_ignored(config: Any, moepp: MoEPPConfig) -> None:
    """Raise ValueError for settings of a MoE++ model's `TransformerConfig` that its layers ignore.

    It names the setting, its value, the rule and a remedy.
    """
    for name in REFUSED:
        refuse_setting(config, name)
    for name, default in undecided(config.__class__).items():
        if getattr(config, name) != default:
            raise ValueError(
                f"TransformerConfig.{name} ({getattr(config, name)}) must be left at its default "
                f"({default}), because this version of moepp_megatron does not know it; see "
                "docs/upgrading.md"
            )
    for name, ours in OURS.items():
        value, expected = getattr(config, name), getattr(moepp, ours.field)
        meaning = ours.meaning(expected)
        if value in (*ours.unset, meaning):
            continue
        if name == "moe_aux_loss_coeff" and config.moe_router_load_balancing_type == "none":
            continue  # The coefficient of no loss.
        counts = "; num_moe_experts counts FFN experts only" if name == "num_moe_experts" else ""
        default = f" or be left at {ours.unset[0]}" if ours.unset else ""
        raise ValueError(
            f"TransformerConfig.{name} ({value}) must equal the MoEPPConfig's value "
            f"({ours.field} {expected}){default}{counts}; use {meaning}, or change "
            f"MoEPPConfig.{ours.field}"
        )


@cache
def undecided(kind: type) -> dict[str, Any]:
    """Name and default of each field of a configuration of megatron-core's that is in no table."""
    # A subclass of somebody else's has settings of its own.
    own = [base for base in kind.__mro__ if base.__module__.startswith("megatron.core.")]
    decided = {*HONOURED, *OURS, *REFUSED, *IDLE}
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in (fields(own[0]) if own else ())
        if _CONCERNS_EXPERTS.search(field.name) and field.name not in decided
    }


def refuse_setting(config: Any, name: str, user: str = "the MoE++ layer") -> None:
    """Raise ValueError for a setting of `REFUSED` that `user` cannot honour."""
    rule = REFUSED[name]
    # A version of megatron-core may lack a field of another one.
    value = getattr(config, name, rule.allowed[0])
    if value in rule.allowed:
        return
    instead = f" and set {rule.instead}" if rule.instead else ""
    raise ValueError(
        f"TransformerConfig.{name} ({value}) is not supported by {user}, because "
        f"{rule.reason}; use {rule.allowed[0]}{instead}"
    )


def router_config(config: Any, moepp: MoEPPConfig) -> Any:
    """The `TransformerConfig` of the router only.

    megatron-core sizes the router, the experts and the expert-parallel group by one number,
    `num_moe_experts`, which here counts FFN experts; only this function converts it to the number
    of all experts, among which the router chooses. Raise ValueError where the two configurations
    contradict each other, the router would ignore a setting, or balance over the global batch would
    count on from step to step.
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


def _require_new_counts(config: Any, moepp: MoEPPConfig) -> None:
    """Refuse balance over the global batch where nobody would reset its counts."""
    types = config.moe_router_load_balancing_type
    if moepp.balance_scope == "global" and "global_aux_loss" not in types:
        raise ValueError(
            f"TransformerConfig.moe_router_load_balancing_type ({types}) must be global_aux_loss "
            "with balance_scope (global), because megatron-core's finalize_model_grads begins the "
            "counts of a step only for that type; use global_aux_loss (its "
            "moe_aux_loss_coeff may be 0), or another balance_scope"
        )
