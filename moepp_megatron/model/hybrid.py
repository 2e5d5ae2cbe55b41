"""The model as megatron-core's `HybridModel`, the successor of `GPTModel`.

A hybrid model is a string with one symbol per layer: `*` attention, `E` mixture of experts, `-`
dense FFN, `|` between pipeline stages. A GPT layer is two of them, so `num_layers` N is 2N here.
`HybridStack` has no `context`, so the lane of router logits needs a stack of ours; the model
itself is megatron-core's. Checkpoints carry the names of the GPT assembly: either assembly loads
what the other one wrote, and the same seed gives the same weights.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.recompute import checkpointed_forward
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.utils import WrappedTensor, make_viewless_tensor
from torch import Tensor

from moepp_megatron.config import Config, stage_layers
from moepp_megatron.config.stages import virtual_stages
from moepp_megatron.model.megatron_config import transformer_config
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.lane import (
    MoEPPTransformerLayer,
    lane_columns,
    no_logits,
    pack,
    unpack,
)
from moepp_megatron.moe.spec import (
    LayerAdapter,
    final_norm,
    get_dense_layer_spec,
    get_moepp_layer_spec,
    moe_layer_pattern,
    with_submodules,
)

_BF16_LAYERS = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")


def hybrid_layer_pattern(config: Config) -> str:
    """The model as `HybridModel`'s pattern, such as `*E*E|*E*E` for four layers on two stages."""
    is_moe = config.moe.moe_layer_pattern(config.model.num_layers)
    by_rank = stage_layers(config)
    stages = [chunks[chunk] for chunk in range(virtual_stages(config)) for chunks in by_rank]
    return Symbols.PIPE.join(
        "".join(
            Symbols.ATTENTION + (Symbols.MOE if is_moe[layer] else Symbols.MLP) for layer in stage
        )
        for stage in stages
    )


def hybrid_transformer_config(config: Config) -> TransformerConfig:
    """megatron-core's configuration for the same model with 2N layers.

    Stages are in the pattern, so there is no layout string. Recomputation and the bf16 layers at
    the ends count double layers, so that the settings mean the same in both assemblies.
    """
    model, training = config.model, config.training
    is_moe = config.moe.moe_layer_pattern(model.num_layers)
    layer_freq = [flag for layer in is_moe for flag in (0, int(layer))]
    recomputed, precision = training.recompute_num_layers, config.precision
    chunks = virtual_stages(config)
    doubled = config.model_copy(
        update={
            "model": model.model_copy(update={"num_layers": 2 * model.num_layers}),
            "moe": config.moe.model_copy(update={"layer_freq": layer_freq}),
            "parallel": config.parallel.model_copy(
                update={
                    "pipeline_model_parallel_layout": None,
                    "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
                }
            ),
            "precision": precision.model_copy(
                update={key: 2 * getattr(precision, key) for key in _BF16_LAYERS}
            ),
            "training": training.model_copy(
                update={"recompute_num_layers": None if recomputed is None else 2 * recomputed}
            ),
        }
    )
    megatron = transformer_config(doubled)
    megatron.is_hybrid_model = True
    return megatron


def get_moepp_hybrid_stack_spec(
    config: TransformerConfig,
    moepp: MoEPPConfig,
    *,
    use_transformer_engine: bool,
    adapt: LayerAdapter | None = None,
) -> ModuleSpec:
    """Spec of the stack to give to `HybridModel`: the layer specs of the GPT assembly, halved.

    Args:
        config: The hybrid model's configuration; `num_moe_experts` counts FFN experts.
        moepp: MoE++ settings.
        use_transformer_engine: Transformer Engine's modules, or megatron-core's local ones.
        adapt: Exchanges norms and attention of the back end, or None for the back end's own.
    """
    backend: dict[str, Any] = {"use_transformer_engine": use_transformer_engine, "adapt": adapt}
    dense = get_dense_layer_spec(config, moepp, **backend)
    moe = _without_attention(get_moepp_layer_spec(config, moepp, **backend))
    if not moepp.is_vanilla:
        first = get_moepp_layer_spec(config, moepp, has_residual=False, **backend)
        moe = dataclasses.replace(
            moe,
            module=HybridMoELayer,
            params={
                "first_moe_layer": moe_layer_pattern(config).index(True) + 1,
                "first_submodules": _without_attention(first).submodules,
            },
        )
    return ModuleSpec(
        module=MoEPPHybridStack,
        params={"moepp": moepp, "norm": final_norm(use_transformer_engine, dense)},
        submodules=HybridStackSubmodules(
            attention_layer=_without_ffn(dense),
            mlp_layer=_without_attention(dense),
            moe_layer=moe,
        ),
    )


class MoEPPHybridModel(HybridModel):
    """`HybridModel` whose checkpoints the GPT assembly can load, and the other way round.

    `MoEPPHybridStack` names the layers.
    """

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Same as `HybridModel`, without the empty entry that `GPTModel` leaves out too."""
        state = super().sharded_state_dict(prefix, *args, **kwargs)
        extra = state.pop(f"{prefix}output_layer._extra_state", None)
        assert extra is None or not extra.data, "the output layer has no state but its weight"
        return state


class HybridMoELayer(MoEPPTransformerLayer):
    """The `E` of a pattern. `HybridStack` has one spec for all of them, but the first differs.

    Args:
        config: The hybrid model's configuration.
        submodules: Submodules of every MoE layer but the first.
        layer_number: Global layer number, from 1.
        first_moe_layer: Number of the first MoE layer.
        first_submodules: Submodules of the first MoE layer, whose router has no gating residual.
        **kwargs: Same as `TransformerLayer`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *,
        first_moe_layer: int,
        first_submodules: TransformerLayerSubmodules,
        **kwargs: Any,
    ) -> None:
        own = first_submodules if layer_number == first_moe_layer else submodules
        super().__init__(config, own, layer_number, **kwargs)


