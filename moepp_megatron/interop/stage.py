"""A stage of a MoE++ model in the loops of others, whose settings have Megatron's names."""

from typing import Any

from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.model.local_modules import fit_local_modules
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.lane import pipeline_config
from moepp_megatron.moe.spec import get_moepp_block_spec

# Arguments of megatron-core's GPTModel that both loops keep under these names.
_PASSED_ON = (
    "fp16_lm_cross_entropy",
    "parallel_output",
    "share_embeddings_and_output_weights",
    "position_embedding_type",
    "rotary_percent",
    "rotary_base",
    "rope_scaling",
    "rope_scaling_factor",
    "seq_len_interpolation_factor",
    "scatter_embedding_sequence_parallel",
)


def build_stage(
    settings: Any,
    config: TransformerConfig,
    moepp: MoEPPConfig,
    pg_collection: ProcessGroupCollection,
    pre_process: bool | None,
    post_process: bool | None,
    vp_stage: int | None,
    *,
    use_te: bool,
) -> MoEPPGPTModel:
    """Build a stage; ValueError if a setting is refused.

    Its configuration has the hidden size of what stages exchange, router logits included, for that
    is where Megatron's schedules read it; the layers keep the true one.

    Args:
        settings: Megatron-LM's `GPTModelConfig`, or Megatron-Bridge's provider.
        pre_process: Whether the stage embeds tokens; None for the first stage of `pg_collection`.
        post_process: Whether it computes losses; None for the last one.
        use_te: Whether its modules are Transformer Engine's.
    """
    stage = {"vp_stage": vp_stage, "vp_size": config.virtual_pipeline_model_parallel_size}
    if pre_process is None:
        pre_process = is_vp_first_stage(**stage) and is_pp_first_stage(pg_collection.pp)
    if post_process is None:
        post_process = is_vp_last_stage(**stage) and is_pp_last_stage(pg_collection.pp)
    model = MoEPPGPTModel(
        config,
        block_spec(config, moepp, vp_stage, use_te),
        moepp=moepp,
        vocab_size=_padded_vocab_size(settings, config),
        max_sequence_length=settings.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
        **{name: getattr(settings, name) for name in _PASSED_ON},
    )
    model.config = pipeline_config(config, moepp)
    return model


def block_spec(
    config: TransformerConfig, moepp: MoEPPConfig, vp_stage: int | None, use_te: bool
) -> TransformerBlockSubmodules:
    """Layers of a stage, on local modules made fit where Transformer Engine's are not used."""
    # Neither loop has a setting for it. The first MoE layer has no gating residual, so layers
    # cannot be stacked in a checkpoint.
    config.hetereogenous_dist_checkpoint = True
    return get_moepp_block_spec(
        config,
        moepp,
        use_transformer_engine=use_te,
        adapt=None if use_te else fit_local_modules,
        vp_stage=vp_stage,
    )


def _padded_vocab_size(settings: Any, config: TransformerConfig) -> int:
    size: int | None = settings.vocab_size
    assert size is not None, "both loops set the vocabulary"
    if not settings.should_pad_vocab:
        return size
    divisor = settings.make_vocab_size_divisible_by
    return calculate_padded_vocab_size(size, divisor, config.tensor_model_parallel_size)
