"""The lane on which router logits travel from MoE layer to MoE layer.

Within a pipeline stage the lane is `TransformerBlock`'s `context` argument, which every layer
receives and returns and which activation checkpointing treats as an explicit input and output. At
a stage boundary the logits are extra columns of the hidden states, so they cost no message of
their own: an fp32 logit is two bf16 columns, reinterpreted bit for bit, never rounded.
"""

import copy
from typing import Any

import torch
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.cuda_graphs import CapturedParts
from moepp_megatron.moe.layer import MoEPPLayer, moepp_layers
from moepp_megatron.moe.selection import Routing
from moepp_megatron.moe.upstream_versions import by_name

# What a captured router passes on of its `Routing`; the last one where the gate computes it.
_CAPTURED = ("logits", "gates", "routing_map", "counts", "score_sums", "mixing_logits")


class MoEPPTransformerLayer(TransformerLayer):
    """A transformer layer that takes the previous router's logits and returns its own.

    `context` carries the lane, [s, b, E] fp32, or None before the first MoE layer. A layer without
    MoE++ passes it on unchanged.

    Attributes:
        lane_width: E for a layer that ends a pipeline stage: it returns its hidden states with the
            packed lane. 0 for every other layer.
        captured: The parts that run as CUDA graphs; None for none.
    """

    lane_width = 0
    captured: CapturedParts | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mlp = self.mlp
        if self.captured and isinstance(mlp, MoEPPLayer) and mlp.moepp.captures_experts:
            self.captured.add(CudaGraphModule.moe)

    def forward(
        self, hidden_states: Tensor, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Same as `TransformerLayer.forward`; returns the output and the lane.

        `context_mask`, which a decoder does not use otherwise, carries the tags of `token_tags`.
        """
        tags = kwargs.pop("context_mask", None)
        hidden_states, _ = self._forward_attention(
            hidden_states, context=None, **self._arguments(CudaGraphModule.attn, **kwargs)
        )
        if isinstance(self.mlp, MoEPPLayer):
            hidden_states, context = self._forward_moe(
                hidden_states, context, kwargs.get("padding_mask"), tags
            )
        else:
            hidden_states = self._forward_mlp(
                hidden_states,
                kwargs.get("inference_context"),
                padding_mask=kwargs.get("padding_mask"),
                packed_seq_params=kwargs.get("packed_seq_params"),
            )
        if self.lane_width > 0:
            if context is None:
                context = no_logits(hidden_states, self.lane_width)
            hidden_states = pack(hidden_states, context)
        return hidden_states, context

    def _forward_moe(
        self,
        hidden_states: Tensor,
        previous_logits: Tensor | None,
        padding_mask: Tensor | None,
        tags: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if self.captured is not None and CudaGraphModule.moe_router in self.captured.parts:
            if padding_mask is not None:
                raise ValueError(
                    "padding_mask must be None where TransformerConfig.cuda_graph_modules holds "
                    "moe_router: the router was captured without one; use [attn]"
                )
            normed, *chosen = self._forward_router(
                hidden_states, previous_logits, **self._arguments(CudaGraphModule.moe_router)
            )
            routing = Routing(**dict(zip(_CAPTURED, chosen, strict=False)))
            if CudaGraphModule.moe in self.captured.parts:
                return self._captured_experts(hidden_states, normed, routing)
            residual = self._residual(hidden_states)
            output, logits = self.mlp(normed, chosen=routing)
        else:
            normed, residual = self.normed_and_residual(hidden_states)
            output, logits = self.mlp(normed, previous_logits, padding_mask=padding_mask, tags=tags)
        return self.with_residual(output, residual), logits

    def _captured_experts(
        self, hidden_states: Tensor, normed: Tensor, chosen: Routing
    ) -> tuple[Tensor, Tensor]:
        """Output [s, b, D] and logits of the layer after what a router chose."""
        routing = self.mlp.router.finish(chosen)
        self.mlp.choose_dispatcher(routing)
        output = self._forward_experts(
            hidden_states,
            normed,
            *(routing.gates, routing.routing_map, routing.mixing_logits),
            **self._arguments(CudaGraphModule.moe),
        )
        self.mlp.count_bytes(normed)
        return output, routing.logits

    def _forward_experts(
        self,
        hidden_states: Tensor,
        normed: Tensor,
        gates: Tensor,
        routing_map: Tensor,
        mixing_logits: Tensor | None,
    ) -> Tensor:
        """The layer after `finish`, without counting anything: what a graph captures."""
        routing = Routing(gates, routing_map, None, None, mixing_logits=mixing_logits)
        output = self.mlp.combined_output(normed, routing, counts=False)
        return self.with_residual(output, self._residual(hidden_states))

    def _forward_router(
        self, hidden_states: Tensor, previous_logits: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Norm and router up to the selection, [s, b, D] and `_CAPTURED`: what a graph captures."""
        normed = self._forward_pre_mlp_layernorm(hidden_states)
        assert torch.is_tensor(normed), "a norm fused with its residual cannot be captured here"
        mixing_weight = self.mlp.zero_computation.mixing_rows
        chosen = self.mlp.router.choose(normed, previous_logits, mixing_weight)
        # A graph returns only tensors.
        fields = [getattr(chosen, name) for name in _CAPTURED]
        return normed, *(fields[:-1] if chosen.mixing_logits is None else fields)

    def normed_and_residual(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The MoE layer's input and the residual that its output is added to, both [s, b, D]."""
        normed = self._forward_pre_mlp_layernorm(hidden_states)
        if isinstance(normed, tuple):
            normed, hidden_states = normed
        return normed, self._residual(hidden_states)

    def with_residual(self, output: Tensor, residual: Tensor) -> Tensor:
        """[s, b, D] the layer's output: the experts' output plus the residual."""
        return by_name(self, "_forward_post_mlp")((output, None), residual)

    def _residual(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.float() if self.config.fp32_residual_connection else hidden_states

    def create_mcore_cudagraph_manager(self, config: TransformerConfig) -> None:
        """megatron-core's constructor calls this where `cuda_graph_impl` is local."""
        self.captured = CapturedParts(self, config)

    def _arguments(self, part: CudaGraphModule, **kwargs: Any) -> dict[str, Any]:
        return kwargs if self.captured is None else self.captured.arguments(part, **kwargs)


def use_static_rows(model: torch.nn.Module, is_static: bool) -> None:
    """Have training passes of all layers use static rows, and graphs of experts, or neither."""
    layers = moepp_layers(model)
    captures = any(layer.moepp.captures_experts for layer in layers)
    for layer in layers:
        layer.is_static = is_static
    for module in model.modules():
        if isinstance(module, MoEPPTransformerLayer) and module.captured is not None:
            module.captured.replays = is_static or not captures


def lane_columns(moepp: MoEPPConfig, dtype: torch.dtype) -> int:
    """Columns of `dtype` that the lane adds to the hidden states at a stage boundary."""
    if not moepp.gating_residual:
        return 0
    return moepp.num_experts * torch.float32.itemsize // dtype.itemsize


def pipeline_config(config: TransformerConfig, moepp: MoEPPConfig) -> TransformerConfig:
    """The configuration to give to the data-parallel wrapper of each model chunk.

    Megatron's pipeline schedules read the width of the tensors they exchange from the outermost
    module's `config.hidden_size`. This copy widens it by the lane, for the 1F1B and the
    interleaved schedule alike; the layers keep the true configuration.
    """
    if config.pipeline_model_parallel_size == 1:
        return config
    wide = copy.copy(config)
    wide.hidden_size = config.hidden_size + lane_columns(moepp, config.pipeline_dtype)
    return wide


def no_logits(hidden_states: Tensor, num_experts: int) -> Tensor:
    """The lane [s, b, E] before the first MoE layer, which does not read it."""
    return torch.zeros(
        *hidden_states.shape[:-1], num_experts, dtype=torch.float32, device=hidden_states.device
    )


def pack(hidden_states: Tensor, logits: Tensor) -> Tensor:
    """[s, b, D] hidden states and [s, b, E] fp32 logits as one tensor of the hidden dtype."""
    return _Pack.apply(hidden_states, logits)


def unpack(packed: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: hidden states [s, b, D] and logits [s, b, E] fp32."""
    return _Unpack.apply(packed, hidden_size)


def _join(hidden: Tensor, logits: Tensor) -> Tensor:
    return torch.cat([hidden, logits.float().contiguous().view(hidden.dtype)], dim=-1)


def _split(packed: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    hidden, lane = packed.split([hidden_size, packed.shape[-1] - hidden_size], dim=-1)
    return hidden.contiguous(), lane.contiguous().view(torch.float32)


class _Pack(torch.autograd.Function):
    """`pack` with a backward pass: autograd cannot differentiate reinterpreted bits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor) -> Tensor:
        ctx.hidden_size = hidden.shape[-1]
        return _join(hidden, logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _split(grad, ctx.hidden_size)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
        return _split(packed, hidden_size)

    @staticmethod
    def backward(ctx: Any, hidden_grad: Tensor, logits_grad: Tensor) -> tuple[Tensor, None]:
        return _join(hidden_grad, logits_grad), None
