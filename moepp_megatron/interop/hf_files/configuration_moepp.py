"""Configuration of a MoE++ model (arXiv 2410.07348) for transformers 5."""

from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

# Earlier ones have no experts that a caller may skip.
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 8):
    raise ImportError(
        f"transformers ({transformers.__version__}) must be at least 5.8: this model needs "
        "transformers >= 5.8; install it with `pip install 'transformers>=5.8'`"
    )


@strict
class MoEPPConfig(LlamaConfig):
    """Llama's configuration with the settings of the experts.

    Experts are ordered FFN, constant, copy, zero.

    Args:
        num_ffn_experts: Experts that compute.
        num_constant_experts: Experts that mix their input with a learned vector.
        num_copy_experts: Experts that return their input.
        num_zero_experts: Experts that return 0.
        num_experts_per_tok: Experts selected per token.
        moe_layers: For each layer, 1 for a MoE layer and 0 for a dense one; None means all 1.
        moe_intermediate_size: Inner width of an FFN expert; None means `intermediate_size`.
        shared_expert_intermediate_size: Inner width of an expert for all tokens; None: none.
        shared_expert_gate: Whether the shared expert's output is weighed by `sigmoid(w x)`.
        gating_residual: Whether a router adds a map of the previous router's logits.
        gate_normalization: `none`, `selected` (divided by their sum) or `nonzero` (a selected zero
            expert's gate is 0, the others are divided by their sum).
        score_function: `softmax`, `sigmoid` or `sqrtsoftplus`.
        expert_input_scale: Factor on the experts' input, not the router's.
        constant_temperature: Divisor of the constant experts' mixing logits.
        two_layer_gate: Whether the gate is `W_b tanh(W_a x)`.
        logits_norm_std: Standard deviation that each token's logits are scaled to, or None.
        selection_bias: Whether a bias per expert takes part in the selection, not in the gates.
        num_groups: Groups that the FFN experts are divided into.
        group_topk: Groups that a token's FFN experts come from.
        gate_scale: Factor on all gates.
        qk_norm: Whether queries and keys are normalised.
        qk_norm_scope: Channels that those norms average over: `head`, each head by itself, or
            `all_heads` of a token at once.
        qkv_bias: Whether queries, keys and values have biases.
        tau: Weight of zero-computation experts in the balance loss.
        balance_scope: Tokens that one balance loss is taken over: those of a `sequence`, or all of
            a batch (`microbatch`, `global`).
        balance_loss: `heterogeneous`, of each expert, or `grouped`, of FFN experts and the others.
        output_router_logits: Whether outputs have the router logits and the balance loss, and
            whether the loss has the latter too.
        router_aux_loss_coef: Factor on the balance loss in the loss.
        bos_token_id: Token that begins a text, or None.
        eos_token_id: Token that ends a text, or None.
        **kwargs: Same as `LlamaConfig`.
    """

    model_type = "moepp"

    num_ffn_experts: int = 8
    num_constant_experts: int = 2
    num_copy_experts: int = 1
    num_zero_experts: int = 1
    num_experts_per_tok: int = 2
    moe_layers: Any = None
    moe_intermediate_size: Any = None
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    gating_residual: bool = True
    gate_normalization: str = "none"
    score_function: str = "softmax"
    expert_input_scale: int | float = 1.0
    constant_temperature: int | float = 1.0
    two_layer_gate: bool = False
    logits_norm_std: int | float | None = None
    selection_bias: bool = False
    num_groups: int = 1
    group_topk: int = 1
    gate_scale: int | float = 1.0
    qk_norm: bool = False
    qk_norm_scope: str = "head"
    qkv_bias: bool = False
    # Llama's defaults are ordinary tokens of other vocabularies.
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tau: int | float = 0.75
    balance_scope: str = "microbatch"
    balance_loss: str = "heterogeneous"
    output_router_logits: bool = False
    router_aux_loss_coef: int | float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete what other fields decide."""
        super().__post_init__(**kwargs)
        self.moe_layers = self.moe_layers or [1] * self.num_hidden_layers
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
        # Tied embeddings have an entry already.
        plan: dict[str, str] = self.base_model_tp_plan  # type: ignore[has-type]
        inherited = {name: style for name, style in plan.items() if "layers." not in name}
        self.base_model_tp_plan = inherited | self._tensor_parallel_plan()
        if self.gating_residual:
            # Router logits do not cross the stages that servers divide a model into.
            self.base_model_pp_plan = None

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """Return the tensor-parallel plan; modules that it does not name are replicated."""
        # A norm over all heads needs the whole queries and keys.
        gathered = self.qk_norm and self.qk_norm_scope == "all_heads"
        first, last = (
            ("colwise_gather_output", "rowwise_split_input") if gathered else ("colwise", "rowwise")
        )
        plan = {f"self_attn.{name}_proj": first for name in "qkv"} | {"self_attn.o_proj": last}
        if self.qk_norm and not gathered:
            plan |= {f"self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
        mlp = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
        if 0 in self.moe_layers:
            plan |= {f"mlp.{name}": style for name, style in mlp.items()}
        if self.shared_expert_intermediate_size is not None:
            plan |= {f"mlp.moe.shared_expert.{name}": style for name, style in mlp.items()}
        plan |= {
            # Whole experts: transformers would divide stacked gate and up projections wrongly.
            "mlp.moe.experts.ffn.gate_up_proj": "grouped_gemm",
            "mlp.moe.experts.ffn.down_proj": "grouped_gemm",
            "mlp.moe.experts.ffn": "moe_tp_experts",
        }
        return {f"layers.*.{name}": style for name, style in plan.items()}

    def validate_architecture(self) -> None:
        """Accept head widths that do not divide the hidden size, unlike Llama."""

    @property
    def total_experts(self) -> int:
        """All experts: the router's width."""
        return (
            self.num_ffn_experts
            + self.num_constant_experts
            + self.num_copy_experts
            + self.num_zero_experts
        )


