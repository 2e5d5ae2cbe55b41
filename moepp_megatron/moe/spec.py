"""Builds MoE++ layers from megatron-core's own specs, for use in any Megatron loop."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.lane import MoEPPTransformerLayer
from moepp_megatron.moe.layer import MoEPPLayer, VanillaMoELayer
from moepp_megatron.moe.local_experts import (
    CPUExperts,
    EngineExperts,
    GroupedExperts,
)
from moepp_megatron.moe.router import MoEPPRouter
from moepp_megatron.moe.upstream_private import check_upstream
from moepp_megatron.moe.upstream_settings import refuse_ignored

# From the model's configuration, megatron-core's spec of a layer, and whether the layer has
# experts, the spec with other modules around the experts.
LayerAdapter = Callable[[TransformerConfig, ModuleSpec, bool], ModuleSpec]


def get_moepp_layer_spec(
    config: TransformerConfig,
    moepp: MoEPPConfig,
    *,
    use_transformer_engine: bool,
    has_residual: bool = True,
    adapt: LayerAdapter | None = None,
) -> ModuleSpec:
    """Spec of one MoE++ transformer layer.

    It is megatron-core's own layer spec with the MoE layer, the router and the transformer layer
    exchanged, so attention, norms and experts are those of the chosen back end. Without
    zero-computation experts and gating residual it is megatron-core's MoE layer, only counted.

    Args:
        use_transformer_engine: Transformer Engine's modules, or megatron-core's local ones.
        has_residual: False for the first MoE layer of the model, which has no router before it.
        adapt: Exchanges norms and attention of the back end, or None for the back end's own.

    Raises:
        ValueError: If MoE++ layers would ignore a setting of `config` (`upstream_settings`), or
            latent attention is megatron-core's own on its local modules.
        UpstreamMovedError: megatron-core lacks a private name that they use (`upstream_private`).
    """
    if not moepp.is_vanilla:
        check_upstream()
        refuse_ignored(config, moepp)
    spec = _base_layer_spec(config, config.num_moe_experts, use_transformer_engine, adapt)
    submodules: MoESubmodules = spec.submodules.mlp.keywords["submodules"]
    if moepp.is_vanilla:
        own = vanilla_submodules(submodules, config)
        return with_submodules(spec, mlp=partial(VanillaMoELayer, submodules=own))
    router = partial(MoEPPRouter, moepp=moepp, has_residual=has_residual)
    submodules = dataclasses.replace(
        submodules, router=router, experts=_experts(submodules.experts, config, moepp)
    )
    mlp = partial(MoEPPLayer, submodules=submodules, moepp=moepp)
    return dataclasses.replace(with_submodules(spec, mlp=mlp), module=MoEPPTransformerLayer)


def get_dense_layer_spec(
    config: TransformerConfig,
    moepp: MoEPPConfig,
    *,
    use_transformer_engine: bool,
    adapt: LayerAdapter | None = None,
) -> ModuleSpec:
    """Spec of a layer without experts, which passes the router logits on."""
    dense = _base_layer_spec(config, None, use_transformer_engine, adapt)
    if moepp.is_vanilla:
        return dense
    return dataclasses.replace(dense, module=MoEPPTransformerLayer)


def get_moepp_block_spec(
    config: TransformerConfig,
    moepp: MoEPPConfig,
    *,
    use_transformer_engine: bool,
    adapt: LayerAdapter | None = None,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """Specs of the layers that one pipeline stage builds.

    The first MoE layer of the whole model has no gating residual. Dense layers
    (`TransformerConfig.moe_layer_freq`) hand the logits on. `adapt` is for the final norm too. The
    pipeline rank is Megatron's global one where None; the rest is as in `get_moepp_layer_spec`.
    """
    pattern = moe_layer_pattern(config)
    backend: dict[str, Any] = {"use_transformer_engine": use_transformer_engine, "adapt": adapt}
    layer = partial(get_moepp_layer_spec, config, moepp, **backend)
    dense = get_dense_layer_spec(config, moepp, **backend)
    first_moe_layer = pattern.index(True)
    layers = [
        layer(has_residual=index > first_moe_layer) if is_moe else dense
        for index, is_moe in enumerate(pattern)
    ]
    return TransformerBlockSubmodules(
        layer_specs=of_stage(layers, config, vp_stage, pp_rank),
        layer_norm=final_norm(use_transformer_engine, dense),
    )


def moe_layer_pattern(config: TransformerConfig) -> list[bool]:
    """For each layer, True if it is a MoE layer.

    Raises:
        ValueError: If none is, or the pattern's length is not the number of layers.
    """
    freq = config.moe_layer_freq
    if isinstance(freq, int):
        return [index % freq == 0 for index in range(config.num_layers)]
    if len(freq) != config.num_layers or not any(freq):
        raise ValueError(
            f"moe_layer_freq ({freq}) must give 0 or 1 for each of the {config.num_layers} layers, "
            "with at least one 1"
        )
    return [bool(is_moe) for is_moe in freq]


def router_pattern(config: TransformerConfig) -> list[bool]:
    """`moe_layer_pattern`, then MTP's layers, each of the kind of the last decoder layer."""
    pattern = moe_layer_pattern(config)
    return pattern + pattern[-1:] * (config.mtp_num_layers or 0)


