"""Zero, copy and constant experts, computed together in closed form on the token's own rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.distributed import distributed_data_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.experts import CONSTANT, COPY, LOCAL_KINDS, ZERO
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.gate_product import gate_product
from moepp_megatron.moe.parameter import replicated_parameter

# What `ZeroComputationExperts` adds up.
_COMPUTED = (CONSTANT, COPY, ZERO)


class Ingredients(NamedTuple):
    """Inputs of the zero-computation experts' output, for a kernel that adds more to it.

    Attributes:
        x: [T, D] their input.
        gates: [T, E] fp32 gates of all experts, 0 where not selected.
        routing_map: [T, E] bool selections.
        mixing_logits: [T, 2C] fp32, U x / temperature; None without constant experts.
        constants: [C, D] V, dtype of `x`; None without constant experts.
    """

    x: Tensor
    gates: Tensor
    routing_map: Tensor
    mixing_logits: Tensor | None
    constants: Tensor | None


class ZeroComputationExperts(MegatronModule):
    """The output of every zero-computation expert of a layer, added up.

    zero(x) = 0, copy(x) = x, constant_c(x) = a1 x + a2 v_c with [a1, a2] = softmax(U_c x)
    (arXiv 2410.07348, zero-computation experts; `MoEPPConfig.constant_temperature` divides U_c x,
    the paper's is 1). Weighted by their gates g they sum to

        s x + A V,   s = g_copy + sum_c g_c a1_c,   A_c = g_c a2_c

    so no token is gathered, sorted or sent.

    Attributes:
        constants: [C, D] V, the learned vectors; absent where another layer's are used.
        mixing_weight: [C, 2, D] U.
    """

    constants: torch.nn.Parameter
    mixing_weight: torch.nn.Parameter

    def __init__(self, config: TransformerConfig, moepp: MoEPPConfig) -> None:
        super().__init__(config)
        for kind in LOCAL_KINDS:
            assert kind in _COMPUTED or not moepp.count(kind), f"{kind.name} experts are undefined"
        self.moepp = moepp
        self._owner: ZeroComputationExperts | None = None
        for name, shape in moepp.local_weights(config.hidden_size):
            setattr(self, name, replicated_parameter(config, *shape))
        if self.starts_at_zero and config.perform_initialization:
            torch.nn.init.zeros_(self.constants)

    @property
    def vectors(self) -> Tensor:
        """[C, D] V, this layer's or the one that it shares."""
        owner = self if self._owner is None else self._owner
        return owner.constants

    def use_constants_of(self, owner: ZeroComputationExperts) -> None:
        """Replace V by that of `owner`, under whose name it is trained, reduced and saved once."""
        del self.constants
        # Past `torch.nn.Module`, which would make the owner a part of this module.
        object.__setattr__(self, "_owner", owner)

    @property
    def starts_at_zero(self) -> bool:
        """True if V is 0 before training."""
        is_zero = {"normal": False, "zero": True}[self.moepp.constant_init]
        return self.moepp.num_constant_experts > 0 and is_zero

    def forward(
        self,
        x: Tensor,
        gates: Tensor,
        addend: Tensor | None = None,
        mixing_logits: Tensor | None = None,
    ) -> Tensor | None:
        """[T, D] output of the zero-computation experts, dtype of `x`, plus `addend` [T, D].

        It is a new tensor that may be added to in place; None where there is nothing to add up.
        `mixing_logits` are [T, 2C] fp32 U x where the router has computed them
        (`Routing.mixing_logits`); None has them computed here.
        """
        moepp = self.moepp
        if moepp.num_zero_computation_experts == moepp.num_zero_experts:
            return None if addend is None else addend.clone()
        output = None
        weight_of_input = gates[:, moepp.columns(COPY)].sum(dim=-1)
        if moepp.num_constant_experts > 0:
            constant_gates = gates[:, moepp.columns(CONSTANT)]
            keep, replace = self.mixing(x, mixing_logits).unbind(dim=-1)
            weight_of_input = weight_of_input + (constant_gates * keep).sum(dim=-1)
            weight_of_constants = (constant_gates * replace).to(x.dtype)
            if addend is None:
                output = weight_of_constants @ self.vectors
            else:
                output = torch.addmm(addend, weight_of_constants, self.vectors)
        elif addend is not None:
            output = addend.clone()
        weight_of_input = (weight_of_input * moepp.expert_input_scale).to(x.dtype).unsqueeze(-1)
        # In place: a further tensor of this size would be the largest cost of these experts.
        return x * weight_of_input if output is None else output.addcmul_(x, weight_of_input)

    def ingredients(
        self, x: Tensor, gates: Tensor, routing_map: Tensor, mixing_logits: Tensor | None = None
    ) -> Ingredients | None:
        """The inputs that `forward` uses; None where there is nothing but zero experts."""
        if self.moepp.num_constant_experts > 0:
            logits = self._mixing_logits(x, mixing_logits)
            return Ingredients(x, gates, routing_map, logits, self.vectors)
        if self.moepp.num_copy_experts > 0:
            return Ingredients(x, gates, routing_map, None, None)
        return None

    def mixing(self, x: Tensor, mixing_logits: Tensor | None = None) -> Tensor:
        """[T, C, 2] fp32: how much of the input each constant expert keeps and replaces."""
        logits = self._mixing_logits(x, mixing_logits)
        pairs = logits.view(-1, self.moepp.num_constant_experts, 2)
        return torch.softmax(pairs * self.moepp.expert_input_scale, dim=-1)

    @property
    def mixing_rows(self) -> Tensor | None:
        """[2C, D] U, one row for each mixing logit; None without constant experts.

        Every pass calls this before it uses U or V, so the wait for them is here.
        """
        if self.moepp.num_constant_experts == 0:
            return None
        # The router multiplies by U and a kernel reads V, so nobody calls this module. Weights that
        # are still being gathered (overlap_param_gather) are waited for in a hook before the call.
        # megatron-core starts it by hand, too, before a graph (`call_ddp_preforward_hook`).
        for hook in self._forward_pre_hooks.values():
            if getattr(hook, "__module__", None) == distributed_data_parallel.__name__:
                hook(self)
        return self.mixing_weight.flatten(0, 1)

    def _mixing_logits(self, x: Tensor, logits: Tensor | None) -> Tensor:
        """[T, 2C] fp32, U x / temperature, without the scale of the experts' input."""
        if logits is None:
            rows = self.mixing_rows
            assert rows is not None, "only constant experts have mixing logits"
            logits = gate_product(x, rows)
        temperature = self.moepp.constant_temperature
        return logits if temperature == 1.0 else logits / temperature


def share_constants(model: torch.nn.Module) -> None:
    """Let all MoE layers of a whole model, on one pipeline stage, use the first one's V."""
    layers = [m for m in model.modules() if isinstance(m, ZeroComputationExperts)]
    owner = next(iter(layers), None)
    if owner is None or owner.moepp.num_constant_experts == 0:
        return
    for layer in layers[1:]:
        layer.use_constants_of(owner)
