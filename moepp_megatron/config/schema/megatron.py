"""Section `megatron`: megatron-core's own settings of speed and memory, passed on as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from moepp_megatron.config.rows import (
    Condition,
    Rule,
    Text,
    each,
    group,
    no_effect_without,
    refuse,
    values,
)
from moepp_megatron.config.schema.section import Section, Unit

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config

# Without attn_norm, which Transformer Engine fuses into the projection after it.
OffloadModule = Literal["qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"]


_EXPERTS = {"expert_fc1", "moe_act"}


def _only_with(names: str, missing: Condition, must: Text, remedy: str) -> Rule:
    """A rule: what is true among these settings is refused where `missing` is true."""
    return group(missing, each(values(names), bool, must, f"{remedy}, or leave {{name}} out"))


def _offloaded(config: Config) -> set[str]:
    return set(config.megatron.offload_modules)


def _modules(wrong: Condition, must: Text, remedy: str) -> Rule:
    return refuse("megatron.offload_modules", wrong, must, remedy)


class MegatronSection(Section):
    """Settings of megatron-core's TransformerConfig, under its names; `moepp plan` ignores them."""

    tp_comm_overlap: bool = False
    """Must be false: it needs a communicator that is not started here"""
    high_priority_a2a_comm_stream: bool = False
    """Give the combined schedule's transfers a stream of high priority"""
    ep_overlap_early_attn_memory_release: bool = False
    """Let the combined schedule run attention's backward pass earlier, which frees its memory"""
    moe_permute_fusion_into_hybridep: bool = False
    """Let HybridEP's kernels permute the tokens"""
    moe_router_fusion: bool = False
    """Transformer Engine's fused router, in vanilla layers"""
    fused_residual_rmsnorm: bool = False
    """Add the residual's gradient in the norm's backward pass (Transformer Engine)"""
    fused_single_qkv_rope: bool = False
    """Rotate queries and keys in one kernel, before they are split (Transformer Engine)"""
    use_transformer_engine_op_fuser: bool = False
    """Must be false: fused experts have not been tried"""
    fine_grained_activation_offloading: bool = False
    """Keep inputs of offload_modules in host memory until the backward pass"""
    offload_modules: list[OffloadModule] = []
    """With fine_grained_activation_offloading: of which modules"""
    min_offloaded_tensor_size: Annotated[int, Unit("elements", ge=0)] = 1024 * 1024
    """With fine_grained_activation_offloading: smaller tensors stay"""

    megatron_flags = (
        "offload-modules min-offloaded-tensor-size fine-grained-activation-offloading:true "
        "high-priority-a2a-comm-stream:true ep-overlap-early-attn-memory-release:true "
        "moe-permute-fusion-into-hybridep:true fused-residual-rmsnorm:true"
    )
    own_rules = (
        refuse(
            "megatron.tp_comm_overlap",
            "megatron.tp_comm_overlap",
            "must be false: the userbuffers of Transformer Engine need a communicator of their own "
            "(initialize_ub), which this trainer does not start",
            "leave it out",
        ),
        _only_with(
            "megatron.high_priority_a2a_comm_stream megatron.ep_overlap_early_attn_memory_release",
            "not parallel.overlap_moe_expert_parallel_comm",
            "must come with parallel.overlap_moe_expert_parallel_comm (false), whose schedule "
            "reads it",
            "set that to true",
        ),
        _only_with(
            "megatron.moe_permute_fusion_into_hybridep",
            lambda c: c.moe.dispatcher != "flex" or c.moe.flex_backend != "hybridep",
            "must come with moe.dispatcher flex ({moe.dispatcher}) and moe.flex_backend hybridep "
            "({moe.flex_backend})",
            "set both",
        ),
        _only_with(
            "megatron.moe_router_fusion",
            "not moe.is_vanilla",
            "must be false with MoE++ layers: the fused kernel knows one kind of expert",
            "set moe.fused",
        ),
        _only_with(
            "megatron.fused_residual_rmsnorm",
            "training.captures_router",
            "must be false with moe_router in training.cuda_graphs, which captures a plain norm",
            "use [attn]",
        ),
        _only_with(
            "megatron.fused_single_qkv_rope",
            lambda c: (
                c.model.latent_attention or c.model.qk_layernorm or c.data.reset_attention_mask
            ),
            "must be false with model.latent_attention, model.qk_layernorm and "
            "data.reset_attention_mask: queries and keys are handled apart there",
            "leave those out",
        ),
        refuse(
            "megatron.use_transformer_engine_op_fuser",
            "megatron.use_transformer_engine_op_fuser",
            "must be false: megatron-core gives it SwiGLU experts only with Transformer Engine's "
            "kernels for Blackwell, and pads rows to 256 for it, which has not been tried",
            "leave it out",
        ),
        group(
            "megatron.fine_grained_activation_offloading",
            _modules(
                "not megatron.offload_modules",
                "must name a module with megatron.fine_grained_activation_offloading",
                "use [core_attn, attn_proj], or set that to false",
            ),
            # (transformer_config.py)
            _modules(
                lambda c: "attn_proj" in _offloaded(c) and "core_attn" not in _offloaded(c),
                "must hold core_attn with attn_proj, whose input is its output",
                "add core_attn",
            ),
            _modules(
                lambda c: _EXPERTS & _offloaded(c) and "moe" in c.training.recomputed,
                "must not hold expert_fc1 or moe_act with moe in training.recompute_modules, "
                "which keeps neither",
                "leave them out",
            ),
            _modules(
                lambda c: c.training.cuda_graphs and _offloaded(c) - _EXPERTS,
                "must hold only expert_fc1 and moe_act with training.cuda_graphs: a graph keeps "
                "its own tensors",
                "use [expert_fc1, moe_act], or set training.cuda_graphs to []",
            ),
            # (Transformer Engine's grouped_linear.py)
            _modules(
                lambda c: c.precision.recipe == "delayed" and "expert_fc1" in _offloaded(c),
                "must not hold expert_fc1 with precision.fp8_recipe delayed, whose scales are "
                "those of the forward pass",
                "leave it out",
            ),
            refuse(
                "megatron.fine_grained_activation_offloading",
                "training.recompute_granularity full",
                "must be false with training.recompute_granularity full, which keeps nothing to "
                "send",
                "leave one of the two out",
            ),
            refuse(
                "megatron.fine_grained_activation_offloading",
                "training.batch_ramp",
                "must be false with training.batch_ramp ({training.batch_ramp}): megatron-core "
                "counts on as many micro-batches as the first step has",
                "leave one of the two out",
            ),
        ),
    )
    no_effect = (
        no_effect_without(
            "megatron.fine_grained_activation_offloading",
            "megatron.offload_modules megatron.min_offloaded_tensor_size",
            "set it to true",
        ),
    )
