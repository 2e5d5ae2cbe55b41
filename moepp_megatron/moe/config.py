"""Settings of a MoE++ layer that megatron-core's `TransformerConfig` has no field for."""

import math
from dataclasses import dataclass, field

from moepp_megatron.layer_settings import DECLARED, LayerSettings

# Least standard deviation that `logits_norm_std` divides by. Logits of order 10 that are equal in
# exact arithmetic differ by this much in fp32; a token of zeros has a standard deviation of 0.
LEAST_LOGIT_STD = 1e-6


@dataclass(frozen=True, kw_only=True)
class MoEPPConfig(LayerSettings):
    """Settings of the MoE++ layers of one model (arXiv 2410.07348).

    Some of `LayerSettings` must agree with megatron-core: `num_ffn_experts` with
    `TransformerConfig.num_moe_experts`, which sizes experts and the expert-parallel group (the
    router is sized by `num_experts`), and `router_topk` with `moe_router_topk`.

    The `balance_scope` `global` requires `moe_router_load_balancing_type` to be `global_aux_loss`:
    then megatron-core's `finalize_model_grads`, which has to end every step, resets the count.
    A loop that does not call it calls each router's `reset_global_aux_loss_tracker` between steps.

    `constants_shared` is done by the model (`zero_computation.share_constants`), so a layer by
    itself has its own V.

    Attributes:
        deduplicate_dispatch: Whether the all-to-all sends a token once to each rank that holds
            experts of it, and not once to each expert
            (`TransformerConfig.moe_token_dispatcher_type` must be `alltoall`).
        static_rows: FFN rows of a rank for each selection of its tokens, in passes in which
            `MoEPPLayer.is_static`, which the training loop sets; None for no such passes. A loop
            that sets it must discard passes whose `RoutingStatistics.fill` exceeds 1.
        captures_experts: Whether passes with static rows run dispatch to combine as CUDA graphs.
    """

    num_ffn_experts: int = field(kw_only=False)
    deduplicate_dispatch: bool = False
    static_rows: float | None = None
    captures_experts: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that no layer can be built from (ValueError)."""
        self._refuse_unknown_choices()
        self._refuse_low_numbers()
        if not 1 <= self.router_topk <= self.num_experts:
            raise ValueError(
                f"router_topk ({self.router_topk}) must be between 1 and the number of experts "
                f"({self.num_experts}); select fewer or add experts"
            )
        for name, rule, remedy in self.problems():
            raise ValueError(f"{name} ({getattr(self, name)}) {rule}; {remedy}")
        self._refuse_what_vanilla_lacks()

    def _refuse_unknown_choices(self) -> None:
        for name, declared in DECLARED.items():
            if declared.choices and getattr(self, name) not in declared.choices:
                *others, last = map(str, declared.choices)
                raise ValueError(
                    f"{name} ({getattr(self, name)}) is unknown; use {', '.join(others)} or {last}"
                )

    def _refuse_low_numbers(self) -> None:
        """Hold the declared lower bounds; `router_topk` has a closer one."""
        for name, declared in DECLARED.items():
            value = getattr(self, name)
            if value is None or name == "router_topk":
                continue
            above, least = declared.says.gt, declared.says.ge
            if above is not None and not above < value < math.inf:
                rule = f"must be positive; use {declared.default}"
            elif least == 0 and not least <= value < math.inf:
                rule = "must not be negative; use 0"
            elif least and not least <= value < math.inf:
                rule = f"must be at least {least}; use {least} or more"
            else:
                continue
            raise ValueError(f"{name} ({value}) {rule}")

    def _refuse_what_vanilla_lacks(self) -> None:
        if not self.is_vanilla:
            return
        for name in (
            "two_layer_gate",
            "expert_input_scale",
            "logits_norm_std",
            "deduplicate_dispatch",
            "static_rows",
            "balance_loss",
        ):
            default = self.__dataclass_fields__[name].default
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be {default} without zero-computation "
                    "experts and gating residual, because that is megatron-core's MoE layer, "
                    "which lacks it; add zero-computation experts or set gating_residual"
                )

    def balance_weights(self) -> list[float]:
        """Eta of every expert in the balance loss: 1 for FFN experts, tau for the others."""
        return [1.0] * self.num_ffn_experts + [self.tau] * self.num_zero_computation_experts
