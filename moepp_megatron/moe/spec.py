"""Builds MoE++ layers from megatron-core's own specs, for use in any Megatron loop."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.attention import CoreAttentionBuilder
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder, WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import MlpBuilder, get_transformer_layer_offset

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.cpu_experts import CPUExperts, suits
from moepp_megatron.moe.lane import MoEPPTransformerLayer
from moepp_megatron.moe.latent_attention import with_local_latent_attention
from moepp_megatron.moe.layer import MoEPPLayer, VanillaMoELayer
from moepp_megatron.moe.router import MoEPPRouter
from moepp_megatron.moe.upstream_private import check_upstream
from moepp_megatron.moe.upstream_settings import refuse_ignored


def get_moepp_layer_spec(
    config: TransformerConfig,
    moepp: MoEPPConfig,
    *,
    use_transformer_engine: bool,
    has_residual: bool = True,
    norm: LayerNormBuilder | None = None,
    core_attention: CoreAttentionBuilder | None = None,
    qk_norms: tuple[LayerNormBuilder, LayerNormBuilder] | None = None,
) -> ModuleSpec:
    """Spec of one MoE++ transformer layer.

    It is megatron-core's own layer spec with the MoE layer, the router and the transformer layer
    exchanged, so attention, norms and experts are those of the chosen back end. Without
    zero-computation experts and gating residual it is megatron-core's MoE layer, only counted.

    Args:
        config: The model's configuration; `num_moe_experts` counts FFN experts.
        moepp: MoE++ settings.
        use_transformer_engine: Transformer Engine's modules, or megatron-core's local ones.
        has_residual: False for the first MoE layer of the model, which has no router before it.
        norm: Builder of the norms instead of the back end's own (local modules only).
        core_attention: Builder of the attention between the projections instead of the back end's
            own (local modules only).
        qk_norms: Builders of the norms of queries and of keys instead of the back end's own (any
            modules, `config.qk_layernorm` set, no latent attention).

    Raises:
        ValueError: If MoE++ layers would ignore a setting of `config` (`upstream_settings`).
        UpstreamMovedError: megatron-core lacks a private name that they use (`upstream_private`).
    """
    if not moepp.is_vanilla:
        check_upstream()
        refuse_ignored(config, moepp)
    spec = _base_layer_spec(
        config, config.num_moe_experts, use_transformer_engine, norm, core_attention, qk_norms
    )
    upstream: MlpBuilder = spec.submodules.mlp
    submodules: MoESubmodules = upstream.keywords["submodules"]
    if moepp.is_vanilla:
        mlp: MlpBuilder = partial(VanillaMoELayer, submodules=submodules)
        return _with_mlp(spec, mlp)
    router = partial(MoEPPRouter, moepp=moepp, has_residual=has_residual)
    submodules = dataclasses.replace(
        submodules, router=router, experts=_experts(submodules.experts, config)
    )
    mlp = partial(MoEPPLayer, submodules=submodules, moepp=moepp)
    return dataclasses.replace(_with_mlp(spec, mlp), module=MoEPPTransformerLayer)


def get_dense_layer_spec(
    config: TransformerConfig,
    moepp: MoEPPConfig,
    *,
    use_transformer_engine: bool,
    norm: LayerNormBuilder | None = None,
    core_attention: CoreAttentionBuilder | None = None,
    qk_norms: tuple[LayerNormBuilder, LayerNormBuilder] | None = None,
) -> ModuleSpec:
    """Spec of a layer without experts, which passes the router logits on.

    Args:
        config: The model's configuration.
        moepp: MoE++ settings.
        use_transformer_engine: Same as in `get_moepp_layer_spec`.
        norm: Same as in `get_moepp_layer_spec`.
        core_attention: Same as in `get_moepp_layer_spec`.
        qk_norms: Same as in `get_moepp_layer_spec`.
    """
    dense = _base_layer_spec(config, None, use_transformer_engine, norm, core_attention, qk_norms)
    if moepp.is_vanilla:
        return dense
    return dataclasses.replace(dense, module=MoEPPTransformerLayer)


def get_moepp_block_spec(
    config: TransformerConfig,
    moepp: MoEPPConfig,
    *,
    use_transformer_engine: bool,
    norm: LayerNormBuilder | None = None,
    core_attention: CoreAttentionBuilder | None = None,
    qk_norms: tuple[LayerNormBuilder, LayerNormBuilder] | None = None,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """Specs of the layers that one pipeline stage builds.

    The first MoE layer of the whole model has no gating residual. Dense layers
    (`TransformerConfig.moe_layer_freq`) hand the logits on.

    Args:
        config: The model's configuration.
        moepp: MoE++ settings.
        use_transformer_engine: Same as in `get_moepp_layer_spec`.
        norm: Same as in `get_moepp_layer_spec`, for the final norm too.
        core_attention: Same as in `get_moepp_layer_spec`.
        qk_norms: Same as in `get_moepp_layer_spec`.
        vp_stage: Virtual pipeline stage, or None.
        pp_rank: Pipeline rank; Megatron's global one where None.
    """
    pattern = moe_layer_pattern(config)
    layer = partial(
        get_moepp_layer_spec,
        config,
        moepp,
        use_transformer_engine=use_transformer_engine,
        norm=norm,
        core_attention=core_attention,
        qk_norms=qk_norms,
    )
    dense = get_dense_layer_spec(
        config,
        moepp,
        use_transformer_engine=use_transformer_engine,
        norm=norm,
        core_attention=core_attention,
        qk_norms=qk_norms,
    )
    first_moe_layer = pattern.index(True)
    layers = [
        layer(has_residual=index > first_moe_layer) if is_moe else dense
        for index, is_moe in enumerate(pattern)
    ]
    return TransformerBlockSubmodules(
        layer_specs=_of_stage(layers, config, vp_stage, pp_rank),
        layer_norm=final_norm(use_transformer_engine, norm),
    )


def moe_layer_pattern(config: TransformerConfig) -> list[bool]:
    """For each layer of the model, whether it is a MoE layer.

    Raises:
        ValueError: If there is none, or the pattern's length is not the number of layers.
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


