"""Translates the user's configuration into megatron-core's and the MoE++ layer's."""

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.enums import Fp8Recipe
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from moepp_megatron.config import Config
from moepp_megatron.config.stages import virtual_stages
from moepp_megatron.layer_settings import BALANCE_TYPES, LayerSettings
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.runtime.optional import (
    flex_backend,
    have_fused_weight_gradient,
    have_transformer_engine,
)

# megatron-core's `fused_a2a.HYBRIDEP_TOKEN_ALIGNMENT`.
_HYBRIDEP_CHUNK = 64


# Settings that megatron-core has under the same name; those of `moe` begin with moe_ there.
_SAME = {
    "model": "num_layers hidden_size ffn_hidden_size num_attention_heads qk_layernorm "
    "init_method_std",
    "training": "recompute_granularity recompute_method recompute_num_layers",
    "parallel": "tensor_model_parallel_size pipeline_model_parallel_size "
    "pipeline_model_parallel_layout expert_model_parallel_size context_parallel_size "
    "overlap_moe_expert_parallel_comm delay_wgrad_compute",
    "moe": "router_topk layer_freq z_loss_coeff input_jitter_eps shared_expert_gate",
}
_FP8 = (
    "fp8 fp8_param fp8_margin fp8_amax_history_len fp8_amax_compute_algo first_last_layers_bf16 "
    "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16"
)

# The types that settings name.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def params_dtype(config: Config) -> torch.dtype:
    """The dtype of parameters and activations."""
    return DTYPES[config.precision.dtype]


def moepp_config(config: Config) -> MoEPPConfig:
    """The MoE++ layer's settings."""
    moe = config.moe
    settings = {field.name: getattr(moe, field.name) for field in fields(LayerSettings)}
    settings |= {
        "tau": moe.balanced_tau,
        "deduplicate_dispatch": moe.dispatcher == "alltoall_dedup",
        "static_rows": moe.static_rows_per_selection,
        "captures_experts": "moe" in config.training.cuda_graphs,
    }
    return MoEPPConfig(**settings)


def transformer_config(config: Config) -> TransformerConfig:
    """megatron-core's configuration of the model.

    `num_moe_experts` counts FFN experts; see `moe.upstream_settings.router_config`. Weights are
    not initialised here: `moepp_megatron.model.initialize` does it, independent of the layout.
    """
    kind = TransformerConfig if config.model.latent_attention is None else MLATransformerConfig
    return kind(**transformer_fields(config))


def transformer_fields(config: Config) -> dict[str, Any]:
    """The arguments of `transformer_config`."""
    model, training = config.model, config.training
    dtype = params_dtype(config)
    return dict(
        **{
            "moe_" * (section == "moe") + name: getattr(getattr(config, section), name)
            for section, names in _SAME.items()
            for name in names.split()
        },
        num_query_groups=model.query_groups,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # FP8 weights are quantised as they are built. Uninitialised memory would put its largest
        # value into the history of delayed scaling, to stay for as many steps as the history has.
        perform_initialization=config.precision.fp8_param,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Gradients are sums over tokens, divided once by the tokens of the global batch: the token
        # mean in every layout, however tokens are spread over micro-batches and ranks.
        calculate_per_token_loss=True,
        recompute_modules=list(training.recompute_modules)
        if training.recompute_granularity == "selective"
        else None,
        deterministic_mode=training.deterministic,
        # The first MoE layer has no gating residual, so layers cannot be stacked in a checkpoint.
        hetereogenous_dist_checkpoint=True,
        **_parallel_fields(config),
        **_head_fields(config),
        **_moe_fields(config),
        **_graph_fields(config),
        **_kernel_fields(config),
        **_fp8_fields(config),
        **config.megatron.model_dump(exclude_defaults=True),
    )


def _parallel_fields(config: Config) -> dict[str, object]:
    parallel = config.parallel
    num_chunks = virtual_stages(config)
    return {
        "virtual_pipeline_model_parallel_size": num_chunks if num_chunks > 1 else None,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "sequence_parallel": parallel.uses_sequence_parallel,
        # The interleaved schedule exchanges activations and gradients with the same two neighbours
        # at once; as one batch they could not be distinguished if both neighbours are one rank.
        "overlap_p2p_comm": num_chunks > 1,
        "batch_p2p_comm": num_chunks == 1,
        # The host would wait for the whole device after every message, for versions of torch long
        # gone; the message's own stream is waited for anyway.
        "batch_p2p_sync": False,
    }


def _head_fields(config: Config) -> dict[str, object]:
    """Widths of a head; with latent attention all fields of its own configuration."""
    model, latent = config.model, config.model.latent_attention
    if latent is None:
        return {"kv_channels": model.head_dim}
    is_stretched = latent.rope_type == "yarn"
    return latent.model_dump() | {
        # megatron-core's local core attention takes the width of its output from here.
        "kv_channels": latent.v_head_dim,
        "rotary_base": model.rotary_base,
        # The scale of the scores follows from it, with the plain rotary embedding too.
        "rotary_scaling_factor": latent.rotary_scaling_factor if is_stretched else 1.0,
    }


