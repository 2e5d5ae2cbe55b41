"""A MoE++ model in vLLM: Llama's decoder of vLLM around the MoE layer of the exported file.

vLLM's fused experts get one row for each pick of an FFN expert, so that no kernel has to skip the
others. Shape suffixes: T tokens, D hidden size, K experts per token, E all experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from vllm.compilation.decorators import ignore_torch_compile
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models import llama
from vllm.model_executor.models.utils import extract_layer_index
from vllm.sequence import IntermediateTensors

from moepp_megatron.interop.hf_files import modeling_moepp as exported
from moepp_megatron.runtime.patches import replace

_LOGGER = init_logger(__name__)


def _given_picks(hidden_states: Tensor, gating_output: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """Routing for vLLM's experts of picks that are made: [n, 2], gates and experts."""
    gates, experts = gating_output.split(1, dim=1)
    return gates.contiguous(), experts.int()


class _Experts(exported.MoEPPExperts):
    """The exported experts with vLLM's in place of those that are FFN."""

    # vLLM's loader looks into the modules.
    load_weights = None  # type: ignore[assignment]
    ffn: Any

    def __init__(self, config: Any, prefix: str) -> None:
        with torch.device("meta"):
            super().__init__(config)
        self.experts.to_empty(device=torch.get_default_device())
        self.ffn = FusedMoEFactory(
            num_experts=config.num_ffn_experts,
            top_k=1,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            custom_routing_function=_given_picks,
            reduce_results=False,
            prefix=prefix,
        )
        # The gate has all picks.
        replace(self.ffn.router, "set_capture_fn", lambda capture_fn: None)

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


class _Layer(exported.MoEPPLayer):
    """The exported MoE layer of these parts."""

    def __init__(self, config: Any, prefix: str) -> None:
        super(exported.MoEPPLayer, self).__init__()
        layer, inner = extract_layer_index(prefix), config.shared_expert_intermediate_size
        self.scale = config.expert_input_scale
        gate: Any = exported.MoEPPGate(config, has_residual=any(config.moe_layers[:layer]))
        # vLLM's `RoutedExpertsCaptureSource` of picks, which are rows of the router.
        gate.layer_id, gate.capture_fn = layer, None
        gate.register_forward_hook(lambda gate, _, out: gate.capture_fn and gate.capture_fn(out[1]))
        self.gate = gate
        self.experts = _Experts(config, f"{prefix}.experts")
        self.shared_expert: Any = None
        if inner is not None:
            self.shared_expert = llama.LlamaMLP(config.hidden_size, inner, config.hidden_act)
        if config.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)


class _Attention(llama.LlamaAttention):
    """Llama's attention, with norms of queries and keys where the model has them."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        widths = {"head": [self.head_dim] * 2, "all_heads": [self.q_size, self.kv_size]}
        self.q_norm, self.k_norm = (
            RMSNorm(width, eps=config.rms_norm_eps) if config.qk_norm else None
            for width in widths[config.qk_norm_scope]
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q_norm, k_norm = self.q_norm, self.k_norm
        if q_norm is not None and k_norm is not None:
            q = q_norm(q.unflatten(-1, (-1, q_norm.hidden_size)).contiguous()).flatten(-2)
            k = k_norm(k.unflatten(-1, (-1, k_norm.hidden_size)).contiguous()).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class _DecoderLayer(llama.LlamaDecoderLayer):
    """Llama's decoder layer around a MoE layer (or a dense one); `lane` has the last logits."""

    def __init__(self, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=_Attention)
        config = vllm_config.model_config.hf_config
        if config.moe_layers[extract_layer_index(prefix)]:
            # Checkpoints call it `mlp.moe`.
            self.mlp = nn.ModuleDict({"moe": _Layer(config, f"{prefix}.mlp.moe")})

    def forward(
        self, positions: Tensor, hidden: Tensor, residual: Tensor | None, lane: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            x, residual = self.input_layernorm(hidden), hidden
        else:
            x, residual = self.input_layernorm(hidden, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(positions, x), residual)
        mlp: Any = self.mlp
        if not isinstance(mlp, nn.ModuleDict):
            return mlp(x), residual
        output, lane[0] = mlp["moe"](x, lane[0])
        return output, residual


# The number of FFN rows is read on the host, which a compiled graph cannot do.
@ignore_torch_compile
class _Model(llama.LlamaModel):
    """The decoder; router logits cross pipeline stages next to the hidden states, in fp32."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", layer_type: Any = None) -> None:
        exported.refuse_unknown(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=_DecoderLayer)
        make_hidden = vars(self)["make_empty_intermediate_tensors"]

        def make_empty(batch_size: int, dtype: Any, device: Any) -> IntermediateTensors:
            tensors = make_hidden(batch_size, dtype, device)
            tensors["router_logits"] = self._empty_logits(batch_size, device)
            return tensors

        self.make_empty_intermediate_tensors = make_empty

    def _empty_logits(self, tokens: int, device: Any) -> Tensor:
        return torch.zeros((tokens, self.config.total_experts), dtype=torch.float32, device=device)

    def forward(self, input_ids: Any, positions: Tensor, stage: Any, embeds: Any = None) -> Any:
        # No layer reads the first.
        lane = [self._empty_logits(len(positions), positions.device)]
        if stage is not None:
            lane = [stage["router_logits"]]
        output = super().forward(input_ids, positions, stage, embeds, lane=lane)
        if isinstance(output, IntermediateTensors):
            output["router_logits"] = lane[0]
        return output


class MoEPPForCausalLM(llama.LlamaForCausalLM):
    """The language model, for exports of both layouts that have this file's experts."""

    def _init_model(self, *, vllm_config: Any, **kwargs: Any) -> nn.Module:
        with torch.device("meta"):
            theirs: Any = exported.MoEPPForCausalLM(deepcopy(self.config))
        (self.unused,) = theirs.model._keys_to_ignore_on_load_unexpected
        self.places = revert_weight_conversion(theirs, theirs.state_dict())
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        is_dummy = vllm_config.load_config.load_format == "dummy"
        # What no call of `load_weights` has had; later ones may update some.
        self.missing = set() if is_dummy else self.places.keys() - tied
        return _Model(vllm_config=vllm_config, **kwargs)

    def _checked(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, value in weights:
            if re.search(self.unused, name):
                continue
            exported.place_of(name, value, self.places)
            self.missing.discard(name)
            # Gates compute in fp32, and the released model's are stored so.
            if value.dtype != torch.float32 or ".gate." not in name:
                self.dtypes.setdefault(value.dtype, name)
            yield re.sub(r"\.experts\.(\d+\.(up|down)_proj)", r".ffn.\1", name), value

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Same as Llama's; ValueError for a tensor that vLLM would miss or drop in silence."""
        self.dtypes: dict[Any, str] = {}
        loaded = super().load_weights(self._checked(weights))
        if self.missing:
            copy = "copy all files of the export again, config.json too"
            raise ValueError(f"{min(self.missing)} must be in the checkpoint; {copy}")
        stated = str(self.config.dtype).removeprefix("torch.")
        for dtype, name in self.dtypes.items():
            held = str(dtype).removeprefix("torch.")
            if held != stated:
                _LOGGER.warning("%s is %s, config.json says %s: converted", name, held, stated)
        return loaded
