"""Section `moe`: experts and routing of MoE++ (arXiv 2410.07348)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moepp_megatron.config.schema.budget import BudgetSection
from moepp_megatron.config.schema.section import Section, Unit
from moepp_megatron.layer_settings import LayerSettings


# mypy does not see that a section is frozen.
class MoESection(Section, LayerSettings):  # type: ignore[misc]
    """Experts, router, balance: the layer's settings, and what surrounds the layer."""

    z_loss_coeff: Annotated[float | None, Unit("1"), Field(ge=0.0)] = None
    """Coefficient of the router z-loss; null: off"""
    input_jitter_eps: Annotated[float | None, Unit("1"), Field(ge=0.0, lt=1.0)] = None
    """Half width of the uniform noise factor on the router's input; null: off"""
    bias_update_rate: Annotated[float, Unit("1"), Field(ge=0.0)] = 0.0
    """Step by which the selection bias of each expert moves after every batch, up where its load is
    below the mean and down where it is above (aux-loss-free balancing, DeepSeek-V3: 0.001); 0: it
    stays. Needs scores other than softmax, as in megatron-core"""
    dispatcher: Annotated[Literal["alltoall", "alltoall_dedup", "allgather", "flex"], Unit("-")] = (
        "alltoall"
    )
    """Token dispatcher of FFN experts (alltoall_dedup: a token goes once to each rank; flex: DeepEP
    or HybridEP)"""
    flex_backend: Annotated[Literal["auto", "deepep", "hybridep"], Unit("-")] = "auto"
    """Library of the flex dispatcher; auto takes DeepEP, or else HybridEP"""
    flex_num_sms: Annotated[int | None, Unit("multiprocessors"), Field(ge=2)] = None
    """Multiprocessors that the flex dispatcher's kernels occupy; null: 20 with DeepEP, HybridEP's
    own choice"""
    cutlass_grouped_gemm: Annotated[bool, Unit("-")] = False
    """Let one CUTLASS kernel multiply all FFN experts of a rank, in bf16 on Hopper (Transformer
    Engine; the weights' gradients stay with cuBLAS), in place of a cuBLAS product each"""
    layer_freq: Annotated[int | list[int], Unit("layers")] = 1
    """MoE layers: every n-th layer from the first, or one 0 or 1 per layer"""
    ffn_hidden_size: Annotated[int | None, Unit("channels"), Field(ge=1)] = None
    """Inner width of an FFN expert; null means model.ffn_hidden_size"""
    shared_expert_ffn_hidden_size: Annotated[int | None, Unit("channels"), Field(ge=1)] = None
    """Inner width of an expert that every token takes; null: none"""
    shared_expert_gate: Annotated[bool, Unit("-")] = False
    """Weigh what the shared expert returns by sigmoid(w x) with a learned w (Qwen2)"""

    budget: BudgetSection = BudgetSection()
    """FFN experts per token, held during training"""

    @model_validator(mode="after")
    def _bias_of_its_controller(self) -> MoESection:
        """Switch on the selection bias that the budget's controller moves."""
        # It does not count as given by the user, so that it goes with the controller.
        if self.budget.held_by == "bias" and self.num_zero_computation_experts > 0:
            object.__setattr__(self, "selection_bias", True)
        return self

    @property
    def ffn_share(self) -> float:
        """Fraction of selections that go to FFN experts: the budget's, or else phi.

        Phi is what perfect balance under `tau` gives (arXiv 2410.07348).
        """
        if self.budget.target_ffn_per_token is not None:
            return self.budget.target_ffn_per_token / self.router_topk
        return self.phi(self.tau)

    @property
    def balanced_tau(self) -> float:
        """The tau under which perfect balance gives `ffn_share`."""
        share = self.ffn_share
        if self.budget.target_ffn_per_token is None or share >= 1.0:
            return self.tau
        return self.tau_for(share)

    def moe_layer_pattern(self, num_layers: int) -> list[bool]:
        """For each of `num_layers` layers, whether it is an MoE layer.

        It has the meaning of megatron-core's `moe_layer_freq`: an integer n makes layers 0, n, 2n,
        ... MoE layers.
        """
        if isinstance(self.layer_freq, int):
            return [layer % self.layer_freq == 0 for layer in range(num_layers)]
        return [bool(flag) for flag in self.layer_freq]
