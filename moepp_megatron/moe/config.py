"""What a MoE++ layer is: the settings that megatron-core's `TransformerConfig` has no field for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

GateNormalization = Literal["none", "selected", "nonzero"]
ScoreFunction = Literal["softmax", "sigmoid"]
BalanceScope = Literal["microbatch", "sequence", "global"]
ConstantInit = Literal["normal", "zero"]
Fused = Literal["auto", True, False]

# Least standard deviation that `logits_norm_std` divides by. Logits of order 10 that are equal in
# exact arithmetic differ by this much in fp32; a token of zeros has a standard deviation of 0.
LEAST_LOGIT_STD = 1e-6


@dataclass(frozen=True)
class MoEPPConfig:
    """Settings of the MoE++ layers of one model (arXiv 2410.07348).

    Experts are ordered FFN, constant, copy, zero everywhere: in router rows, logits, gates,
    statistics and checkpoints.

    Attributes:
        num_ffn_experts: F, the experts that compute. Equals `TransformerConfig.num_moe_experts`,
            which in megatron-core sizes the experts and the expert-parallel group; the router is
            sized by `num_experts` instead.
        num_zero_experts: Experts that return 0.
        num_copy_experts: Experts that return their input.
        num_constant_experts: Experts that mix their input with a learned vector.
        router_topk: K, experts selected per token. Equals `TransformerConfig.moe_router_topk`.
        tau: Weight of the zero-computation experts in the balance loss and in the capacities; the
            smaller, the fewer selections go to FFN experts.
        balance_coeff: beta, the weight of the balance loss in the total loss.
        balance_scope: Tokens whose selections one balance loss counts: the micro-batch, each
            sequence, or the global batch. The last is refused unless
            `TransformerConfig.moe_router_load_balancing_type` is `global_aux_loss`: for that type
            megatron-core's `finalize_model_grads`, which has to end every step, starts the count
            anew. A loop that does not call it calls each router's
            `reset_global_aux_loss_tracker` between steps.
        capacity_factor: gamma of the heterogeneous capacities; None never drops a selection.
        gating_residual: Whether each router adds a learned map of the previous router's logits.
        gate_normalization: `none` keeps the scores of the selected experts; `selected` divides by
            their sum; `nonzero` first sets the gates of selected zero experts to 0.
        score_function: Softmax or sigmoid over the logits of all experts.
        expert_input_scale: Factor on the experts' input, not the router's; the released model's
            code uses K.
        constant_init: What the constant experts' vectors V start from: `normal` draws them as all
            weights, `zero` starts from zero experts that keep a part of their input.
        constant_temperature: What the constant experts' mixing logits are divided by:
            `[a1, a2] = softmax(U_c x / temperature)`; the greater, the closer to one half each.
        constants_shared: Whether all MoE layers of a model have the same V; U is each layer's own.
            The model does it (`zero_computation.share_constants`), so a layer alone has its own.
        two_layer_gate: Whether the gate is `W_b tanh(W_a x)` with hidden width 8E.
        logits_norm_std: Rescale each token's logits to this unbiased standard deviation before the
            scores are taken (the carried logits stay as they are); None leaves them. Logits with a
            smaller standard deviation than `LEAST_LOGIT_STD`, which have no direction, are divided
            by that.
        selection_bias: Whether the router holds a bias per expert [E] that is added to the scores
            for the selection alone, never to the gates (LongCat-Flash, DeepSeek-V3).
        gate_scale: Factor on all gates after normalisation (LongCat-Flash's
            `routed_scaling_factor`).
        deduplicate_dispatch: Whether the all-to-all sends a token once to each rank that holds
            experts of it, and not once to each expert
            (`TransformerConfig.moe_token_dispatcher_type` must be `alltoall`).
        fused: Whether the Triton kernels of `moepp_megatron.moe.kernels` route and combine; `auto`
            uses them where there are a GPU and Triton. The results are the same to rounding.
    """

    num_ffn_experts: int
    num_zero_experts: int = 1
    num_copy_experts: int = 1
    num_constant_experts: int = 2
    router_topk: int = 2
    tau: float = 0.75
    balance_coeff: float = 0.01
    balance_scope: BalanceScope = "microbatch"
    capacity_factor: float | None = None
    gating_residual: bool = True
    gate_normalization: GateNormalization = "none"
    score_function: ScoreFunction = "softmax"
    expert_input_scale: float = 1.0
    constant_init: ConstantInit = "normal"
    constant_temperature: float = 1.0
    constants_shared: bool = False
    two_layer_gate: bool = False
    logits_norm_std: float | None = None
    selection_bias: bool = False
    gate_scale: float = 1.0
    deduplicate_dispatch: bool = False
    fused: Fused = "auto"

    def __post_init__(self) -> None:
        """Refuse settings that no layer can be built from.

        Raises:
            ValueError: If a rule is broken; names the setting, its value, the rule and a remedy.
        """
        if self.num_ffn_experts < 1:
            raise ValueError(
                f"num_ffn_experts ({self.num_ffn_experts}) must be at least 1; use 1 or more"
            )
        for name in ("num_zero_experts", "num_copy_experts", "num_constant_experts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must not be negative; use 0")
        if not 1 <= self.router_topk <= self.num_experts:
            raise ValueError(
                f"router_topk ({self.router_topk}) must be between 1 and the number of experts "
                f"({self.num_experts}); select fewer or add experts"
            )
        if not self.tau > 0:
            raise ValueError(f"tau ({self.tau}) must be positive; the paper uses 0.75")
        if self.fused not in get_args(Fused):
            raise ValueError(f"fused ({self.fused}) is unknown; use True, False or auto")
        self._refuse_unknown_choices()
        self._refuse_wrong_factors()
        self._refuse_what_vanilla_lacks()

    def _refuse_unknown_choices(self) -> None:
        for name, choices in (
            ("gate_normalization", get_args(GateNormalization)),
            ("score_function", get_args(ScoreFunction)),
            ("balance_scope", get_args(BalanceScope)),
            ("constant_init", get_args(ConstantInit)),
        ):
            if getattr(self, name) not in choices:
                *others, last = choices
                raise ValueError(
                    f"{name} ({getattr(self, name)}) is unknown; use {', '.join(others)} or {last}"
                )

    def _refuse_wrong_factors(self) -> None:
        if not self.balance_coeff >= 0:
            raise ValueError(f"balance_coeff ({self.balance_coeff}) must not be negative; use 0")
        for name in ("expert_input_scale", "constant_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive; use 1.0")
        for name, without in (
            ("capacity_factor", "to drop nothing"),
            ("logits_norm_std", "to leave the logits"),
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} ({value}) must be positive; use None {without}")

    def _refuse_what_vanilla_lacks(self) -> None:
        if not self.is_vanilla:
            return
        for name in (
            "two_layer_gate",
            "expert_input_scale",
            "logits_norm_std",
            "deduplicate_dispatch",
        ):
            default = self.__dataclass_fields__[name].default
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be {default} without zero-computation "
                    "experts and gating residual, because that is megatron-core's MoE layer, "
                    "which lacks it; add zero-computation experts or set gating_residual"
                )

    @property
    def num_zero_computation_experts(self) -> int:
        """Z, the experts that need no FFN."""
        return self.num_zero_experts + self.num_copy_experts + self.num_constant_experts

    @property
    def num_experts(self) -> int:
        """E = F + Z, the experts that the router chooses from."""
        return self.num_ffn_experts + self.num_zero_computation_experts

    @property
    def is_vanilla(self) -> bool:
        """Whether the layer is megatron-core's own MoE layer."""
        return self.num_zero_computation_experts == 0 and not self.gating_residual

    @property
    def constant_experts(self) -> slice:
        """Columns of the constant experts among all experts."""
        return slice(self.num_ffn_experts, self.num_ffn_experts + self.num_constant_experts)

    @property
    def copy_experts(self) -> slice:
        """Columns of the copy experts among all experts."""
        start = self.constant_experts.stop
        return slice(start, start + self.num_copy_experts)

    @property
    def zero_experts(self) -> slice:
        """Columns of the zero experts among all experts."""
        return slice(self.copy_experts.stop, self.num_experts)

    @property
    def ffn_share(self) -> float:
        """Phi, the share of selections that perfect balance sends to FFN experts."""
        weight = self.tau * self.num_ffn_experts
        return weight / (weight + self.num_zero_computation_experts)

    def balance_weights(self) -> list[float]:
        """Eta of every expert in the balance loss: 1 for FFN experts, tau for the others."""
        return [1.0] * self.num_ffn_experts + [self.tau] * self.num_zero_computation_experts

    def capacities(self, num_tokens: int) -> list[int]:
        """Most selections that each expert takes from `num_tokens` tokens.

        Source: arXiv 2410.07348, expert capacity.

        Args:
            num_tokens: T, tokens of the whole micro-batch.

        Returns:
            One limit per expert, rounded up.

        Raises:
            AssertionError: If no capacity factor is set.
        """
        assert self.capacity_factor is not None, "capacities need a capacity factor"
        # Exact arithmetic on the decimals that the user wrote: floating point puts 22 at
        # 22.000000000000004, which would round up to 23.
        tau, gamma = Fraction(str(self.tau)), Fraction(str(self.capacity_factor))
        weight = tau * self.num_ffn_experts + self.num_zero_computation_experts
        per_unit = gamma * self.router_topk * num_tokens / weight
        ffn, zero_computation = math.ceil(tau * per_unit), math.ceil(per_unit)
        return [ffn] * self.num_ffn_experts + [zero_computation] * self.num_zero_computation_experts
