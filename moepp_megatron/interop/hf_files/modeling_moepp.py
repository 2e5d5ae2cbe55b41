"""A MoE++ model (arXiv 2410.07348) for transformers 5: Llama with another feed-forward layer.

Shape suffixes: T tokens, D hidden size, E all experts, K experts per token. Experts are ordered
FFN, constant, copy, zero.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.utils.output_capturing import OutputRecorder

from .configuration_moepp import MoeConfig, MoEPPConfig

# What this file computes: kinds of experts, and values of settings; `others` may have any value.
# moepp_megatron reads this without running the file, and refuses to export anything else.
COMPUTES = {
    "kinds": "FFN constant copy zero",
    "score_function": "softmax sigmoid sqrtsoftplus",
    "gate_normalization": "none selected nonzero",
    # Of `global` only the batch at hand.
    "balance_scope": "microbatch sequence global",
    "balance_loss": "heterogeneous grouped",
    "qk_norm_scope": "head all_heads",
    "others": "tau balance_coeff router_topk gating_residual two_layer_gate logits_norm_std "
    "expert_input_scale constant_temperature constant_init constants_shared selection_bias "
    "num_groups group_topk gate_scale capacity_factor fused",
}


def refuse_unknown(config: MoEPPConfig) -> None:
    """Refuse (ValueError) values of settings that this file does not compute."""
    for name in COMPUTES.keys() - {"kinds", "others"}:
        known = COMPUTES[name].split()
        if getattr(config, name) not in known:
            raise ValueError(
                f"{name} ({getattr(config, name)}) must be {' or '.join(known)}, which is all that "
                "this model's code computes; use the code that was exported with it"
            )


def place_of(name: str, value: Tensor, places: Mapping[str, Tensor]) -> Tensor:
    """Where a checkpoint's tensor goes; ValueError if the model has no such, shape included."""
    remedy = "copy all files of the export again, config.json too"
    if name not in places:
        raise ValueError(f"{name} must not be in the checkpoint; {remedy}")
    place = places[name]
    if value.shape != place.shape:
        shapes = f"{list(value.shape)}) must be {list(place.shape)}"
        raise ValueError(f"{name}: its shape ({shapes} by config.json; {remedy}")
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name}: its dtype ({value.dtype}) must be float32, bfloat16 or float16, as exports "
            f"have it; {remedy}"
        )
    return place


def _log_sqrt_softplus(logits: Tensor) -> Tensor:
    # Of smaller logits, the softplus is e^z and underflows.
    log = (-F.logsigmoid(-logits.clamp(min=-40.0))).log()
    return 0.5 * torch.where(logits < -40.0, logits, log)


# Scores, and their logarithms up to a number for each token; of standardised logits.
_SCORES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "softmax": (partial(torch.softmax, dim=-1), lambda logits: logits),
    "sigmoid": (torch.sigmoid, F.logsigmoid),
    "sqrtsoftplus": (lambda logits: _log_sqrt_softplus(logits).exp(), _log_sqrt_softplus),
}


class _FP32Linear(nn.Module):
    """`W x` in fp32, whatever the dtype of W.

    Not an `nn.Linear`: vLLM and quantisers put products in the weights' dtype in place of those.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, inputs] to [n, outputs], fp32, under autocast too."""
        device = x.device.type
        # torch cannot name a graph that has autocast in it, and vLLM would load another's instead.
        is_needed = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if is_needed else nullcontext():
            return F.linear(x.float(), self.weight.float())


