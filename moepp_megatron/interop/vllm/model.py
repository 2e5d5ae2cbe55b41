"""A MoE++ model in vLLM: Llama's decoder of vLLM around the MoE layer of the exported file.

Rows of FFN experts alone are multiplied: vLLM's fused experts get one row for each pick, so that
no kernel has to skip the others. Shape suffixes: T tokens, D hidden size, K experts per token,
E all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import ignore_torch_compile
from vllm.distributed import get_pp_group, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
)
from vllm.model_executor.models.utils import extract_layer_index
from vllm.sequence import IntermediateTensors

from moepp_megatron.interop.hf_files.modeling_moepp import MoEPPExperts, MoEPPGate, MoEPPLayer

_LOGITS = "router_logits"


class _Gate(MoEPPGate):
    """The exported gate, whose picks vLLM captures: a `RoutedExpertsCaptureSource`."""

    def __init__(self, config: Any, has_residual: bool, layer_id: int) -> None:
        super().__init__(config, has_residual)
        self.layer_id = layer_id
        self.capture_fn: Callable[[Tensor], None] | None = None

    def forward(self, x_TD: Tensor, previous_TE: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        gates_TK, chosen_TK, logits_TE = super().forward(x_TD, previous_TE)
        if self.capture_fn is not None:
            # Rows of the router: zero-computation experts have their own numbers.
            self.capture_fn(chosen_TK)
        return gates_TK, chosen_TK, logits_TE


class _GivenPicks(BaseRouter):
    """vLLM's router of picks that are made: `router_logits` holds their gates and experts."""

    routing_method_type = RoutingMethodType.Custom

    def set_capture_fn(self, capture_fn: Any) -> None:
        """Leave it to `_Gate`, which sees all picks."""

    def _compute_routing(
        self, hidden_states: Tensor, router_logits: Tensor, indices_type: Any, **_: Any
    ) -> tuple[Tensor, Tensor]:
        gates, experts = router_logits.split(1, dim=1)
        return gates.contiguous(), experts.to(indices_type or torch.int32).contiguous()


class _Experts(MoEPPExperts):
    """The exported experts with vLLM's in place of those that are FFN."""

    def __init__(self, config: Any, prefix: str) -> None:
        with torch.device("meta"):
            super().__init__(config)
        self.experts.to_empty(device=torch.get_default_device())
        self.ffn = FusedMoEFactory(
            num_experts=config.num_ffn_experts,
            top_k=1,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            router=_GivenPicks(1, config.num_ffn_experts),
            reduce_results=False,
            prefix=prefix,
        )

    def ffn_output(self, x_TD: Tensor, gates_TK: Tensor, chosen_TK: Tensor) -> Tensor:
        """[T, D]: the FFN experts' part of the output, of all ranks."""
        is_own_TK = chosen_TK < self.config.num_ffn_experts
        if self.ffn.expert_map is not None:
            # Whole experts on each rank; vLLM's kernel on a CPU numbers its own from 0.
            chosen_TK = self.ffn.expert_map[chosen_TK.masked_fill(~is_own_TK, 0)]
            is_own_TK &= chosen_TK >= 0
        tokens, slots = torch.where(is_own_TK)
        output_TD = torch.zeros_like(x_TD)
        if len(tokens) > 0:
            # Numbers of experts are exact in fp32.
            picks = torch.stack([gates_TK[tokens, slots], chosen_TK[tokens, slots].float()], dim=1)
            output_TD.index_add_(0, tokens, self.ffn(x_TD[tokens], picks))
        return tensor_model_parallel_all_reduce(output_TD)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
        """Load a checkpoint's tensors by name, and yield the names of parameters."""
        own = dict(self.named_parameters())
        for name, value in weights:
            if name in own:
                own[name].data.copy_(value)
                yield name
            else:
                pair = (name.removeprefix("experts."), value)
                yield from (f"ffn.{loaded}" for loaded in self.ffn.load_weights([pair]))


