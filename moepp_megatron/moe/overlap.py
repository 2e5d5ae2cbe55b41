"""A MoE++ layer as nodes of megatron-core's combined schedule of forward and backward.

The schedule (`overlap_moe_expert_parallel_comm`) runs the forward pass of one micro-batch and the
backward pass of another together, so that tokens of one travel while the other computes. Each layer
is four nodes, each with an autograd graph of its own. The schedule hands one tensor from layer to
layer and has no `context`:

    pre-dispatch                dispatch       experts       combine
    attention, norm, router,    all-to-all     FFN experts   all-to-all, add,
    shared and zero-computation                              lane packed
    experts

So the lane travels as it does between pipeline stages: packed with the hidden states as extra
columns (`lane.pack`). Upstream's nodes: `models/gpt/fine_grained_callables.py`.
"""

from typing import Any

import torch
from megatron.core.models.common.model_chunk_schedule_plan import (
    TransformerLayerSchedulePlan,
    TransformerModelChunkSchedulePlan,
)
from megatron.core.models.common.utils import PostProcessNode, PreProcessNode
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from moepp_megatron.moe.flex_dispatcher import FFNFlexTokenDispatcher
from moepp_megatron.moe.lane import MoEPPTransformerLayer, pack, unpack
from moepp_megatron.moe.layer import MoEPPLayer


class _MoEPPLayerPlan(TransformerLayerSchedulePlan):
    """megatron-core's plan of one layer, with nodes that carry the lane."""

    def _build_callable_nodes(self, *args: Any) -> None:
        super()._build_callable_nodes(*args)
        layer = self.layer
        if not isinstance(layer, MoEPPTransformerLayer):
            return
        nodes = _MoENodes(layer) if isinstance(layer.mlp, MoEPPLayer) else _DenseNodes(layer)
        for name in ("pre_dispatch_computation", "moe_dispatch", "mlp", "moe_combine"):
            if hasattr(nodes, name):
                getattr(self, name).submodule = getattr(nodes, name)


class _LanePreProcess(PreProcessNode):
    """Embedding, or the input from the stage before; packed with the lane if there is one."""

    def forward_impl(self) -> Tensor:
        """Returns [s, b, D + lane columns]."""
        hidden_states = super().forward_impl()
        return self.model.decoder.with_lane(hidden_states)


class _LanePostProcess(PostProcessNode):
    """Output layer and loss, computed from the hidden states without the lane."""

    def forward_impl(self, hidden_states: Tensor) -> Tensor:
        """Takes [s, b, D], or with the lane where this stage has no layer."""
        return super().forward_impl(_split(hidden_states, self.model.decoder.config.hidden_size)[0])


class MoEPPChunkPlan(TransformerModelChunkSchedulePlan):
    """megatron-core's plan of a model chunk; the model is a `MoEPPGPTModel`."""

    LAYER_SCHEDULE_PLAN_CLASS = _MoEPPLayerPlan
    PRE_PROCESS_NODE_CLASS = _LanePreProcess
    POST_PROCESS_NODE_CLASS = _LanePostProcess