class MoEPPGate(nn.Module):
    """Router logits `z_j = W_j x + G_j z_(j-1)`, and the experts they select."""

    def __init__(self, config: MoEPPConfig, has_residual: bool) -> None:
        super().__init__()
        self.config = config
        experts, hidden = config.total_experts, config.hidden_size
        if config.two_layer_gate:
            self.wg: nn.Module = nn.Sequential(
                _FP32Linear(hidden, 8 * experts),
                nn.Tanh(),
                _FP32Linear(8 * experts, experts),
            )
        else:
            self.wg = _FP32Linear(hidden, experts)
        if config.gating_residual and has_residual:
            self.gate_map = _FP32Linear(experts, experts)
        if config.selection_bias:
            bias = torch.zeros(experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias)
            self.e_score_correction_bias: Tensor

    def forward(self, x_TD: Tensor, previous_TE: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gates [T, K], selected experts [T, K] and logits [T, E], in fp32."""
        logits_TE = self.wg(x_TD)
        if hasattr(self, "gate_map"):
            if previous_TE is None:
                raise ValueError(
                    "previous_TE (None) must be the router logits of the MoE layer before, which "
                    "do not pass from one pipeline stage to the next; run all layers in one stage "
                    "(vLLM: --pipeline-parallel-size 1)"
                )
            logits_TE = logits_TE + self.gate_map(previous_TE)
        gates_TK, chosen_TK = self.select(logits_TE)
        return gates_TK, chosen_TK, logits_TE

    def standardized(self, logits_TE: Tensor) -> Tensor:
        """The logits scaled to `logits_norm_std`, where the model has one."""
        if self.config.logits_norm_std is None:
            return logits_TE
        # Logits that are all equal have no deviation; they stay equal.
        spread = logits_TE.std(dim=-1, keepdim=True).clamp(min=1e-6)
        return logits_TE * (self.config.logits_norm_std / spread)

    def select(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The selected experts and their gates, under the configured normalisation."""
        config = self.config
        logits_TE = self.standardized(logits_TE)
        scores, logs = _SCORES[config.score_function]
        scores_TE = scores(logits_TE)
        # Logits rank as scores do, and still differ where scores underflow.
        ranked_TE = logits_TE
        if config.selection_bias:
            ranked_TE = scores_TE + self.e_score_correction_bias.float()
        if config.group_topk < config.num_groups:
            ranked_TE = self.within_groups(ranked_TE, logits_TE)
        chosen_TK = ranked_TE.topk(config.num_experts_per_tok, dim=-1).indices
        if config.gate_normalization == "none":
            return scores_TE.gather(1, chosen_TK) * config.gate_scale, chosen_TK
        # Scores divided by their sum, which may underflow: a softmax over their logarithms.
        logs_TK = logs(logits_TE).gather(1, chosen_TK)
        if config.gate_normalization == "selected":
            return torch.softmax(logs_TK, dim=-1) * config.gate_scale, chosen_TK
        is_zero_TK = chosen_TK >= config.total_experts - config.num_zero_experts
        # The least number and not -inf: gates are 0 where all picks are zero experts.
        logs_TK = logs_TK.masked_fill(is_zero_TK, torch.finfo(logs_TK.dtype).min)
        gates_TK = torch.softmax(logs_TK, dim=-1).masked_fill(is_zero_TK, 0.0)
        return gates_TK * config.gate_scale, chosen_TK

    def within_groups(self, ranked_TE: Tensor, logits_TE: Tensor) -> Tensor:
        """The ranking with -inf for FFN experts outside of a token's `group_topk` best groups."""
        config = self.config
        ffn, groups, kept = config.num_ffn_experts, config.num_groups, config.group_topk
        affinity_TF = ranked_TE[:, :ffn]
        if not config.selection_bias:
            # Scores among FFN experts, which do not underflow.
            affinity_TF = _SCORES[config.score_function][0](logits_TE[:, :ffn])
        best = affinity_TF.unflatten(1, (groups, -1)).topk(config.num_experts_per_tok // kept)
        sums = best.values.sum(dim=-1)
        chosen = sums.argsort(dim=-1, descending=True, stable=True)[:, :kept]
        others = torch.ones_like(sums, dtype=torch.bool).scatter(1, chosen, False)
        others = others.repeat_interleave(ffn // groups, dim=1)
        return ranked_TE.masked_fill(
            F.pad(others, (0, ranked_TE.shape[1] - ffn), value=False), -torch.inf
        )

    def balance_loss(self, logits_TE: Tensor) -> Tensor:
        """`sum_i eta_i f_i P_i` of these tokens, eta = 1 for FFN experts and tau for the others.

        The grouped loss has the mean f of a group, and is 1 where balance is perfect.
        """
        ffn = self.config.num_ffn_experts
        grouped = {"heterogeneous": False, "grouped": True}[self.config.balance_loss]
        fractions_E = logits_TE.new_zeros(self.config.total_experts)
        chosen = self.select(logits_TE.detach())[1].flatten()
        fractions_E.index_add_(0, chosen, torch.ones_like(chosen, dtype=fractions_E.dtype))
        fractions_E /= logits_TE.shape[0]
        eta_E = torch.full_like(fractions_E, self.config.tau)
        eta_E[:ffn] = 1.0
        if grouped:
            for group_G in fractions_E.tensor_split([ffn]):
                group_G.fill_(group_G.mean())
            fractions_E *= (1.0 / eta_E).sum() / self.config.num_experts_per_tok
        # A token's scores divided by their sum.
        _, logs = _SCORES[self.config.score_function]
        probabilities_TE = torch.softmax(logs(self.standardized(logits_TE)), dim=-1)
        return (eta_E * fractions_E * probabilities_TE.mean(dim=0)).sum()


@use_experts_implementation
class _FFNExperts(nn.Module):
    """SwiGLU experts; gate and up projection are stacked in `gate_up_proj`, gate first.

    This loop is `experts_implementation="eager"`. transformers has others, by default `grouped_mm`,
    which call themselves with `num_experts`, the two weights and `act_fn`.
    """

    def __init__(self, config: MoEPPConfig) -> None:
        super().__init__()
        self.num_experts = config.num_ffn_experts
        inner, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, inner))
        self.act_fn = nn.SiLU()

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """[T, D]: the outputs of picks that are FFN experts, weighted and added up."""
        output_TD = torch.zeros_like(x_TD)
        for index in chosen_TK[chosen_TK < self.num_experts].unique().tolist():
            tokens, slots = torch.where(chosen_TK == index)
            gate, up = F.linear(x_TD[tokens], self.gate_up_proj[index]).chunk(2, dim=-1)
            result = F.linear(self.act_fn(gate) * up, self.down_proj[index])
            result = result * gates_TK[tokens, slots, None]
            output_TD.index_add_(0, tokens, result.to(x_TD.dtype))
        return output_TD


class _ConstantExpert(nn.Module):
    """`a1 x + a2 v` with `[a1, a2] = softmax(U x / temperature)`, in its parts."""

    def __init__(self, config: MoEPPConfig) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.zeros(config.hidden_size))
        self.wg = _FP32Linear(config.hidden_size, 2)
        self.temperature = config.constant_temperature

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a1 and a2, [T, 1] in fp32, and v, [D]."""
        mix_T2 = torch.softmax(self.wg(x_TD) / self.temperature, dim=-1)
        return mix_T2[:, :1], mix_T2[:, 1:], self.constant


# Checkpoints have two tensors for each FFN expert.
_STACKED = {"up_proj": "gate_up_proj", "down_proj": "down_proj"}


class MoEPPExperts(nn.Module):
    """The experts in their fixed order; those without FFN in closed form, without gather."""

    def __init__(self, config: MoEPPConfig) -> None:
        super().__init__()
        self.config = config
        self.ffn = _FFNExperts(config)
        # Expert ids from `num_experts` on are not its own: no row of them is multiplied.
        setattr(self.ffn, "_is_expert_parallel", True)  # noqa: B010
        ffn, constants = config.num_ffn_experts, config.num_constant_experts
        self.first_copy = ffn + constants
        self.first_zero = self.first_copy + config.num_copy_experts
        # What `load_weights` has not loaded.
        self.missing = {name: set(range(ffn)) for name, _ in self.ffn.named_parameters()}
        # Checkpoints number all experts.
        self.experts = nn.ModuleDict(
            {str(index): _ConstantExpert(config) for index in range(ffn, self.first_copy)}
        )

    def forward(self, x_TD: Tensor, gates_TK: Tensor, chosen_TK: Tensor) -> Tensor:
        """[T, D]: the selected experts' outputs, weighted and added up."""
        output_TD = self.ffn_output(x_TD, gates_TK, chosen_TK).float()
        is_copy_TK = (chosen_TK >= self.first_copy) & (chosen_TK < self.first_zero)
        scale_T1 = gates_TK.masked_fill(~is_copy_TK, 0.0).sum(-1, keepdim=True)
        for name, expert in self.experts.items():
            keep_T1, replace_T1, constant_D = expert(x_TD)
            gates_T1 = gates_TK.masked_fill(chosen_TK != int(name), 0.0).sum(-1, keepdim=True)
            output_TD = torch.addcmul(output_TD, gates_T1 * replace_T1, constant_D.float())
            scale_T1 = scale_T1 + gates_T1 * keep_T1
        return torch.addcmul(output_TD, scale_T1, x_TD.float()).to(x_TD.dtype)

    def ffn_output(self, x_TD: Tensor, gates_TK: Tensor, chosen_TK: Tensor) -> Tensor:
        """The FFN experts' part of the output."""
        is_ffn_TK = chosen_TK < self.config.num_ffn_experts
        if self.ffn.num_experts < self.config.num_ffn_experts:
            # Tensor parallelism: each rank has whole experts, whose outputs it adds up.
            weight: Any = self.ffn.gate_up_proj
            chosen_TK = chosen_TK - weight.device_mesh.get_local_rank() * self.ffn.num_experts
            is_ffn_TK = (chosen_TK >= 0) & (chosen_TK < self.ffn.num_experts)
            chosen_TK = chosen_TK.masked_fill(~is_ffn_TK, self.ffn.num_experts)
        batched = self.config._experts_implementation == "batched_mm"
        if not batched or torch.compiler.is_compiling():
            return self.ffn(x_TD, chosen_TK, gates_TK.masked_fill(~is_ffn_TK, 0.0))
        # It multiplies all rows that it gets: only those of FFN experts.
        tokens, slots = torch.where(is_ffn_TK)
        picks = chosen_TK[tokens, slots, None], gates_TK[tokens, slots, None]
        result = self.ffn(x_TD[tokens], *picks)
        return torch.zeros_like(x_TD).index_add_(0, tokens, result)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Load a checkpoint's tensors by name, and yield those of this module (vLLM asks)."""
        places, owners = self.state_dict(), {}
        for theirs, ours in _STACKED.items():
            for index, place in enumerate(places.pop("ffn." + ours)):
                name = f"experts.{index}.{theirs}.weight"
                places[name], owners[name] = place, (ours, index)
        for name, value in weights:
            place_of(name, value, places).copy_(value)
            if name not in owners:
                yield name
                continue
            ours, index = owners[name]
            self.missing[ours].discard(index)
            if not self.missing[ours]:
                yield "ffn." + ours


