"""MoE++ in Megatron-LM's own training loop, `megatron.training`, unmodified.

There are four ways (docs/how_to/from_megatron_lm.md):

1. A spec, for Megatron-LM's `pretrain_gpt.py` as it is: `--spec moepp_megatron.interop.megatron_lm
   moepp_spec`, with MoE++ settings in the environment variable MOEPP_ARGS. One pipeline stage, or
   no gating residual: Megatron's `GPTModel` hands no router logits to the next stage.
2. A spec for `pretrain_hybrid.py`, `moepp_hybrid_spec`: MoE++ layers for the letter `E` of
   `--hybrid-layer-pattern`, among mixers of any kind. The same limit.
3. A model configuration, for a `pretrain_*.py` of your own: `gpt_config_from_args(args,
   model_config_cls=MoEPPModelConfig)`, with `add_moepp_arguments` as `extra_args_provider`. All
   layouts. `launch/pretrain_megatron_lm.py` is one.
4. `model_provider`, for loops that still build their model through one (`get_model`).
"""

import dataclasses
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, ClassVar

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import checkpointing, get_args
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from torch import Tensor

from moepp_megatron.interop.megatron_arguments import add_moepp_arguments, moepp_config
from moepp_megatron.interop.stage import block_spec, build_stage
from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.lane import MoEPPTransformerLayer
from moepp_megatron.moe.spec import get_moepp_layer_spec, with_submodules
from moepp_megatron.runtime.optional import TRANSFORMER_ENGINE
from moepp_megatron.runtime.patches import replace

__all__ = [
    "MoEPPModelBuilder",
    "MoEPPModelConfig",
    "add_moepp_arguments",
    "model_provider",
    "moepp_hybrid_spec",
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
    _refuse_stages(
        config,
        moepp,
        "build the model from MoEPPModelConfig (launch/pretrain_megatron_lm.py does) or set "
        "--moepp-no-gating-residual",
    )
    return block_spec(config, moepp, vp_stage, _uses_te(config))


class _MoEPPHybridStack(HybridStack):
    """megatron-core's stack, whose `E` are MoE++ layers; the lane skips the layers between."""

    _lane: Tensor | None = None

    def __init__(
        self, config: TransformerConfig, submodules: HybridStackSubmodules, **kwargs: Any
    ) -> None:
        args = get_args()
        moepp = moepp_config(config, args, is_spec=True)
        _refuse_hybrid(config, moepp, args.hybrid_layer_pattern)
        moe_layer = _half_layer(config, moepp, submodules.moe_layer)
        submodules = dataclasses.replace(submodules, moe_layer=moe_layer)
        super().__init__(config, submodules, **kwargs)
        for layer in self.layers:
            if isinstance(layer, MoEPPTransformerLayer):
                layer.register_forward_pre_hook(self._give_lane, with_kwargs=True)
                layer.register_forward_hook(self._take_lane)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Same as `HybridStack.forward`."""
        try:
            output: Tensor = super().forward(*args, **kwargs)
        finally:
            self._lane = None
        return output

    def _give_lane(self, _: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | {"context": self._lane}

    def _take_lane(self, _: torch.nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        self._lane = output[1]


moepp_hybrid_spec = dataclasses.replace(hybrid_stack_spec, module=_MoEPPHybridStack)
"""The value of `--spec` for `pretrain_hybrid.py`. Building it raises as `moepp_spec` does."""


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
        kwargs.setdefault(
            "mixed_precision_wrapper", lambda _, stage: Float16Module(stage.config, stage)
        )
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


def _half_layer(config: TransformerConfig, moepp: MoEPPConfig, upstream: ModuleSpec) -> ModuleSpec:
    """megatron-core's layer without attention, with a MoE++ layer in it."""
    first, later = (
        get_moepp_layer_spec(config, moepp, use_transformer_engine=True, has_residual=has_residual)
        for has_residual in (False, True)
    )
    # A stack builds all its layers from one spec, in order, and the first has no router before it.
    builders = chain([first.submodules.mlp], repeat(later.submodules.mlp))

    def build_mlp(**kwargs: Any) -> torch.nn.Module:
        mlp: torch.nn.Module = next(builders)(**kwargs)
        return mlp

    return dataclasses.replace(with_submodules(upstream, mlp=build_mlp), module=later.module)


def _refuse_stages(config: TransformerConfig, moepp: MoEPPConfig, remedy: str) -> None:
    stages = config.pipeline_model_parallel_size
    if stages > 1 and moepp.gating_residual:
        raise ValueError(
            f"--pipeline-model-parallel-size ({stages}) must be 1 with --spec and a gating "
            f"residual, because Megatron's models hand no router logits to the next stage; {remedy}"
        )


def _refuse_hybrid(config: TransformerConfig, moepp: MoEPPConfig, pattern: str) -> None:
    if not HAVE_TE:
        raise ValueError(
            "moepp_hybrid_spec must have Transformer Engine, of which megatron-core makes hybrid "
            f"stacks; install it: {TRANSFORMER_ENGINE}"
        )
    _refuse_stages(config, moepp, "set --moepp-no-gating-residual")
    if Symbols.MOE not in pattern:
        raise ValueError(
            f"--hybrid-layer-pattern ({pattern}) must have an E, the letter of a MoE++ layer, with "
            "moepp_hybrid_spec; add one, or use megatron-core's hybrid_stack_spec"
        )
    for name, value, allowed in (
        ("recompute-granularity", config.recompute_granularity, (None, "selective")),
        ("cuda-graph-impl", config.cuda_graph_impl, ("none",)),
    ):
        if value not in allowed:
            raise ValueError(
                f"--{name} ({value}) must be {allowed[-1]} or left out with moepp_hybrid_spec, "
                "because it would run layers without the router logits that the stack hands on; "
                f"use {allowed[-1]}"
            )


def _uses_te(config: TransformerConfig) -> bool:
    return bool(config.transformer_impl == "transformer_engine")
