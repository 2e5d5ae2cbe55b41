"""Builds this rank's model chunks."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from moepp_megatron.config import Config
from moepp_megatron.config.stages import virtual_stages
from moepp_megatron.model.attention import ContextParallelAttention
from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.model.initialize import initialize_weights
from moepp_megatron.model.megatron_config import moepp_config, transformer_config
from moepp_megatron.model.norm import SequenceParallelRMSNorm
from moepp_megatron.moe.spec import get_moepp_block_spec
from moepp_megatron.runtime.optional import have_transformer_engine


def build_model(config: Config) -> list[GPTModel]:
    """This rank's model chunks with initial weights, on this rank's device, in `precision.dtype`.

    Process groups must exist (`moepp_megatron.runtime.distributed.build_groups`).

    Returns:
        One chunk, or one per virtual pipeline stage.
    """
    num_chunks = virtual_stages(config)
    stages = range(num_chunks) if num_chunks > 1 else [None]
    chunks = [_build_chunk(config, vp_stage) for vp_stage in stages]
    initialize_weights(chunks, config.training.seed)
    return chunks


def _build_chunk(config: Config, vp_stage: int | None) -> GPTModel:
    megatron, moepp = transformer_config(config), moepp_config(config)
    use_te = have_transformer_engine()
    splits_sequences = config.parallel.context_parallel_size > 1
    spec = get_moepp_block_spec(
        megatron,
        moepp,
        use_transformer_engine=use_te,
        norm=None if use_te else SequenceParallelRMSNorm,
        core_attention=ContextParallelAttention if splits_sequences and not use_te else None,
        vp_stage=vp_stage,
    )
    model = MoEPPGPTModel(
        megatron,
        spec,
        moepp=moepp,
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
        vp_stage=vp_stage,
    )
    return model.to(torch.cuda.current_device())
