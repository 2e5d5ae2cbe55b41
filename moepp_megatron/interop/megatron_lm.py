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

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import checkpointing, get_args
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from moepp_megatron.interop.megatron_arguments import add_moepp_arguments, moepp_config
from moepp_megatron.interop.stage import block_spec, build_stage
from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.runtime.patches import replace

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
    return block_spec(config, moepp, vp_stage, _uses_te(config))


@dataclass(kw_only=True)
class MoEPPModelConfig(GPTModelConfig):
    """Megatron's configuration of a GPT model, which its loop builds as a MoE++ model."""

    builder: ClassVar[str] = "moepp_megatron.interop.megatron_lm.MoEPPModelBuilder"


class MoEPPModelBuilder(GPTModelBuilder):
    """Builds the stages of a MoE++ model where Megatron would build a `GPTModel`."""

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
        # It expects of a HybridModel a pattern in the arguments, and other names of layers.
        replace(checkpointing, "_maybe_setup_gpt_to_hybrid_load", lambda *_: (None, False))
        return build_stage(
            model_config,
            config,
            moepp,
            pg_collection,
            pre_process,
            post_process,
            vp_stage,
            use_te=_uses_te(config),
        )

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


def _uses_te(config: TransformerConfig) -> bool:
    return bool(config.transformer_impl == "transformer_engine")
