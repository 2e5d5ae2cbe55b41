"""The settings of a MoE++ layer, declared once: name, type, default, bounds, unit, meaning.

`moe.config.MoEPPConfig` is what the layer is built from and `config.schema.MoESection` what a user
writes; both have these fields. Imports no torch and nothing of this package but `experts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from moepp_megatron.experts import CONSTANT, ExpertKind, ExpertLayout, Setting

GateNormalization = Literal["none", "selected", "nonzero"]
ScoreFunction = Literal["softmax", "sigmoid", "sqrtsoftplus"]
BalanceScope = Literal["microbatch", "sequence", "global"]
BalanceLoss = Literal["heterogeneous", "grouped"]
# By the names of Megatron's `moe_router_load_balancing_type`.
SCOPES: dict[str, BalanceScope] = {
    "aux_loss": "microbatch",
    "seq_aux_loss": "sequence",
    "global_aux_loss": "global",
}
BALANCE_TYPES = {scope: kind for kind, scope in SCOPES.items()}
ConstantInit = Literal["normal", "zero"]
Fused = Literal["auto", True, False]


@dataclass(frozen=True, kw_only=True)
class LayerSettings(ExpertLayout):
    """Experts, router and balance of MoE++ layers (arXiv 2410.07348)."""

    tau: Annotated[
        float,
        Setting(
            "1",
            "Weight of zero-computation experts in the balance loss; less tau, less FFN",
            exported=True,
            gt=0.0,
            le=10.0,
        ),
    ] = 0.75
    balance_coeff: Annotated[
        float, Setting("1", "Coefficient beta of the balance loss; 0 turns it off", ge=0.0)
    ] = 0.01
    balance_scope: Annotated[
        BalanceScope, Setting("-", "Tokens that one balance loss is taken over")
    ] = "microbatch"
    balance_loss: Annotated[
        BalanceLoss,
        Setting(
            "-",
            "Balance each expert (the paper's), or only FFN against zero-computation experts "
            "(ZEDA's grouped_aux_loss)",
            extension=True,
        ),
    ] = "heterogeneous"
    capacity_factor: Annotated[
        float | None,
        Setting(
            "1",
            "Capacity gamma, the limit over the balanced load; null drops no token",
            gt=0.0,
            le=64.0,
        ),
    ] = None
    gate_normalization: Annotated[
        GateNormalization,
        Setting(
            "-",
            "Gates: raw scores, divided by their sum over the selected experts, or over the "
            "selected experts other than zero experts",
            exported=True,
        ),
    ] = "none"
    score_function: Annotated[
        ScoreFunction,
        Setting(
            "-",
            "From router logits of all experts to scores; sqrtsoftplus: the root of log(1 + e^z)",
            exported=True,
        ),
    ] = "softmax"
    expert_input_scale: Annotated[
        float,
        Setting(
            "1",
            "Factor on the experts' input, not the router's (released code: K)",
            exported=True,
            extension=True,
            gt=0.0,
        ),
    ] = 1.0
    constant_init: Annotated[
        ConstantInit,
        Setting(
            "-",
            "Initial vectors of constant experts: drawn as all weights, or 0",
            extension=True,
            kind=CONSTANT,
        ),
    ] = "normal"
    constant_temperature: Annotated[
        float,
        Setting(
            "1",
            "Divides the logits with which constant experts mix input and vector",
            exported=True,
            extension=True,
            kind=CONSTANT,
            gt=0.0,
        ),
    ] = 1.0
    # Logits with a smaller deviation than `LEAST_LOGIT_STD`, which have no direction, are divided
    # by that. The carried logits stay as they are.
    logits_norm_std: Annotated[
        float | None,
        Setting(
            "1",
            "Standardise each token's logits and scale them to this deviation; null: off",
            exported=True,
            extension=True,
            gt=0.0,
        ),
    ] = None
    selection_bias: Annotated[
        bool,
        Setting(
            "-",
            "Keep a bias per expert that is added to the scores only for the selection",
            exported=True,
            extension=True,
        ),
    ] = False
    num_groups: Annotated[
        int,
        Setting(
            "groups",
            "Groups that FFN experts are divided into in their order, such as nodes; 1: none",
            exported=True,
            extension=True,
            ge=1,
        ),
    ] = 1
    group_topk: Annotated[
        int,
        Setting(
            "groups",
            "Groups that a token's FFN experts come from (group-limited routing, DeepSeek-V3)",
            exported=True,
            extension=True,
            ge=1,
        ),
    ] = 1
    gate_scale: Annotated[
        float,
        Setting(
            "1",
            "Factor on all gates after normalisation (LongCat-Flash)",
            exported=True,
            extension=True,
            gt=0.0,
        ),
    ] = 1.0
    fused: Annotated[
        Fused,
        Setting(
            "-",
            "Triton kernels for routing and combining: true, false, or auto, where there is a GPU "
            "and Triton",
            extension=True,
        ),
    ] = "auto"

    @property
    def ffn_share(self) -> float:
        """Phi, the share of selections that perfect balance sends to FFN experts."""
        return self.phi(self.tau)

    @property
    def limits_groups(self) -> bool:
        """True if a token's FFN experts may come only from some of the groups."""
        return self.group_topk < self.num_groups

    def problems(self, prefix: str = "") -> Iterator[tuple[str, str, str]]:
        """Name, rule and remedy of each setting of gates and groups that cannot be.

        Other settings are named with the prefix.
        """
        if self.router_topk == 1 and self.gate_normalization != "none":
            yield (
                "gate_normalization",
                f"must be none when {prefix}router_topk is 1, because one gate divided by itself "
                "is 1 and gives the router no gradient",
                f"use none, or set {prefix}router_topk to 2 or more",
            )
        ffn, groups, kept = self.num_ffn_experts, self.num_groups, self.group_topk
        if ffn % groups:
            yield (
                "num_groups",
                f"must divide {prefix}num_ffn_experts ({ffn}), because groups are equally large",
                "use a divisor of it, or 1 for no groups",
            )
        elif kept > groups:
            yield (
                "group_topk",
                f"must be at most {prefix}num_groups ({groups})",
                f"use {groups} or less",
            )
        elif not self.limits_groups:
            return
        elif kept > self.router_topk:
            yield (
                "group_topk",
                f"must be at most {prefix}router_topk ({self.router_topk}), because a token has at "
                "most one group for each of its experts",
                f"use {self.router_topk} or less",
            )
        elif self.router_topk > kept * ffn // groups:
            yield (
                "group_topk",
                f"must leave at least {prefix}router_topk ({self.router_topk}) FFN experts, and "
                f"{kept} of {groups} groups have {kept * ffn // groups}",
                f"use more, or fewer {prefix}num_groups",
            )


