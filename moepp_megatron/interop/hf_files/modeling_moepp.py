"""A MoE++ model (arXiv 2410.07348) for transformers 5: Llama with another feed-forward layer.

Shape suffixes: T tokens, D hidden size, E all experts, K experts per token. Experts are ordered
FFN, constant, copy, zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .configuration_moepp import MoeConfig, MoEPPConfig


class MoEPPGate(nn.Module):
    """Router logits `z_j = W_j x + G_j z_(j-1)`, and the experts they select."""

    def __init__(self, config: MoEPPConfig, has_residual: bool) -> None:
        super().__init__()
        self.config = config
        experts, hidden = config.total_experts, config.hidden_size
        if config.two_layer_gate:
            self.wg: nn.Module = nn.Sequential(
                nn.Linear(hidden, 8 * experts, bias=False),
                nn.Tanh(),
                nn.Linear(8 * experts, experts, bias=False),
            )
        else:
            self.wg = nn.Linear(hidden, experts, bias=False)
        if config.gating_residual and has_residual:
            self.gate_map = nn.Linear(experts, experts, bias=False)
        if config.selection_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(experts))
            self.e_score_correction_bias: Tensor

    def forward(self, x_TD: Tensor, previous_TE: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gates [T, K], selected experts [T, K] and logits [T, E], in fp32."""
        logits_TE = _fp32(self.wg, x_TD.float())
        if hasattr(self, "gate_map") and previous_TE is not None:
            logits_TE = logits_TE + _fp32(self.gate_map, previous_TE)
        gates_TK, chosen_TK = self.select(logits_TE)
        return gates_TK, chosen_TK, logits_TE

    def select(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The selected experts and their gates, under the configured normalisation."""
        config = self.config
        if config.logits_norm_std is not None:
            # Logits that are all equal have none; they stay equal.
            spread = logits_TE.std(dim=-1, keepdim=True).clamp(min=1e-6)
            logits_TE = logits_TE * (config.logits_norm_std / spread)
        is_softmax = config.score_function == "softmax"
        scores_TE = torch.softmax(logits_TE, dim=-1) if is_softmax else torch.sigmoid(logits_TE)
        logs_TE = logits_TE if is_softmax else F.logsigmoid(logits_TE)
        # Logits rank as scores do, and still differ where scores underflow.
        ranked_TE = logits_TE
        if config.selection_bias:
            ranked_TE = scores_TE + self.e_score_correction_bias.float()
        chosen_TK = ranked_TE.topk(config.num_experts_per_tok, dim=-1).indices
        if config.gate_normalization == "none":
            return scores_TE.gather(1, chosen_TK) * config.gate_scale, chosen_TK
        # Scores divided by their sum, which may underflow: a softmax over their logarithms.
        logs_TK = logs_TE.gather(1, chosen_TK)
        if config.gate_normalization == "selected":
            return torch.softmax(logs_TK, dim=-1) * config.gate_scale, chosen_TK
        is_zero_TK = chosen_TK >= config.total_experts - config.num_zero_experts
        # The least number and not -inf: gates are 0 where all picks are zero experts.
        logs_TK = logs_TK.masked_fill(is_zero_TK, torch.finfo(logs_TK.dtype).min)
        gates_TK = torch.softmax(logs_TK, dim=-1).masked_fill(is_zero_TK, 0.0)
        return gates_TK * config.gate_scale, chosen_TK


def _fp32(module: nn.Module, x: Tensor) -> Tensor:
    """A bias-free gate applied in fp32, whatever its weights' dtype."""
    if isinstance(module, nn.Linear):
        return F.linear(x, module.weight.float())
    for part in module.children():
        x = _fp32(part, x) if isinstance(part, nn.Linear) else part(x)
    return x


class FFNExpert(nn.Module):
    """SwiGLU; gate and up projection are stacked in `up_proj`, gate first."""

    def __init__(self, config: MoEPPConfig) -> None:
        super().__init__()
        inner = config.moe_intermediate_size
        self.up_proj = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, D] to [n, D]."""
        gate, up = self.up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class ConstantExpert(nn.Module):
    """`a1 x + a2 v` with `[a1, a2] = softmax(U x / temperature)`."""

    def __init__(self, config: MoEPPConfig) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.zeros(config.hidden_size))
        self.wg = nn.Linear(config.hidden_size, 2, bias=False)
        self.temperature = config.constant_temperature

    def forward(self, x: Tensor) -> Tensor:
        """[n, D] to [n, D]."""
        logits = _fp32(self.wg, x.float()) / self.temperature
        keep, replace = torch.softmax(logits, dim=-1).to(x.dtype).split(1, -1)
        return keep * x + replace * self.constant


class CopyExpert(nn.Module):
    """Returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, D] to [n, D]."""
        return x


class ZeroExpert(nn.Module):
    """Returns 0."""

    def forward(self, x: Tensor) -> Tensor:
        """[n, D] to [n, D]."""
        return torch.zeros_like(x)


class MoEPPExperts(nn.Module):
    """The experts in their fixed order."""

    def __init__(self, config: MoEPPConfig) -> None:
        super().__init__()
        experts: list[nn.Module] = [FFNExpert(config) for _ in range(config.num_ffn_experts)]
        experts += [ConstantExpert(config) for _ in range(config.num_constant_experts)]
        experts += [CopyExpert() for _ in range(config.num_copy_experts)]
        experts += [ZeroExpert() for _ in range(config.num_zero_experts)]
        self.experts = nn.ModuleList(experts)

    def forward(self, x_TD: Tensor, gates_TK: Tensor, chosen_TK: Tensor) -> Tensor:
        """[T, D]: the selected experts' outputs, weighted and added up."""
        output_TD = torch.zeros_like(x_TD)
        for index in chosen_TK.unique().tolist():
            tokens, slots = torch.where(chosen_TK == index)
            result = self.experts[index](x_TD[tokens]) * gates_TK[tokens, slots, None]
            output_TD.index_add_(0, tokens, result.to(x_TD.dtype))
        return output_TD