class _VanillaRouter(TopKRouter):
    """megatron-core's router, whose selection bias learns from tokens that are not padding."""

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        # megatron-core masks the map [T, E] by [T], which fails, or with T = E masks experts.
        mask = None if padding_mask is None else padding_mask.unsqueeze(-1)
        super()._apply_expert_bias(routing_map, mask)


def vanilla_submodules(submodules: MoESubmodules, config: TransformerConfig) -> MoESubmodules:
    """megatron-core's own with `_VanillaRouter`; on a GPU local experts in MoE++'s grouped product.

    One after another they would make MoE++ look faster than it is.
    """
    submodules = dataclasses.replace(submodules, router=_VanillaRouter)
    if not torch.cuda.is_available():
        return submodules
    return dataclasses.replace(submodules, experts=_experts(submodules.experts, config))


def _experts(
    upstream: ExpertsBuilder, config: TransformerConfig, moepp: MoEPPConfig | None = None
) -> ExpertsBuilder:
    """Builder of the FFN experts: megatron-core's, or ours in place of its local ones."""
    # With static rows also in place of Transformer Engine's, which read their sizes on the host.
    kind = getattr(upstream, "func", None)
    ours: type[CPUExperts] | type[EngineExperts]
    if kind is TEGroupedMLP and moepp is not None and moepp.static_rows is not None:
        ours = EngineExperts
    elif kind is not SequentialMLP:
        return upstream
    else:
        ours = GroupedExperts if torch.cuda.is_available() else CPUExperts
    if not ours.suits(config):
        return upstream
    return partial(ours, *upstream.args, **upstream.keywords)


def _base_layer_spec(
    config: TransformerConfig,
    num_experts: int | None,
    use_transformer_engine: bool,
    adapt: LayerAdapter | None,
) -> ModuleSpec:
    """megatron-core's layer spec, adapted."""
    if use_transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=num_experts,
            moe_grouped_gemm=False,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            normalization=config.normalization,
        )
    if adapt is not None:
        spec = adapt(config, spec, num_experts is not None)
    if not use_transformer_engine and spec.submodules.self_attention.module is MLASelfAttention:
        # In 0.19 its core attention cannot be built, and on tensor-parallel ranks its gradient of
        # the position key that heads share is a part of the whole one.
        raise ValueError(
            "TransformerConfig.multi_latent_attention (True) must not be megatron-core's own on "
            "its local modules, which are not fit for it; use Transformer Engine's modules, or "
            "adapt=moepp_megatron.model.local_modules.fit_local_modules"
        )
    return spec


def of_stage[T](
    layers: list[T], config: TransformerConfig, vp_stage: int | None, pp_rank: int | None
) -> list[T]:
    """Select what belongs to the layers of one stage, as `get_gpt_decoder_block_spec` does."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        indices = layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
        return [layers[index] for index in indices]
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return layers[offset : offset + count]


def final_norm(use_transformer_engine: bool, layer: ModuleSpec) -> LayerNormBuilder:
    """Builder of the norm after the last layer: that of the layers, given the spec of one."""
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    norm: LayerNormBuilder = layer.submodules.input_layernorm
    return norm


def with_submodules(spec: ModuleSpec, **changes: object) -> ModuleSpec:
    """The spec with other submodules."""
    return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, **changes))


def with_attention(layer: ModuleSpec, **changes: object) -> ModuleSpec:
    """The layer spec with other submodules of its self-attention."""
    attention = with_submodules(layer.submodules.self_attention, **changes)
    return with_submodules(layer, self_attention=attention)
