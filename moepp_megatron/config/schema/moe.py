"""Section `moe`: experts and routing of MoE++ (arXiv 2410.07348)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moepp_megatron.config.schema.budget import BudgetSection
from moepp_megatron.config.schema.section import Section, unit


class MoESection(Section):
    """Settings of experts, router and balance.

    Expert order is fixed everywhere: FFN experts, constant, copy, zero.
    """

    num_ffn_experts: int = Field(
        default=8, ge=1, description="FFN experts F", json_schema_extra=unit("experts")
    )
    num_zero_experts: int = Field(
        default=1, ge=0, description="Experts that return 0", json_schema_extra=unit("experts")
    )
    num_copy_experts: int = Field(
        default=1,
        ge=0,
        description="Experts that return their input",
        json_schema_extra=unit("experts"),
    )
    num_constant_experts: int = Field(
        default=2,
        ge=0,
        description="Experts that mix their input with a learned vector",
        json_schema_extra=unit("experts"),
    )
    router_topk: int = Field(
        default=2,
        ge=1,
        description="Experts selected per token, K",
        json_schema_extra=unit("experts"),
    )
    tau: float = Field(
        default=0.75,
        gt=0.0,
        le=10.0,
        description="Weight of zero-computation experts in the balance loss; less tau, less FFN",
        json_schema_extra=unit("1"),
    )
    balance_coeff: float = Field(
        default=0.01,
        ge=0.0,
        description="Coefficient beta of the balance loss; 0 turns it off",
        json_schema_extra=unit("1"),
    )
    balance_scope: Literal["microbatch", "sequence", "global"] = Field(
        default="microbatch",
        description="Tokens that one balance loss is taken over",
        json_schema_extra=unit("-"),
    )
    capacity_factor: float | None = Field(
        default=None,
        gt=0.0,
        description="Capacity gamma, the limit over the balanced load; null drops no token",
        json_schema_extra=unit("1"),
    )
    gating_residual: bool = Field(
        default=True,
        description="Add a learned map of the previous MoE layer's logits to the router's",
        json_schema_extra=unit("-"),
    )
    gate_normalization: Literal["none", "selected", "nonzero"] = Field(
        default="none",
        description="Gates: raw scores, divided by their sum over the selected experts, or over "
        "the selected experts other than zero experts",
        json_schema_extra=unit("-"),
    )
    score_function: Literal["softmax", "sigmoid"] = Field(
        default="softmax",
        description="From router logits to scores",
        json_schema_extra=unit("-"),
    )
    expert_input_scale: float = Field(
        default=1.0,
        gt=0.0,
        description="Factor on the experts' input, not the router's (released code: K)",
        json_schema_extra=unit("1"),
    )
    constant_init: Literal["normal", "zero"] = Field(
        default="normal",
        description="Initial vectors of constant experts: drawn as all weights, or 0",
        json_schema_extra=unit("-"),
    )
    constant_temperature: float = Field(
        default=1.0,
        gt=0.0,
        description="Divides the logits with which constant experts mix input and vector",
        json_schema_extra=unit("1"),
    )
    constants_shared: bool = Field(
        default=False,
        description="All MoE layers have the same vectors of constant experts",
        json_schema_extra=unit("-"),
    )
    two_layer_gate: bool = Field(
        default=False,
        description="Router W_b tanh(W_a x) with hidden width 8E, as in the released model",
        json_schema_extra=unit("-"),
    )
    logits_norm_std: float | None = Field(
        default=None,
        gt=0.0,
        description="Standardise each token's logits and scale them to this deviation; null: off",
        json_schema_extra=unit("1"),
    )
    selection_bias: bool = Field(
        default=False,
        description="Keep a bias per expert that is added to the scores for the selection alone",
        json_schema_extra=unit("-"),
    )
    gate_scale: float = Field(
        default=1.0,
        gt=0.0,
        description="Factor on all gates after normalisation (LongCat-Flash)",
        json_schema_extra=unit("1"),
    )
    z_loss_coeff: float | None = Field(
        default=None,
        ge=0.0,
        description="Coefficient of the router z-loss; null: off",
        json_schema_extra=unit("1"),
    )
    input_jitter_eps: float | None = Field(
        default=None,
        ge=0.0,
        lt=1.0,
        description="Half width of the uniform noise factor on the router's input; null: off",
        json_schema_extra=unit("1"),
    )
    dispatcher: Literal["alltoall", "alltoall_dedup", "allgather", "flex"] = Field(
        default="alltoall",
        description="How FFN-routed tokens reach their experts (alltoall_dedup: a token goes once "
        "to each rank; flex: DeepEP or HybridEP)",
        json_schema_extra=unit("-"),
    )
    fused: Literal["auto", True, False] = Field(
        default="auto",
        description="Triton kernels for routing and combining: true, false, or auto, where there "
        "is a GPU and Triton",
        json_schema_extra=unit("-"),
    )
    flex_backend: Literal["auto", "deepep", "hybridep"] = Field(
        default="auto",
        description="What the flex dispatcher runs on; auto takes DeepEP, or else HybridEP",
        json_schema_extra=unit("-"),
    )
    flex_num_sms: int | None = Field(
        default=None,
        ge=2,
        description="Multiprocessors that the flex dispatcher's kernels occupy; null: 20 with "
        "DeepEP, HybridEP's own choice",
        json_schema_extra=unit("multiprocessors"),
    )
    layer_freq: int | list[int] = Field(
        default=1,
        description="MoE layers: every n-th layer from the first, or one 0 or 1 per layer",
        json_schema_extra=unit("layers"),
    )
    ffn_hidden_size: int | None = Field(
        default=None,
        ge=1,
        description="Inner width of an FFN expert; null means model.ffn_hidden_size",
        json_schema_extra=unit("channels"),
    )
    shared_expert_ffn_hidden_size: int | None = Field(
        default=None,
        ge=1,
        description="Inner width of an expert that every token takes; null: none",
        json_schema_extra=unit("channels"),
    )
    shared_expert_gate: bool = Field(
        default=False,
        description="Weigh what the shared expert returns by sigmoid(w x) with a learned w (Qwen2)",
        json_schema_extra=unit("-"),
    )

    budget: BudgetSection = Field(
        default_factory=BudgetSection, description="FFN experts a token, held during training"
    )

    @property
    def num_zero_computation_experts(self) -> int:
        """Zero, copy and constant experts together, Z."""
        return self.num_zero_experts + self.num_copy_experts + self.num_constant_experts

    @property
    def num_experts(self) -> int:
        """All experts, E = F + Z: the router's width."""
        return self.num_ffn_experts + self.num_zero_computation_experts

    @property
    def ffn_share(self) -> float:
        """Fraction of selections that go to FFN experts: the budget's, or else phi.

        Phi is what perfect balance under `tau` gives (arXiv 2410.07348).
        """
        if self.budget.target_ffn_per_token is not None:
            return self.budget.target_ffn_per_token / self.router_topk
        weighted_ffn = self.tau * self.num_ffn_experts
        return weighted_ffn / (weighted_ffn + self.num_zero_computation_experts)

    @property
    def balanced_tau(self) -> float:
        """The tau under which perfect balance gives `ffn_share`."""
        share = self.ffn_share
        if self.budget.target_ffn_per_token is None or share >= 1.0:
            return self.tau
        return share * self.num_zero_computation_experts / (self.num_ffn_experts * (1.0 - share))

    @property
    def is_vanilla(self) -> bool:
        """Whether this is megatron-core's own MoE: no zero-computation expert, no residual."""
        return self.num_zero_computation_experts == 0 and not self.gating_residual

    def moe_layer_pattern(self, num_layers: int) -> list[bool]:
        """For each of `num_layers` layers, whether it is an MoE layer.

        It has the meaning of megatron-core's `moe_layer_freq`: an integer n makes layers 0, n, 2n,
        ... MoE layers.
        """
        if isinstance(self.layer_freq, int):
            return [layer % self.layer_freq == 0 for layer in range(num_layers)]
        return [bool(flag) for flag in self.layer_freq]