class MoEPPLayer(nn.Module):
    """Gate, experts, and a shared expert where the model has one."""

    def __init__(self, config: MoEPPConfig, has_residual: bool) -> None:
        super().__init__()
        self.scale = config.expert_input_scale
        self.gate = MoEPPGate(config, has_residual)
        self.experts = MoEPPExperts(config)
        self.shared_expert: nn.Module | None = None
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = LlamaMLP(config)
            inner, hidden = config.shared_expert_intermediate_size, config.hidden_size
            self.shared_expert.gate_proj = nn.Linear(hidden, inner, bias=False)
            self.shared_expert.up_proj = nn.Linear(hidden, inner, bias=False)
            self.shared_expert.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x_TD: Tensor, previous_TE: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output [T, D] and router logits [T, E]."""
        gates_TK, chosen_TK, logits_TE = self.gate(x_TD, previous_TE)
        # The released model scales the experts' input, not the router's.
        output_TD = self.experts(x_TD * self.scale, gates_TK, chosen_TK)
        if self.shared_expert is not None:
            output_TD = output_TD + self.shared_expert(x_TD)
        return output_TD, logits_TE


class MoEPPBlock(nn.Module):
    """The place of a MoE layer in a decoder layer; checkpoints call it `mlp.moe`."""

    def __init__(self, config: MoEPPConfig, layer_idx: int) -> None:
        super().__init__()
        self.moe = MoEPPLayer(config, has_residual=any(config.moe_layers[:layer_idx]))


class MoEPPDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer around a MoE layer (or a dense one)."""

    def __init__(self, config: MoEPPConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.moe_layers[layer_idx]:
            self.mlp = MoEPPBlock(config, layer_idx)
        if config.qk_norm:
            attention = self.self_attn
            attention.q_norm = LlamaRMSNorm(config.head_dim, eps=config.rms_norm_eps)
            attention.k_norm = LlamaRMSNorm(config.head_dim, eps=config.rms_norm_eps)
            _normalise_heads(attention.q_proj, attention.q_norm)
            _normalise_heads(attention.k_proj, attention.k_norm)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As Llama's; `router_lane` holds the logits of the last MoE layer."""
        lane: dict[str, Tensor] = kwargs.pop("router_lane")
        mlp: nn.Module = self.mlp
        residual = hidden_states
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        hidden_states = residual + attended
        x = self.post_attention_layernorm(hidden_states)
        if not isinstance(mlp, MoEPPBlock):
            return hidden_states + mlp(x)
        output, lane["logits"] = mlp.moe(x.flatten(0, -2), lane.get("logits"))
        return hidden_states + output.view_as(hidden_states)


def _normalise_heads(projection: nn.Linear, norm: LlamaRMSNorm) -> None:
    """Normalise each head of a projection's output."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return norm(output.unflatten(-1, (-1, norm.weight.numel()))).flatten(-2)

    projection.register_forward_hook(hook)


class _MoEPPMixin:
    config_class: type[MoEPPConfig] = MoEPPConfig
    _no_split_modules = ["MoEPPDecoderLayer"]
    # Recomputing a layer would hand its logits to the next one twice.
    supports_gradient_checkpointing = False
    # The first MoE layer's map of a previous router's logits: the released model has one, unused.
    _keys_to_ignore_on_load_unexpected = [r"mlp\.moe\.gate\.gate_map\.weight"]
    # Steps of a bias are far smaller than what bf16 resolves.
    _keep_in_fp32_modules_strict = {"e_score_correction_bias"}
    _can_record_outputs = {"hidden_states": MoEPPDecoderLayer}


class MoEPPModel(_MoEPPMixin, LlamaModel):
    """The decoder without output layer."""

    def __init__(self, config: MoEPPConfig) -> None:
        # Not Llama's own: it would build Llama's layers first.
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            MoEPPDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `LlamaModel.forward`, with a lane for router logits through the layers."""
        return super().forward(*args, router_lane={}, **kwargs)


class MoEPPForCausalLM(_MoEPPMixin, LlamaForCausalLM):
    """The language model."""

    def __init__(self, config: MoEPPConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = MoEPPModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class MoeForCausalLM(MoEPPForCausalLM):
    """The same, by the released model's class name."""

    config_class = MoeConfig


__all__ = ["MoEPPForCausalLM", "MoEPPModel", "MoeForCausalLM"]