class _Layer(MoEPPLayer):
    """The exported MoE layer of these parts."""

    def __init__(self, config: Any, prefix: str) -> None:
        super(MoEPPLayer, self).__init__()
        layer, inner = extract_layer_index(prefix), config.shared_expert_intermediate_size
        self.scale = config.expert_input_scale
        self.gate = _Gate(config, any(config.moe_layers[:layer]), layer)
        self.experts = _Experts(config, f"{prefix}.experts")
        self.shared_expert = None
        if inner is not None:
            name = f"{prefix}.shared_expert"
            self.shared_expert = LlamaMLP(config.hidden_size, inner, config.hidden_act, prefix=name)
        if config.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)


class _Attention(LlamaAttention):
    """Llama's attention, with norms of queries and keys where the model has them."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            widths = {"head": [self.head_dim] * 2, "all_heads": [self.q_size, self.kv_size]}
            queries, keys = widths[config.qk_norm_scope]
            self.q_norm = RMSNorm(queries, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(keys, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.q_norm is not None:
            q, k = (
                norm(x.unflatten(-1, (-1, norm.hidden_size)).contiguous()).flatten(-2)
                for norm, x in ((self.q_norm, q), (self.k_norm, k))
            )
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class _DecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer around a MoE layer (or a dense one); `lane` holds router logits."""

    def __init__(self, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=_Attention)
        config = vllm_config.model_config.hf_config
        if config.moe_layers[extract_layer_index(prefix)]:
            # Checkpoints call it `mlp.moe`.
            self.mlp = nn.ModuleDict({"moe": _Layer(config, f"{prefix}.mlp.moe")})

    def forward(
        self, positions: Tensor, hidden: Tensor, residual: Tensor | None, lane: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            x, residual = self.input_layernorm(hidden), hidden
        else:
            x, residual = self.input_layernorm(hidden, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(positions, x), residual)
        if not isinstance(self.mlp, nn.ModuleDict):
            return self.mlp(x), residual
        output, lane[_LOGITS] = self.mlp["moe"](x, lane.get(_LOGITS))
        return output, residual


# The number of FFN rows is read on the host, which a compiled graph cannot do.
@ignore_torch_compile
class _Model(LlamaModel):
    """The decoder; router logits cross pipeline stages next to the hidden states, in fp32."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", layer_type: Any = None) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=_DecoderLayer)
        self.make_empty_hidden = self.make_empty_intermediate_tensors
        self.make_empty_intermediate_tensors = self._make_empty

    def _make_empty(self, batch_size: int, dtype: Any, device: Any) -> IntermediateTensors:
        tensors = self.make_empty_hidden(batch_size, dtype, device)
        shape = (batch_size, self.config.total_experts)
        tensors[_LOGITS] = torch.zeros(shape, dtype=torch.float32, device=device)
        return tensors

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        lane = {}
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None
            lane[_LOGITS] = intermediate_tensors[_LOGITS]
        output = super().forward(
            input_ids, positions, intermediate_tensors, inputs_embeds, lane=lane
        )
        if isinstance(output, IntermediateTensors):
            # Of a stage without MoE layers, what no layer reads.
            empty = self._make_empty(len(positions), torch.float32, positions.device)[_LOGITS]
            output[_LOGITS] = lane.get(_LOGITS, empty)
        return output

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        # The released model's first MoE layer has a map of previous logits that it does not use.
        first = list(self.config.moe_layers).index(1)
        unused = f"layers.{first}.mlp.moe.gate.gate_map.weight"
        return super().load_weights(pair for pair in weights if pair[0] != unused)


class MoEPPForCausalLM(LlamaForCausalLM):
    """The language model, for exports of both layouts that have this file's experts."""

    supports_lora = False

    def _init_model(self, **kwargs: Any) -> nn.Module:
        return _Model(**kwargs)
