"""A MoE++ model in vLLM: Llama's decoder of vLLM around the MoE layer of the exported file.

Only rows that routers give to FFN experts are multiplied. On a GPU shapes are static: vLLM's Triton
kernels drop picks with the id -1 before they multiply, if they have an expert map. vLLM's kernel on
a CPU has no map and gets the picks of FFN experts only, in an operator that graphs do not look
into. Shape suffixes: T tokens, D hidden size, K experts per token, E all experts.
"""

import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from vllm.compilation.decorators import support_torch_compile
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models import llama
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import direct_register_custom_op

from moepp_megatron.interop.hf_files import modeling_moepp as exported
from moepp_megatron.runtime.patches import replace

_LOGGER = init_logger(__name__)


def _ffn_rows(x: Tensor, gates: Tensor, chosen: Tensor, name: str) -> Tensor:
    layer: Any = get_forward_context().no_compile_layers[name]
    return layer.ffn_rows(x, gates, chosen)


direct_register_custom_op(
    "moepp_ffn_rows",
    _ffn_rows,
    fake_impl=lambda x, gates, chosen, name: torch.empty_like(x),
)


class _Experts(exported.MoEPPExperts):
    """The exported experts with vLLM's in place of those that are FFN."""

    # vLLM's loader looks into the modules.
    load_weights = None  # type: ignore[assignment]
    ffn: Any

    def __init__(self, config: Any, prefix: str) -> None:
        with torch.device("meta"):
            super().__init__(config)
        self.experts.to_empty(device=torch.get_default_device())
        # vLLM's `RoutedExpertsCaptureSource` of picks, which are rows of the router.
        self.layer_id, self.capture_fn = extract_layer_index(prefix), cast("Any", None)
        self.is_static, self.name = not current_platform.is_cpu(), f"{prefix}.rows"
        self.ffn = FusedMoEFactory(
            num_experts=config.num_ffn_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            custom_routing_function=self.picks,
            reduce_results=False,
            prefix=prefix,
        )
        replace(self.ffn.router, "set_capture_fn", lambda capture_fn: None)
        if not self.is_static:
            layers = get_current_vllm_config().compilation_config.static_forward_context
            layers[self.name] = self
        elif self.ffn.expert_map is None:
            # Expert parallelism has a map; this one says that all experts are here.
            own = torch.arange(config.num_ffn_experts, dtype=torch.int32)
            self.ffn.routed_experts.register_buffer("_expert_map", own, persistent=False)

    def picks(
        self, hidden_states: Tensor, gating_output: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Split picks, [T, 2 K], into gates and FFN experts, with the id -1 for other experts."""
        gates, experts = gating_output.chunk(2, dim=1)
        experts = experts.int()
        self.capture(experts)
        if self.ffn.expert_map is None:
            raise RuntimeError(
                "expert_map (None) must be there: without it vLLM adds up rows of picks that "
                "it has not multiplied; serve with --model-impl transformers"
            )
        experts = experts.masked_fill(experts >= self.config.num_ffn_experts, -1)
        return gates.contiguous(), experts

    def capture(self, chosen: Tensor) -> None:
        """Hand the picks, [T, K], to vLLM's capturer."""
        if self.capture_fn is not None:
            self.capture_fn(chosen)

    def ffn_output(self, x_TD: Tensor, gates_TK: Tensor, chosen_TK: Tensor) -> Tensor:
        """[T, D]: the FFN experts' part of the output, of all ranks."""
        if self.is_static:
            # Numbers of experts are exact in fp32.
            output_TD = self.ffn(x_TD, torch.cat([gates_TK, chosen_TK.float()], dim=1))
        else:
            output_TD = torch.ops.vllm.moepp_ffn_rows(x_TD, gates_TK, chosen_TK, self.name)
        return tensor_model_parallel_all_reduce(output_TD)

    def ffn_rows(self, x_TD: Tensor, gates_TK: Tensor, chosen_TK: Tensor) -> Tensor:
        """[T, D]: this rank's part, with one row for each pick of an FFN expert."""
        self.capture(chosen_TK)
        is_own_TK = chosen_TK < self.config.num_ffn_experts
        if self.ffn.expert_map is not None:
            # Whole experts on each rank; vLLM's kernel on a CPU numbers its own from 0.
            chosen_TK = self.ffn.expert_map[chosen_TK.masked_fill(~is_own_TK, 0)]
            is_own_TK &= chosen_TK >= 0
        gates, chosen = gates_TK[is_own_TK], chosen_TK[is_own_TK].int()
        if len(chosen) == 0:
            return torch.zeros_like(x_TD)
        if len(x_TD) == 1 or len(chosen) == chosen_TK.numel():
            return self.multiply(x_TD, gates.view(len(x_TD), -1), chosen.view(len(x_TD), -1))
        # Tokens differ in their number of picks: one row for each pick.
        tokens = torch.where(is_own_TK)[0]
        rows = self.multiply(x_TD[tokens], gates[:, None], chosen[:, None])
        return torch.zeros_like(x_TD).index_add_(0, tokens, rows)

    def multiply(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """[n, D]: the sum of the chosen experts' outputs, [n, k], by vLLM's kernel on a CPU."""
        # Without vLLM's layers around it, which cost a tenth of a step of one token.
        ffn, output = self.ffn.routed_experts, torch.empty_like(x)
        inputs = x, ffn.w13_weight, ffn.w2_weight, gates, chosen
        kernel = ffn.quant_method.moe_kernel.fused_experts
        kernel.apply(output, *inputs, ffn.activation, ffn.global_num_experts, *[None] * 6, False)
        return output


class _Layer(exported.MoEPPLayer):
    """The exported MoE layer of these parts."""

    def __init__(self, config: Any, prefix: str) -> None:
        super(exported.MoEPPLayer, self).__init__()
        layer, inner = extract_layer_index(prefix), config.shared_expert_intermediate_size
        self.scale = config.expert_input_scale
        self.gate = exported.MoEPPGate(config, has_residual=any(config.moe_layers[:layer]))
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


@support_torch_compile(
    dynamic_arg_dims=dict.fromkeys(
        ("input_ids", "positions", "intermediate_tensors", "inputs_embeds"), {0: "b"}
    )
)
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

    def forward(
        self,
        input_ids: Any,
        positions: Tensor,
        intermediate_tensors: Any,
        inputs_embeds: Any = None,
    ) -> Any:
        if intermediate_tensors is None:
            # No layer reads the first.
            lane = [self._empty_logits(positions.shape[0], positions.device)]
        else:
            lane = [intermediate_tensors["router_logits"]]
        output = super().forward(
            input_ids, positions, intermediate_tensors, inputs_embeds, lane=lane
        )
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
            stored = str(dtype).removeprefix("torch.")
            if stored != stated:
                _LOGGER.warning("%s is %s, config.json says %s: converted", name, stored, stated)
        return loaded