@strict
class MoeConfig(MoEPPConfig):
    """The released MoE++ model's configuration, by its own field names.

    Args:
        num_experts: All experts, in a list of one; the last are 2 constant, 1 copy and 1 zero.
        moe_expert_interval: Every n-th layer, counted from the n-th, is a MoE layer.
        moe_use_mixtral_gating: Softmax over the selected logits; the experts' input is not scaled.
        moe_2layer_gate: Whether the gate has two layers.
        moe_use_logits_norm: Whether logits are scaled to `moe_gate_norm_std`.
        moe_gate_norm_std: That standard deviation.
        moe_feature_no_mul_topk: Whether the experts' input is not doubled.
        **kwargs: Arguments of `MoEPPConfig`, `num_hidden_layers` in particular.
    """

    model_type = "MoE++"

    num_experts: list[int] | int = 32
    moe_expert_interval: int = 1
    moe_use_mixtral_gating: bool = False
    moe_2layer_gate: bool = True
    moe_use_logits_norm: bool = False
    moe_gate_norm_std: int | float = 1.0
    moe_feature_no_mul_topk: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive the fields of `MoEPPConfig`."""
        experts, interval = self.num_experts, self.moe_expert_interval
        self.num_experts = experts if isinstance(experts, list) else [experts]
        self.num_ffn_experts = self.num_experts[0] - 4
        self.num_constant_experts = 2
        self.num_copy_experts = self.num_zero_experts = 1
        self.num_experts_per_tok = 2
        self.moe_layers = [int((i + 1) % interval == 0) for i in range(self.num_hidden_layers)]
        mixtral = self.moe_use_mixtral_gating
        self.gate_normalization = "selected" if mixtral else "nonzero"
        self.expert_input_scale = 1.0 if mixtral or self.moe_feature_no_mul_topk else 2.0
        self.two_layer_gate = self.moe_2layer_gate
        self.logits_norm_std = self.moe_gate_norm_std if self.moe_use_logits_norm else None
        super().__post_init__(**kwargs)


__all__ = ["MoEPPConfig", "MoeConfig"]
