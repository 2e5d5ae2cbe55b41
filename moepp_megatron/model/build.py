"""Builds this rank's model chunks."""

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.config import Config, UnfitError
from moepp_megatron.config.stages import virtual_stages
from moepp_megatron.model.all_heads_norm import AllHeadsRMSNorm
from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.model.initialize import initialize_weights
from moepp_megatron.model.local_modules import fit_local_modules
from moepp_megatron.model.megatron_config import moepp_config, transformer_config
from moepp_megatron.moe.multi_token import get_moepp_mtp_block_spec
from moepp_megatron.moe.spec import get_moepp_block_spec, with_attention
from moepp_megatron.moe.upstream_private import PRIVATE_NAMES, UpstreamMovedError, check_upstream
from moepp_megatron.runtime.backends import chosen_cross_entropy
from moepp_megatron.runtime.optional import have_transformer_engine


def build_model(config: Config) -> list[MoEPPGPTModel]:
    """This rank's model chunks with initial weights, on this rank's device, in `precision.dtype`.

    Process groups must exist (`moepp_megatron.runtime.distributed.build_groups`). There is a chunk
    per virtual pipeline stage. UnfitError if megatron-core lacks a part that the layers use.
    """
    chunks = [chunk.to(torch.cuda.current_device()) for chunk in _build_chunks(config)]
    initialize_weights(chunks, config.training.seed)
    return chunks


def _build_chunks(config: Config) -> list[MoEPPGPTModel]:
    """This rank's model chunks with uninitialised weights; process groups must exist."""
    try:
        check_upstream(PRIVATE_NAMES)
    except UpstreamMovedError as error:
        raise UnfitError(str(error)) from None
    num_chunks = virtual_stages(config)
    stages = range(num_chunks) if num_chunks > 1 else [None]
    chunks = [_chunk(config, vp_stage) for vp_stage in stages]
    for chunk in chunks:
        chunk.fuses_cross_entropy = chosen_cross_entropy(config.precision.cross_entropy) == "fused"
    return chunks


def _chunk(config: Config, vp_stage: int | None) -> MoEPPGPTModel:
    megatron, moepp, backend = transformer_config(config), moepp_config(config), _backend(config)
    return MoEPPGPTModel(
        megatron,
        get_moepp_block_spec(megatron, moepp, vp_stage=vp_stage, **backend),
        moepp=moepp,
        mtp_block_spec=get_moepp_mtp_block_spec(megatron, moepp, vp_stage=vp_stage, **backend),
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
        vp_stage=vp_stage,
    )


def _backend(config: Config) -> dict[str, Any]:
    """The layers' modules: arguments of the specs in `moepp_megatron.moe.spec`."""
    has_transformer_engine = have_transformer_engine()

    def adapt(megatron: TransformerConfig, spec: ModuleSpec, is_moe: bool) -> ModuleSpec:
        if not has_transformer_engine:
            spec = fit_local_modules(megatron, spec, is_moe)
        elif config.data.reset_attention_mask:
            spec = with_attention(spec, core_attention=_packed_attention())
        if config.model.qk_layernorm_scope != "all_heads":
            return spec
        # No back end has these norms, but they work with the modules of each.
        norm, model = partial(partial, AllHeadsRMSNorm), config.model
        return with_attention(
            spec,
            q_layernorm=norm(num_heads=model.num_attention_heads),
            k_layernorm=norm(num_heads=model.query_groups),
        )

    return {"use_transformer_engine": has_transformer_engine, "adapt": adapt}


def _packed_attention() -> type:
    """Transformer Engine's core attention that takes `document_ends` as its `attention_mask`."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class PackedAttention(TEDotProductAttention):
        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            attn_mask_type: AttnMaskType,
            **kwargs: Any,
        ) -> Tensor:
            """Attend within documents: [s, b, n * v] from query [s, b, n, d], key and value.

            `attention_mask` are the `document_ends` of the micro-batch; None is causal attention
            over whole sequences, as in generation.
            """
            if attention_mask is None:
                context: Tensor = super().forward(query, key, value, None, attn_mask_type, **kwargs)
                return context
            length, size = query.shape[:2]
            packed = [tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value)]
            kwargs["packed_seq_params"] = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=attention_mask,
                cu_seqlens_kv=attention_mask,
                # An upper limit is enough, and needs no read from the device.
                max_seqlen_q=length,
                max_seqlen_kv=length,
            )
            output = super().forward(*packed, None, AttnMaskType.padding_causal, **kwargs)
            return output.reshape(size, length, -1).transpose(0, 1).contiguous()

    return PackedAttention