class MoEPPHybridStack(HybridStack):
    """`HybridStack` that hands the router logits from layer to layer and from stage to stage.

    Args:
        config: The hybrid model's configuration.
        submodules: The layers' specs.
        moepp: MoE++ settings.
        norm: Builder of the final norm; `HybridStack` would insist on Transformer Engine's.
        **kwargs: Same as `HybridStack`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        moepp: MoEPPConfig,
        norm: LayerNormBuilder,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        self.moepp = moepp
        self.final_norm = None
        if self.post_process:
            self.final_norm = norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
        crosses_stages = config.pipeline_model_parallel_size > 1 and (
            lane_columns(moepp, config.params_dtype) > 0
        )
        self._receives_lane = crosses_stages and not self.pre_process
        self._sends_lane = crosses_stages and not self.post_process
        if self._sends_lane and len(self.layers) > 0:
            self.layers[-1].lane_width = moepp.num_experts

    def forward(
        self,
        hidden_states: Tensor | WrappedTensor,
        attention_mask: Tensor | None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | None = None,
        *,
        inference_params: Any = None,
        packed_seq_params: Any = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Run this stage's layers.

        Args:
            hidden_states: [s, b, D] embeddings; unused on a stage that is not the first.
            attention_mask: Same as `HybridStack`.
            inference_context: Cache of earlier keys and values, one for whole batches (static).
            rotary_pos_emb: Same as `HybridStack`.
            inference_params: Not supported; must be None.
            packed_seq_params: Same as `HybridStack`.
            padding_mask: [b, s] True for padding, as `MoEPPLayer.forward` takes it, or None.

        Returns:
            [s, b, D], on a stage that is not the last [s, b, D + lane columns].
        """
        _refuse_unsupported(inference_context, inference_params)
        if isinstance(hidden_states, WrappedTensor):
            # In inference the model hands over its only reference.
            hidden_states = hidden_states.unwrap()
        lane = None
        if not self.pre_process:
            hidden_states = self.input_tensor
            if self._receives_lane:
                hidden_states, lane = unpack(hidden_states, self.config.hidden_size)
        hidden_states = self._run_layers(
            hidden_states,
            lane,
            attention_mask=attention_mask,
            inference_context=inference_context,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            padding_mask=padding_mask,
        )
        if self._sends_lane and len(self.layers) == 0:
            # A stage of embeddings only, or an empty one: no layer glues the lane on.
            if lane is None:
                lane = no_logits(hidden_states, self.moepp.num_experts)
            hidden_states = pack(hidden_states, lane)
        if self.final_norm is not None:
            hidden_states = self.final_norm(hidden_states)
        # Pipeline schedules free what they have sent, which a view would keep alive.
        return make_viewless_tensor(
            inp=hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True
        )

    def _run_layers(self, hidden_states: Tensor, lane: Tensor | None, **kwargs: Any) -> Tensor:
        """All layers, the lane from each to the next; recomputed or not, in FP8 or not."""
        delayed = self.config.fp8_recipe == Fp8Recipe.delayed
        outer_fp8 = bool(self.config.fp8) and delayed
        inner_fp8 = bool(self.config.fp8) and not delayed
        with get_fp8_context(self.config) if outer_fp8 else nullcontext():
            if self.config.recompute_granularity == "full" and self.training:
                del kwargs["inference_context"]
                return checkpointed_forward(
                    self,
                    hidden_states=hidden_states,
                    context=lane,
                    context_mask=None,
                    attention_bias=None,
                    use_inner_quantization_context=inner_fp8,
                    **kwargs,
                )
            for layer in self.layers:
                layer_fp8: AbstractContextManager[Any] = nullcontext()
                if inner_fp8:
                    layer_fp8 = get_fp8_context(self.config, layer.layer_number - 1)
                with layer_fp8:
                    hidden_states, lane = layer(hidden_states, context=lane, **kwargs)
        return hidden_states

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Same as `HybridStack`, with the GPT assembly's names: layers 2i, 2i + 1 are layer i."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        names = {f"{prefix}final_norm.": (f"{prefix}final_norm.", f"{prefix}final_layernorm.")}
        for index, layer in enumerate(self.layers):
            number = layer.layer_number - 1
            names[f"{prefix}layers.{index}."] = (
                f"{prefix}layers.{number}.",
                f"{prefix}layers.{number // 2}.",
            )
        for module, (own_name, gpt_name) in names.items():
            entries = {key: entry for key, entry in state.items() if key.startswith(module)}
            replace_prefix_for_sharding(entries, own_name, gpt_name)
        return state


def _refuse_unsupported(inference_context: Any, inference_params: Any) -> None:
    """Refuse a cache that the layers would ignore or misread.

    Raises:
        ValueError: If a rule is broken; names the setting, its value, the rule and a remedy.
    """
    if inference_params is not None:
        raise ValueError(
            f"inference_params ({type(inference_params).__name__}) must be None; "
            "use inference_context"
        )
    if inference_context is not None and not inference_context.is_static_batching():
        raise ValueError(
            f"inference_context ({type(inference_context).__name__}) must be static in this "
            "stack; use StaticInferenceContext"
        )


def _without_ffn(layer: ModuleSpec) -> ModuleSpec:
    """The attention half of a transformer layer."""
    return with_submodules(
        layer, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp
    )


def _without_attention(layer: ModuleSpec) -> ModuleSpec:
    """The FFN half of a transformer layer."""
    return with_submodules(
        layer,
        input_layernorm=IdentityOp,
        self_attention=IdentityOp,
        self_attn_bda=IdentityFuncOp,
    )
