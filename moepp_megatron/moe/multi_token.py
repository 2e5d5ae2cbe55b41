"""Layers of multi-token prediction (MTP, DeepSeek-V3, arXiv 2412.19437, section 2.2) with MoE++.

The layer of depth k predicts the token k + 1 places ahead. At each position it takes
the hidden state of the layer before (the last decoder layer, or depth k - 1) and the embedding of
the token that is k places ahead. Its router is the next router of that position: its gating
residual sees the logits that the layer before gave at the same position. So routers, statistics and
losses count depth k as decoder layer `num_layers` + k.

megatron-core's MTP block passes only hidden states from layer to layer, so the lane of router
logits is packed with them, as between pipeline stages (`lane.pack`).
"""

from dataclasses import replace
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.lane import MoEPPTransformerLayer, pack, unpack
from moepp_megatron.moe.spec import (
    LayerAdapter,
    final_norm,
    get_dense_layer_spec,
    get_moepp_layer_spec,
    moe_layer_pattern,
)
from moepp_megatron.moe.upstream_versions import refuse_elsewhere


class _AfterDecoder(TransformerLayer):
    """A transformer layer that is numbered after the decoder's layers."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        layer_number: int = 1,
        is_mtp_layer: bool = True,
        **kwargs: Any,
    ) -> None:
        assert is_mtp_layer, "the MTP layer says what its layers are"
        # Not an MTP layer to megatron-core, which would count it from 1 and its losses elsewhere.
        super().__init__(
            config,
            submodules,
            layer_number=config.num_layers + layer_number,
            add_layer_offset=False,
            **kwargs,
        )


class _Inner(_AfterDecoder, MoEPPTransformerLayer):
    """The layer inside an MTP layer; takes and returns hidden states with the lane, if any."""

    def __init__(
        self, config: TransformerConfig, *args: Any, moepp: MoEPPConfig, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.lane_width = moepp.num_experts if moepp.gating_residual else 0

    def forward(
        self, hidden_states: Tensor, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Same as `MoEPPTransformerLayer.forward`; hidden states [s, b, D + lane columns]."""
        if self.lane_width > 0:
            hidden_states, context = unpack(hidden_states, self.config.hidden_size)
        return super().forward(hidden_states, context, **kwargs)


class _MTPLayer(MultiTokenPredictionLayer):
    """megatron-core's MTP layer; at depth k, i is padding if i + k is, or is beyond the end."""

    def __init__(
        self,
        *args: Any,
        mtp_layer_pattern: str | None = None,
        hybrid_submodules: Any = None,
        **kwargs: Any,
    ) -> None:
        # With a pattern it would build a HybridStack of its own inside, which loses the lane.
        super().__init__(*args, **kwargs)

    def _get_embeddings(
        self, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        # megatron-core moves the mask one place and fills with zeros, as it does the token ids.
        # Zero must mean padding there, so the mask of tokens that are not padding is moved.
        is_token = None if padding_mask is None else ~padding_mask.bool()
        ids, positions, is_token, embeddings, hidden_states = super()._get_embeddings(
            *args, padding_mask=is_token, **kwargs
        )
        padding_mask = None if is_token is None else ~is_token
        return ids, positions, padding_mask, embeddings, hidden_states


class _LaneMTPLayer(_MTPLayer):
    """The MTP layer whose hidden states are packed with the lane of router logits."""

    def _concat_embeddings(self, hidden_states: Tensor, decoder_input: Tensor) -> Tensor:
        hidden_states, lane = unpack(hidden_states, self.config.hidden_size)
        return pack(super()._concat_embeddings(hidden_states, decoder_input), lane)

    def _postprocess(self, hidden_states: Tensor) -> Tensor:
        hidden_states, lane = unpack(hidden_states, self.config.hidden_size)
        return pack(super()._postprocess(hidden_states), lane)


def get_moepp_mtp_block_spec(
    config: TransformerConfig,
    moepp: MoEPPConfig,
    *,
    use_transformer_engine: bool,
    adapt: LayerAdapter | None = None,
    vp_stage: int | None = None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """Specs of the MTP layers that one pipeline stage builds; None where it builds none.

    They are megatron-core's, each around a layer of the kind of the last decoder layer.
    `MoEPPGPTModel` takes them as `mtp_block_spec`; megatron-core's own model would lose the lane.
    Arguments as in `get_moepp_block_spec`.
    """
    if not config.mtp_num_layers:
        return None
    if not HAVE_TE:
        reason = "its MultiTokenPredictionLayer cannot be built without Transformer Engine"
        refuse_elsewhere("mtp_num_layers", config.mtp_num_layers, "None", reason)
    spec = get_moepp_layer_spec if moe_layer_pattern(config)[-1] else get_dense_layer_spec
    inner = spec(config, moepp, use_transformer_engine=use_transformer_engine, adapt=adapt)
    if moepp.is_vanilla:
        inner = replace(inner, module=_AfterDecoder)
    else:
        inner = replace(inner, module=_Inner, params={**inner.params, "moepp": moepp})
    block = get_gpt_mtp_block_spec(
        config,
        TransformerBlockSubmodules(layer_specs=[inner]),
        use_transformer_engine=use_transformer_engine,
        vp_stage=vp_stage,
    )
    if block is None:
        return None
    norm = final_norm(use_transformer_engine, inner)
    for layer in block.layer_specs:
        layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = norm
        layer.module = _LaneMTPLayer if moepp.gating_residual else _MTPLayer
    return block