def _experts(upstream: ExpertsBuilder, config: TransformerConfig) -> ExpertsBuilder:
    """Builder of the FFN experts: megatron-core's, or on a CPU `CPUExperts` where they suit."""
    is_sequential = getattr(upstream, "func", None) is SequentialMLP
    if not is_sequential or torch.cuda.is_available() or not suits(config):
        return upstream
    return partial(CPUExperts, *upstream.args, **upstream.keywords)


def _base_layer_spec(
    config: TransformerConfig,
    num_experts: int | None,
    use_transformer_engine: bool,
    norm: LayerNormBuilder | None,
    core_attention: CoreAttentionBuilder | None,
    qk_norms: tuple[LayerNormBuilder, LayerNormBuilder] | None,
) -> ModuleSpec:
    """megatron-core's layer spec, with norms and core attention exchanged where they are given."""
    spec = _backend_layer_spec(config, num_experts, use_transformer_engine, norm, core_attention)
    if qk_norms is None:
        return spec
    assert not config.multi_latent_attention, "latent attention has norms of compressed vectors"
    queries, keys = qk_norms
    return _with_attention(spec, q_layernorm=queries, k_layernorm=keys)


def _backend_layer_spec(
    config: TransformerConfig,
    num_experts: int | None,
    use_transformer_engine: bool,
    norm: LayerNormBuilder | None,
    core_attention: CoreAttentionBuilder | None,
) -> ModuleSpec:
    if use_transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
        )
    spec = get_gpt_layer_local_spec(
        num_experts=num_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
    )
    if config.multi_latent_attention:
        spec = with_local_latent_attention(spec, is_moe=num_experts is not None)
    if core_attention is not None:
        spec = _with_attention(spec, core_attention=core_attention)
    if norm is None:
        return spec
    qk_norm = norm if config.qk_layernorm else IdentityOp
    keys = "kv_layernorm" if config.multi_latent_attention else "k_layernorm"
    spec = _with_attention(spec, **{"q_layernorm": qk_norm, keys: qk_norm})
    submodules = dataclasses.replace(spec.submodules, input_layernorm=norm, pre_mlp_layernorm=norm)
    return dataclasses.replace(spec, submodules=submodules)


def _with_attention(spec: ModuleSpec, **changes: object) -> ModuleSpec:
    """The layer spec with other submodules of its self-attention."""
    attention = spec.submodules.self_attention
    attention = dataclasses.replace(
        attention, submodules=dataclasses.replace(attention.submodules, **changes)
    )
    return dataclasses.replace(
        spec, submodules=dataclasses.replace(spec.submodules, self_attention=attention)
    )


def _with_mlp(spec: ModuleSpec, mlp: MlpBuilder) -> ModuleSpec:
    return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, mlp=mlp))


def _of_stage(
    layers: list[ModuleSpec], config: TransformerConfig, vp_stage: int | None, pp_rank: int | None
) -> list[ModuleSpec]:
    """The layers of one stage, as `get_gpt_decoder_block_spec` selects them."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        indices = layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
        return [layers[index] for index in indices]
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return layers[offset : offset + count]


def final_norm(use_transformer_engine: bool, norm: LayerNormBuilder | None) -> LayerNormBuilder:
    """Builder of the norm after the last layer; arguments as in `get_moepp_layer_spec`."""
    if use_transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return norm or WrappedTorchNorm