class _Declared(NamedTuple):
    """One declaration of `LayerSettings`."""

    type: Any
    says: Setting
    default: Any

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values that it may have, where they are counted up."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()


DECLARED: Mapping[str, _Declared] = {
    name: _Declared(hint.__origin__, hint.__metadata__[0], getattr(LayerSettings, name))
    for name, hint in get_type_hints(LayerSettings, include_extras=True).items()
}
EXPORTED = tuple(name for name, declared in DECLARED.items() if declared.says.exported)
"""Settings that an exported model has under the same name."""
EXTENSIONS = tuple(name for name, declared in DECLARED.items() if declared.says.extension)
"""Settings of which the vanilla baseline and older exports have the defaults."""


def static_rows(rows_per_selection: float, topk: int, num_tokens: int, num_ranks: int = 1) -> int:
    """FFN rows that a rank with `num_tokens` may send to each of `num_ranks` with static rows.

    `rows_per_selection` is `moe.static_rows` times the target of the FFN share.
    """
    # Exact arithmetic on decimals, as with capacities.
    rows = Fraction(str(rows_per_selection)) * topk * num_tokens / num_ranks
    return min(math.ceil(rows), topk * num_tokens)


def settings_of(kind: ExpertKind) -> tuple[str, ...]:
    """The settings that belong to a kind of experts, without which they have no effect."""
    return tuple(name for name, declared in DECLARED.items() if declared.says.kind is kind)
