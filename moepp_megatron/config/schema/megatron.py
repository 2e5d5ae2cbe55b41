"""Section `megatron`: megatron-core's own settings of speed and memory, passed on as they are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.schema.section import Section, Unit

# Without attn_norm, which Transformer Engine fuses into the projection after it.
OffloadModule = Literal["qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"]


class MegatronSection(Section):
    """Settings of megatron-core's TransformerConfig, under its names; `moepp plan` ignores them."""

    tp_comm_overlap: Annotated[bool, Unit("-")] = False
    """Must be false: it needs a communicator that is not started here"""
    high_priority_a2a_comm_stream: Annotated[bool, Unit("-")] = False
    """Give the combined schedule's transfers a stream of high priority"""
    ep_overlap_early_attn_memory_release: Annotated[bool, Unit("-")] = False
    """Let the combined schedule run attention's backward pass earlier, which frees its memory"""
    moe_permute_fusion_into_hybridep: Annotated[bool, Unit("-")] = False
    """Let HybridEP's kernels permute the tokens"""
    moe_router_fusion: Annotated[bool, Unit("-")] = False
    """Transformer Engine's fused router, in vanilla layers"""
    fused_residual_rmsnorm: Annotated[bool, Unit("-")] = False
    """Add the residual's gradient in the norm's backward pass (Transformer Engine)"""
    fused_single_qkv_rope: Annotated[bool, Unit("-")] = False
    """Rotate queries and keys in one kernel, before they are split (Transformer Engine)"""
    use_transformer_engine_op_fuser: Annotated[bool, Unit("-")] = False
    """Must be false: fused experts have not been tried"""
    fine_grained_activation_offloading: Annotated[bool, Unit("-")] = False
    """Keep inputs of offload_modules in host memory until the backward pass"""
    offload_modules: Annotated[list[OffloadModule], Unit("-")] = []
    """With fine_grained_activation_offloading: of which modules"""
    min_offloaded_tensor_size: Annotated[int, Unit("elements"), Field(ge=0)] = 1024 * 1024
    """With fine_grained_activation_offloading: smaller tensors stay"""