class MoEPPLayer(nn.Module):
    """Gate, experts, and a shared expert where the model has one."""

    def __init__(self, config: MoEPPConfig, has_residual: bool) -> None:
        super().__init__()
        self.scale = config.expert_input_scale
        self.gate = MoEPPGate(config, has_residual)
        self.experts = MoEPPExperts(config)
        self.shared_expert: nn.Module | None = None
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = Qwen2MoeMLP(config, config.shared_expert_intermediate_size)
        if config.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x_TD: Tensor, previous_TE: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output [T, D] and router logits [T, E]."""
        gates_TK, chosen_TK, logits_TE = self.gate(x_TD, previous_TE)
        # The released model scales the experts' input, not the router's.
        output_TD = self.experts(x_TD * self.scale, gates_TK, chosen_TK)
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(x_TD)
            if hasattr(self, "shared_expert_gate"):
                shared_TD = torch.sigmoid(self.shared_expert_gate(x_TD)) * shared_TD
            output_TD = output_TD + shared_TD
        return output_TD, logits_TE


class _AllHeadsRMSNorm(nn.Module):
    """RMSNorm of all heads of a token at once (OLMoE)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., n, d] of n heads to the same shape; computed in fp32."""
        flat = x.flatten(-2).float()
        if flat.shape[-1] != len(self.weight):
            raise ValueError(
                f"qk_norm_scope (all_heads) must see all heads ({len(self.weight)} channels, not "
                f"{flat.shape[-1]}); use one tensor parallel rank (vLLM: --tensor-parallel-size 1)"
            )
        normed = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed.to(x.dtype)).view_as(x)


class MoEPPDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer around a MoE layer (or a dense one)."""

    def __init__(self, config: MoEPPConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if config.moe_layers[layer_idx]:
            has_residual = any(config.moe_layers[:layer_idx])
            # Checkpoints call it `mlp.moe`.
            self.mlp = nn.ModuleDict({"moe": MoEPPLayer(config, has_residual)})
        if config.qk_norm:
            # Llama's attention with norms of queries and keys, of each head by itself.
            self.self_attn = Qwen3Attention(config, layer_idx)
        if config.qk_norm and config.qk_norm_scope == "all_heads":
            heads, groups = config.num_attention_heads, config.num_key_value_heads
            width, eps = self.self_attn.head_dim, config.rms_norm_eps
            self.self_attn.q_norm = _AllHeadsRMSNorm(heads * width, eps)
            self.self_attn.k_norm = _AllHeadsRMSNorm(groups * width, eps)
        if config.qkv_bias:
            for name in ("q_proj", "k_proj", "v_proj"):
                projection = getattr(self.self_attn, name)
                size = projection.out_features
                setattr(self.self_attn, name, nn.Linear(config.hidden_size, size, bias=True))
        self.layer_idx = layer_idx
        earlier = [index for index in range(layer_idx) if config.moe_layers[index]]
        self.previous_moe_layer = earlier[-1] if earlier else None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Same as Llama's; `router_lane` holds the logits of each MoE layer by its index.

        Gradient checkpointing runs a layer again during the backward pass, where it must read what
        it read before: every layer therefore has an entry of its own, which is written once.
        """
        lane: dict[int | None, Tensor] = kwargs.pop("router_lane")
        mlp: nn.Module = self.mlp
        residual = hidden_states
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        hidden_states = residual + attended
        x = self.post_attention_layernorm(hidden_states)
        if not isinstance(mlp, nn.ModuleDict):
            return hidden_states + mlp(x)
        output, logits = mlp["moe"](x.flatten(0, -2), lane.get(self.previous_moe_layer))
        lane.setdefault(self.layer_idx, logits)
        return hidden_states + output.view_as(hidden_states)


class _MoEPPMixin:
    config_class: type[MoEPPConfig] = MoEPPConfig
    _no_split_modules = ["MoEPPDecoderLayer"]
    # Over several devices, accelerate gives each layer a copy of what is not named here.
    _skip_keys_device_placement = [*(LlamaModel._skip_keys_device_placement or []), "router_lane"]
    # Steps of a bias are far smaller than what bf16 resolves.
    _keep_in_fp32_modules_strict = {"e_score_correction_bias"}
    # transformers caches its answer on a class; Llama's, once asked for, would be inherited.
    _can_set_experts_implementation_cached_value = True
    _can_record_outputs = {
        "hidden_states": MoEPPDecoderLayer,
        "attentions": [LlamaAttention, Qwen3Attention],
        "router_logits": OutputRecorder(MoEPPGate, index=2),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, (_FFNExperts, _FP32Linear)):
            config: Any = self.config  # type: ignore[attr-defined]
            for weight in module.parameters(recurse=False):
                init.normal_(weight, mean=0.0, std=config.initializer_range)
        elif isinstance(module, _ConstantExpert):
            init.zeros_(module.constant)
        elif hasattr(module, "e_score_correction_bias"):
            init.zeros_(module.e_score_correction_bias)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        """Same as in transformers, without the reentrant kind (ValueError)."""
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant (True) must be False: router logits reach the next layer beside the "
                "hidden states, and reentrant checkpointing would lose their gradient; pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        super()._set_gradient_checkpointing(  # type: ignore[misc]
            enable, gradient_checkpointing_func, **kwargs
        )


class MoEPPModel(_MoEPPMixin, LlamaModel):
    """The decoder without output layer."""

    def __init__(self, config: MoEPPConfig) -> None:
        refuse_unknown(config)
        # Not Llama's own: it would build Llama's layers first.
        super(LlamaModel, self).__init__(config)
        # The released model's first MoE layer has a map of previous logits that it does not use.
        # This must match no key of ours: vLLM drops all keys that it matches.
        first = list(config.moe_layers).index(1)
        unused = rf"layers\.{first}\.mlp\.moe\.gate\.gate_map\.weight"
        self._keys_to_ignore_on_load_unexpected = [unused]
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        # Without padding_idx: the padding token ends documents too, and is to be learned.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MoEPPDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @wraps(LlamaModel.forward)
    def forward(self, *args: Any, router_lane: dict[int, Tensor] | None = None, **kw: Any) -> Any:
        """Same as `LlamaModel.forward`; `router_lane` receives each MoE layer's router logits."""
        lane = {} if router_lane is None else router_lane
        return super().forward(*args, router_lane=lane, **kw)


_ARGUMENTS = [*inspect.signature(MixtralForCausalLM.forward).parameters][1:]


class MoEPPForCausalLM(_MoEPPMixin, LlamaForCausalLM):
    """The language model."""

    def __init__(self, config: MoEPPConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = MoEPPModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @wraps(MixtralForCausalLM.forward)
    def forward(self, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """Same as `MixtralForCausalLM.forward`, but for the balance loss.

        With `output_router_logits` (by default the configuration's) the output has `router_logits`,
        [T, E] fp32 for each MoE layer, and `aux_loss`, the sum of the layers' balance losses over
        the tokens of `attention_mask`, where that is [b, s]. `router_aux_loss_coef` times that is
        added to the loss.
        """
        named = dict(zip(_ARGUMENTS, args, strict=False))
        lane: dict[int, Tensor] = {}
        output = super().forward(**named, **kwargs, router_lane=lane, return_dict=True)
        kwargs |= named
        wanted = kwargs.get("output_router_logits")
        fields = dict(output)
        if self.config.output_router_logits if wanted is None else wanted:
            aux_loss = self._balance_loss(lane, kwargs.get("attention_mask"), len(output.logits))
            fields |= {"aux_loss": aux_loss, "router_logits": tuple(lane.values())}
            if output.loss is not None:
                weight = self.config.router_aux_loss_coef * _batch_share(**kwargs)
                fields["loss"] = output.loss + weight * aux_loss.to(output.loss.device)
        result = MoeCausalLMOutputWithPast(**fields)
        is_named = self.config.return_dict if return_dict is None else return_dict
        return result if is_named else result.to_tuple()

    def _balance_loss(self, lane: dict[int, Tensor], attention_mask: Any, batch: int) -> Tensor:
        """The sum of the layers' balance losses, those of a batch of sequences; scalar fp32."""
        tokens = len(next(iter(lane.values())))
        counted_T = torch.ones(tokens, dtype=torch.bool)
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            # With a cache the mask begins with tokens of earlier calls.
            counted_T = attention_mask[:, -(tokens // batch) :].flatten().bool()
        device = self.lm_head.weight.device
        layers: Any = self.model.layers
        parts = batch if self.config.balance_scope == "sequence" else 1
        total = torch.zeros((), device=device)
        for index, logits in lane.items():
            counted = counted_T.to(logits.device)
            losses = [
                layers[index].mlp.moe.gate.balance_loss(logits_tE[counts])
                for logits_tE, counts in zip(logits.chunk(parts), counted.chunk(parts), strict=True)
                if counts.any()
            ]
            if losses:
                total = total + torch.stack(losses).mean().to(device)
        return total


def _batch_share(labels: Any = None, num_items_in_batch: Any = None, **_: Any) -> Any:
    """This micro-batch's part of the tokens of a batch whose gradients are accumulated."""
    if labels is None or num_items_in_batch is None:
        return 1.0
    return (labels[..., 1:] != -100).sum() / num_items_in_batch


class MoeModel(MoEPPModel):
    """The same decoder for the released model's configuration."""

    config_class = MoeConfig


class MoeForCausalLM(MoEPPForCausalLM):
    """The same model under the released model's class name."""

    config_class = MoeConfig


for _type in (MoEPPConfig.model_type, MoeConfig.model_type):
    _converters = [
        WeightConverter(
            f".experts.experts.*.{theirs}.weight", f".experts.ffn.{ours}", [MergeModulelist()]
        )
        for theirs, ours in _STACKED.items()
    ]
    register_checkpoint_conversion_mapping(_type, _converters, overwrite=True)

__all__ = ["MoEPPForCausalLM", "MoEPPModel", "MoeForCausalLM", "MoeModel"]
