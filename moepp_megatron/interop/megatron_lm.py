"""MoE++ in Megatron-LM's own training loop, `megatron.training`, unmodified.

There are three ways (docs/how_to/from_megatron_lm.md):

1. A spec, for Megatron-LM's `pretrain_gpt.py` as it is: `--spec moepp_megatron.interop.megatron_lm
   moepp_spec`, with MoE++ settings in the environment variable MOEPP_ARGS. One pipeline stage, or
   no gating residual: Megatron's `GPTModel` hands no router logits to the next stage.
2. A model configuration, for a `pretrain_*.py` of your own: `gpt_config_from_args(args,
   model_config_cls=MoEPPModelConfig)`, with `add_moepp_arguments` as `extra_args_provider`. All
   layouts. `launch/pretrain_megatron_lm.py` is one.
3. `model_provider`, for loops that still build their model through one (`get_model`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from moepp_megatron.interop.megatron_arguments import add_moepp_arguments, moepp_config
from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.model.local_modules import fit_local_modules
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.lane import pipeline_config
from moepp_megatron.moe.spec import get_moepp_block_spec

__all__ = [
    "MoEPPModelBuilder",
    "MoEPPModelConfig",
    "add_moepp_arguments",
    "model_provider",
    "moepp_spec",
]


def moepp_spec(
    model_config: GPTModelConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The value of `--spec`: layers of this pipeline stage for Megatron's own `GPTModel`.

    ValueError if `moepp_config` refuses a setting, or there is a gating residual across stages.
    """
    config = model_config.transformer
    moepp = moepp_config(config, get_args(), is_spec=True)
    stages = config.pipeline_model_parallel_size
    if stages > 1 and moepp.gating_residual:
        raise ValueError(
            f"--pipeline-model-parallel-size ({stages}) must be 1 with --spec and a gating "
            "residual, because Megatron's GPTModel hands no router logits to the next stage; build "
            "the model from MoEPPModelConfig (launch/pretrain_megatron_lm.py does) or set "
            "--moepp-no-gating-residual"
        )
    return _block_spec(config, moepp, vp_stage)


@dataclass(kw_only=True)
class MoEPPModelConfig(GPTModelConfig):
    """Megatron's configuration of a GPT model, which its loop builds as a MoE++ model."""

    builder: ClassVar[str] = "moepp_megatron.interop.megatron_lm.MoEPPModelBuilder"


class MoEPPModelBuilder(GPTModelBuilder):
    """Builds the stages of a MoE++ model where Megatron would build a `GPTModel`.

    Each stage's configuration has the hidden size of what stages exchange, router logits
    included, for that is where Megatron's schedules read it; the layers keep the true one.
    """

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> MoEPPGPTModel:
        """Build a stage, as `GPTModelBuilder.build_model`; ValueError if a setting is refused."""
        model_config = self._model_config
        config = model_config.transformer
        moepp = moepp_config(config, get_args())
        stage = {"vp_stage": vp_stage, "vp_size": config.virtual_pipeline_model_parallel_size}
        if pre_process is None:
            pre_process = is_vp_first_stage(**stage) and is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            post_process = is_vp_last_stage(**stage) and is_pp_last_stage(pg_collection.pp)
        model = MoEPPGPTModel(
            config,
            _block_spec(config, moepp, vp_stage),
            moepp=moepp,
            vocab_size=_padded_vocab_size(model_config),
            max_sequence_length=model_config.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=model_config.fp16_lm_cross_entropy,
            parallel_output=model_config.parallel_output,
            share_embeddings_and_output_weights=model_config.share_embeddings_and_output_weights,
            position_embedding_type=model_config.position_embedding_type,
            rotary_percent=model_config.rotary_percent,
            rotary_base=model_config.rotary_base,
            rope_scaling=model_config.rope_scaling,
            rope_scaling_factor=model_config.rope_scaling_factor,
            seq_len_interpolation_factor=model_config.seq_len_interpolation_factor,
            scatter_embedding_sequence_parallel=model_config.scatter_embedding_sequence_parallel,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        model.config = pipeline_config(config, moepp)
        return model

    def build_distributed_models(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Same as Megatron's, but the bf16 wrapper gets the stage's own configuration."""
        kwargs.setdefault("mixed_precision_wrapper", _as_float16)
        return super().build_distributed_models(*args, **kwargs)


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> MoEPPGPTModel:
    """Build one stage of the model that Megatron's arguments describe, for `get_model`."""
    if pg_collection is None:
        pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    model_config = gpt_config_from_args(get_args(), config, MoEPPModelConfig)
    return MoEPPModelBuilder(model_config).build_model(
        pg_collection, pre_process, post_process, vp_stage
    )


def _as_float16(config: TransformerConfig, stage: MoEPPGPTModel) -> Float16Module:
    return Float16Module(stage.config, stage)


def _block_spec(
    config: TransformerConfig, moepp: MoEPPConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    # Megatron has no argument for it. The first MoE layer has no gating residual, so layers cannot
    # be stacked in a checkpoint.
    config.hetereogenous_dist_checkpoint = True
    use_te = config.transformer_impl == "transformer_engine"
    return get_moepp_block_spec(
        config,
        moepp,
        use_transformer_engine=use_te,
        adapt=None if use_te else fit_local_modules,
        vp_stage=vp_stage,
    )


def _padded_vocab_size(model_config: GPTModelConfig) -> int:
    assert model_config.vocab_size is not None, "gpt_config_from_args sets the vocabulary"
    if not model_config.should_pad_vocab:
        return model_config.vocab_size
    return calculate_padded_vocab_size(
        model_config.vocab_size,
        model_config.make_vocab_size_divisible_by,
        model_config.transformer.tensor_model_parallel_size,
    )