def _moe_fields(config: Config) -> dict[str, object]:
    moe = config.moe
    fields: dict[str, object] = {
        "num_moe_experts": moe.num_ffn_experts,
        "moe_ffn_hidden_size": config.expert_ffn_hidden_size,
        # megatron-core knows no deduplicated all-to-all; the MoE++ layer builds it.
        "moe_token_dispatcher_type": moe.dispatcher.removesuffix("_dedup"),
        **_flex_fields(config),
        "moe_router_dtype": "fp32",
        "moe_router_score_function": moe.score_function,
        # With it megatron-core moves the routers' biases after every step.
        "moe_router_enable_expert_bias": moe.bias_update_rate > 0,
        "moe_router_bias_update_rate": moe.bias_update_rate,
        **config.transformer_fields(),
        "moe_shared_expert_intermediate_size": moe.shared_expert_ffn_hidden_size,
        # With the global scope megatron-core resets the routers' counts after every step. The loss
        # itself is ours, so its coefficient stays 0 here.
        "moe_router_load_balancing_type": "global_aux_loss"
        if moe.balance_scope == "global"
        else "none",
        # megatron-core demands it of top-1 routing.
        "moe_router_pre_softmax": moe.router_topk == 1,
    }
    if moe.is_vanilla:
        # megatron-core's own router: softmax over all experts keeps the raw scores of the selected
        # ones ("none"), softmax over the selected ones is "selected".
        fields |= {
            "moe_router_enable_expert_bias": moe.selection_bias,
            "moe_router_topk_scaling_factor": None if moe.gate_scale == 1.0 else moe.gate_scale,
            "moe_router_pre_softmax": {"none": True, "selected": False, "nonzero": False}[
                moe.gate_normalization
            ],
            "moe_router_load_balancing_type": BALANCE_TYPES[moe.balance_scope],
            "moe_aux_loss_coeff": moe.balance_coeff,
            "moe_expert_capacity_factor": moe.capacity_factor,
        }
        if moe.limits_groups:
            fields |= {
                "moe_router_num_groups": moe.num_groups,
                "moe_router_group_topk": moe.group_topk,
            }
    return fields


def _flex_fields(config: Config) -> dict[str, object]:
    moe = config.moe
    if moe.dispatcher != "flex":
        return {}
    # What the user named where nothing is installed (`runtime.fit` has refused a run by now).
    named = {"auto": "deepep", "deepep": "deepep", "hybridep": "hybridep"}
    backend = flex_backend(moe.flex_backend) or named[moe.flex_backend]
    return {
        "moe_flex_dispatcher_backend": backend,
        "moe_flex_dispatcher_num_sms": moe.flex_num_sms,
        # Its kernels are compiled for whole chunks of 64 tokens. Padding costs a small all-reduce
        # and a wait for it in every layer, so only where it is needed.
        "moe_hybridep_pad_uneven_dispatch_inputs": backend == "hybridep"
        and config.tokens_per_rank % _HYBRIDEP_CHUNK > 0,
    }


def _graph_fields(config: Config) -> dict[str, object]:
    if not config.training.cuda_graphs:
        return {}
    # Where the experts are captured, the router is too.
    names = ["moe_router" if part == "moe" else part for part in config.training.cuda_graphs]
    return {"cuda_graph_impl": "local", "cuda_graph_modules": [*dict.fromkeys(names)]}


def _kernel_fields(config: Config) -> dict[str, object]:
    """Fused kernels only where Transformer Engine brings them."""
    fused = have_transformer_engine()
    return {
        "use_cpu_initialization": not torch.cuda.is_available(),
        **dict.fromkeys(("moe_grouped_gemm", "moe_permute_fusion", "masked_softmax_fusion"), fused),
        # Only of Transformer Engine's layers: `moepp_megatron.training.setup`.
        "gradient_accumulation_fusion": have_fused_weight_gradient(),
        "bias_dropout_fusion": fused,
        "bias_activation_fusion": fused,
        # The rotation of latent attention is another kernel, which has not been tested.
        "apply_rope_fusion": fused and config.model.latent_attention is None,
        "persist_layer_norm": False,
        # The other two kinds: `moepp_megatron.model.gpt`.
        "cross_entropy_loss_fusion": config.precision.cross_entropy == "native",
    }


def _fp8_fields(config: Config) -> dict[str, object]:
    """FP8 settings of Transformer Engine's modules; not for routers and embedding."""
    precision = config.precision
    if precision.recipe is None:
        return {}
    fields = {name: getattr(precision, name) for name in _FP8.split()}
    return fields | {"fp8_recipe": Fp8Recipe[precision.recipe]}