class _Nodes:
    """Nodes of both kinds of layers. A node's first argument is megatron-core's node object."""

    def __init__(self, layer: MoEPPTransformerLayer) -> None:
        self.layer = layer

    def attention(self, node: Any, packed: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, D] after attention, and the lane that came in."""
        hidden_states, lane = _split(packed, self.layer.config.hidden_size)
        state = node.chunk_state
        hidden_states, _ = self.layer._forward_attention(
            hidden_states=hidden_states,
            attention_mask=state.attention_mask,
            rotary_pos_emb=state.rotary_pos_emb,
            rotary_pos_cos=state.rotary_pos_cos,
            rotary_pos_sin=state.rotary_pos_sin,
            packed_seq_params=state.packed_seq_params,
            sequence_len_offset=state.sequence_len_offset,
        )
        return hidden_states, lane

    def layer_output(self, node: Any, hidden_states: Tensor, lane: Tensor | None) -> Tensor:
        """The next layer's input; after the model's last layer the final norm and no lane."""
        norm = node.chunk_state.model.decoder.final_layernorm
        if node.is_last_layer and norm is not None:
            return make_viewless_tensor(norm(hidden_states), requires_grad=True, keep_graph=True)
        return hidden_states if lane is None else pack(hidden_states, lane)


class _DenseNodes(_Nodes):
    """A layer without experts: attention and FFN, the lane handed on."""

    def pre_dispatch_computation(self, node: Any, packed: Tensor) -> Tensor:
        hidden_states, lane = self.attention(node, packed)
        return hidden_states if lane is None else pack(hidden_states, lane)

    def mlp(self, node: Any, packed: Tensor) -> Tensor:
        hidden_states, lane = _split(packed, self.layer.config.hidden_size)
        return self.layer_output(node, self.layer._forward_mlp(hidden_states), lane)


class _MoENodes(_Nodes):
    """A MoE++ layer. Tensors that skip a node are kept, detached, in `node.layer_state`."""

    def __init__(self, layer: MoEPPTransformerLayer) -> None:
        super().__init__(layer)
        self.experts: MoEPPLayer = layer.mlp

    def pre_dispatch_computation(self, node: Any, packed: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states, lane = self.attention(node, packed)
        normed, residual = self.layer.normed_and_residual(hidden_states)
        padding = self.experts.padding_of(normed, node.chunk_state.padding_mask)
        mixing_weight = self.experts.zero_computation.mixing_rows
        routing = self.experts.router(normed, lane, padding, mixing_weight=mixing_weight)
        tokens, probs = self.experts.ffn_input(normed, routing)
        shared_output = self.experts.shared_output(normed, padding)
        local_output = self.experts.local_output(normed, routing, shared_output)

        kept = node.layer_state
        kept.residual = node.detach(residual)
        kept.local_output = None if local_output is None else node.detach(local_output)
        # Nobody reads the last layer's logits, so there is no gradient of them to wait for.
        travels = self.experts.moepp.gating_residual and not self._ends_model(node)
        kept.logits = node.detach(routing.logits) if travels else None
        return tokens, probs

    def moe_dispatch(self, node: Any, tokens: Tensor, probs: Tensor) -> Tensor:
        dispatcher = self.experts.token_dispatcher
        if isinstance(dispatcher, FFNFlexTokenDispatcher):
            # Its manager keeps the gates: those of this node's graph must take their place.
            dispatcher.manager.token_probs = probs
        dispatched, dispatched_probs = self.experts.dispatch(tokens, probs)
        node.layer_state.dispatched_probs = node.detach(dispatched_probs)
        return dispatched

    def mlp(self, node: Any, dispatched: Tensor) -> Tensor:
        dispatcher = self.experts.token_dispatcher
        probs = node.layer_state.dispatched_probs
        if isinstance(dispatcher, FFNFlexTokenDispatcher):
            dispatcher.manager.dispatched_probs = probs
            # Made on the stream of the dispatch: kept until this node is done.
            node.layer_state.counts = dispatcher.manager.get_number_of_tokens_per_expert()
        expert_output, _ = self.experts.routed_experts_compute(dispatched, probs)
        return expert_output

    def moe_combine(self, node: Any, expert_output: Tensor) -> Tensor:
        kept = node.layer_state
        output = self.experts.postprocess(self.experts.combine(expert_output), None)
        if kept.local_output is not None:
            output = output + kept.local_output.view_as(output)
        hidden_states = self.layer.with_residual(output, kept.residual)
        packed = self.layer_output(node, hidden_states, kept.logits)
        stream = torch.cuda.current_stream()
        for tensor in (kept.residual, kept.local_output, kept.logits):
            if tensor is not None:
                # Made on the stream of the first node, read on this one.
                tensor.record_stream(stream)
        kept.residual = kept.local_output = kept.logits = None
        return packed

    @staticmethod
    def _ends_model(node: Any) -> bool:
        return node.is_last_layer and node.chunk_state.model.decoder.final_layernorm is not None


def _split(packed: Tensor, hidden_size: int) -> tuple[Tensor, Tensor | None]:
    """Hidden states [s, b, D] and the lane, if there is one."""
    if packed.shape[-1] == hidden_size:
        return packed, None
    return unpack(packed, hidden_size)
