"""The pathway-aware router: gating residuals, selection over all experts, gates, balance loss.

Shape suffixes: T local tokens, E all experts (FFN, constant, copy, zero), K selected per token.
"""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.layer_settings import BalanceScope
from moepp_megatron.moe.balance import (
    NumTokens,
    SelectedFractions,
    attached_loss,
    local_balance_loss,
    loss_weights,
    over_group,
    tokens_of_sequences,
    tokens_over_group,
)
from moepp_megatron.moe.capacity import within_capacity
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.gate_product import gate_product
from moepp_megatron.moe.kernels import use_kernels
from moepp_megatron.moe.padding import flat_mask
from moepp_megatron.moe.parameter import replicated_parameter
from moepp_megatron.moe.router_health import RouterHealth
from moepp_megatron.moe.selection import Routing, select, standardized
from moepp_megatron.moe.statistics import BALANCE, Z_LOSS, RouterWatch, RoutingStatistics
from moepp_megatron.moe.upstream_settings import router_config

# The names under which Megatron's training loop looks for a balance loss of this scope.
_TRACKED_NAMES: dict[BalanceScope, str] = {
    "microbatch": "load_balancing_loss",
    "sequence": "seq_load_balancing_loss",
    "global": "global_load_balancing_loss",
}


class MoEPPRouter(TopKRouter):
    """Routes each token among FFN, constant, copy and zero experts.

    Keeps megatron-core's input jitter, z-loss and gating kernel. The logits are
    `z_j = W_j x + G_j z_(j-1)`: the previous MoE layer's logits come in as an argument and this
    layer's go out as a result, so nothing is stored between layers, micro-batches or recomputation.

    Args:
        config: The model's configuration; `num_moe_experts` counts FFN experts.
        pg_collection: Process groups `tp`, `cp`, `tp_cp`, `tp_dp_cp`.
        is_mtp_layer: Same as in megatron-core.
        moepp: The layer's settings.
        has_residual: False for the first MoE layer of the model, which has no layer before.

    Attributes:
        watch: Counts what this router does.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        moepp: MoEPPConfig,
        has_residual: bool = True,
    ) -> None:
        super().__init__(router_config(config, moepp), pg_collection, is_mtp_layer)
        self.moepp = moepp
        self.fused = use_kernels(moepp.fused)
        self.watch = RouterWatch(moepp, self.fused)
        self.global_fractions = SelectedFractions()
        # Not a buffer: Float16Module would round it to bf16.
        self.balance_weights = torch.tensor(
            moepp.balance_weights(), device=torch.cuda.current_device()
        )
        num_experts = moepp.num_experts
        self.residual_weight: torch.nn.Parameter | None = None
        if moepp.two_layer_gate:
            first, second = moepp.gate_shapes(config.hidden_size)
            self.weight = replicated_parameter(config, *first)
            self.output_weight = replicated_parameter(config, *second)
        if moepp.selection_bias:
            # megatron-core's name: its router keeps a buffer of this name in fp32, in checkpoints
            # too, but sets None and refuses softmax where it makes the buffer itself.
            del self.expert_bias
            self.register_buffer(
                "expert_bias", torch.zeros(num_experts, device=torch.cuda.current_device())
            )
        if moepp.gating_residual and has_residual:
            self.residual_weight = replicated_parameter(config, num_experts, num_experts)

    def forward(
        self,
        input: Tensor,
        previous_logits: Tensor | None = None,
        padding_mask: Tensor | None = None,
        tags: Tensor | None = None,
        mixing_weight: Tensor | None = None,
    ) -> Routing:
        """Route one micro-batch.

        Args:
            input: [s, b, D] hidden states of the local tokens.
            previous_logits: [s, b, E] fp32 logits of the MoE layer before, or None.
            padding_mask: [s, b] bool, True for padding (as in megatron-core), or None. Padding
                selects nothing and counts in no loss, limit or statistic; its logits are 0.
            tags: [s, b] tags from `token_tags`, by which selections are counted, or None.
            mixing_weight: [2C, D] U of the constant experts, for `Routing.mixing_logits`, or None.

        Raises:
            ValueError: If the mask has another shape.
        """
        padded = flat_mask(padding_mask, input)
        chosen = self.choose(input, previous_logits, mixing_weight, padded)
        return self.finish(chosen, padded, previous_logits, tags)

    def choose(
        self,
        input: Tensor,
        previous_logits: Tensor | None,
        mixing_weight: Tensor | None = None,
        padded: Tensor | None = None,
    ) -> Routing:
        """`forward` before `finish`: has no effect but its result, so a graph can hold it."""
        logits, mixing_logits = self.compute_logits(input, previous_logits, mixing_weight)
        return self._choose(logits, padded)._replace(mixing_logits=mixing_logits)

    def compute_logits(
        self, input: Tensor, previous_logits: Tensor | None, mixing_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, E] fp32 logits, residual included, and the mixing logits of `forward`."""
        for buffer in (self.expert_bias, self.local_tokens_per_expert):
            if buffer is not None and buffer.dtype != torch.float32:
                # Float16Module has rounded it; updates of a thousandth would be lost, and counts.
                buffer.data = buffer.data.float()
        # megatron-core adds the noise in validation too; there it would only blur the loss.
        jitters = self.training and self.config.moe_input_jitter_eps is not None
        mixing_logits = None
        in_fp64 = self.config.moe_router_dtype == "fp64"
        apart = jitters or self.bias is not None or in_fp64 or self._has_another_gate
        if mixing_weight is None or apart:
            logits = self.gating(self.apply_input_jitter(input) if jitters else input)
        else:
            logits, mixing_logits = self._joined_gating(input, mixing_weight)
        if self.residual_weight is not None:
            assert previous_logits is not None, (
                f"MoE layer {self.layer_number} has a gating residual but was given no logits of "
                "the layer before"
            )
            logits = self._add_residual(logits, previous_logits, self.residual_weight)
        return logits.contiguous(), mixing_logits

    def _joined_gating(self, input: Tensor, mixing_weight: Tensor) -> tuple[Tensor, Tensor]:
        """[s, b, E] `gating(input)` and [T, 2C] fp32 `U x`, in one product."""
        # Each of two products would turn the hidden states into fp32, forward and backward, and
        # write a gradient of them; those would then be added, rounded to bf16 each.
        if self.weight.device != input.device:
            # Initialised on the CPU; megatron-core's `gating` moves it too.
            self.weight.data = self.weight.data.to(input.device)
        rows = (self.weight.shape[0], mixing_weight.shape[0])
        joined = torch.cat([self.weight, mixing_weight])
        hidden, mixing = gate_product(input, joined).split(rows, -1)
        return self.second_layer(hidden), mixing.reshape(-1, rows[1])

    @property
    def _has_another_gate(self) -> bool:
        """True if `gating` has been replaced, which a joint product with `U` would bypass."""
        return getattr(self.gating, "__func__", None) is not MoEPPRouter.gating

    @property
    def _num_tracked(self) -> int:
        """Layers in megatron-core's tracker: the decoder's and those of multi-token prediction."""
        return int(self.config.num_layers + (self.config.mtp_num_layers or 0))

    @property
    def logits_weight(self) -> Tensor:
        """[E, ...] the matrix whose rows give the experts' logits."""
        return self.output_weight if self.moepp.two_layer_gate else self.weight

    def set_tau(self, tau: float) -> None:
        """Weigh zero-computation experts by `tau` in the balance loss from now on."""
        self.balance_weights[self.moepp.num_ffn_experts :] = tau

    @property
    def statistics(self) -> RoutingStatistics:
        """Routing counters since the last reset."""
        return self.watch.statistics

    @property
    def health(self) -> RouterHealth:
        """Health metrics, in steps that measure them."""
        return self.watch.health

    def reset_global_aux_loss_tracker(self) -> None:
        """Start a new global batch; megatron-core's `finalize_model_grads` calls this."""
        self.global_fractions.reset()

    def gating(self, input: Tensor) -> Tensor:
        """[s, b, E] logits without residual: `W x`, or `W_b tanh(W_a x)` with two layers."""
        return self.second_layer(super().gating(input))

    def second_layer(self, hidden: Tensor) -> Tensor:
        """[s, b, E] `W_b tanh(hidden)`; `hidden` [s, b, ...] itself with one layer.

        The last step of the gate in one product as in two: what changes logits from outside goes
        here.
        """
        if not self.moepp.two_layer_gate:
            return hidden
        # Not megatron-core's product, which with Transformer Engine takes no factors of two types.
        return F.linear(torch.tanh(hidden), self.output_weight.to(hidden.dtype))

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Select experts, weigh them, attach the losses, apply capacity limits.

        Args:
            logits: [s, b, E] fp32.
            padding_mask: Same as in `forward`.

        Returns:
            gates [T, E] fp32 and routing map [T, E] bool.
        """
        padded = flat_mask(padding_mask, logits)
        return self.finish(self._choose(logits, padded), padded)[:2]

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Like megatron-core's, but with the right mean where ranks have unequal padding.

        Args:
            logits: [T, E] fp32.
            padding_mask: [T] bool, True for padding, or None.
        """
        coeff = self.config.moe_z_loss_coeff
        counts = coeff is not None and RoutingStatistics.is_counting(self.training)
        if padding_mask is None or not counts:
            return super().apply_z_loss(logits)
        squares_T = torch.logsumexp(logits, dim=-1).square().masked_fill(padding_mask, 0.0)
        own_tokens = (~padding_mask).sum(dtype=torch.float32)
        num_tokens = over_group(own_tokens, self.tp_cp_group)
        self.statistics.add_loss(Z_LOSS, squares_T.sum() / own_tokens.clamp(min=1), own_tokens)
        # This rank's summand, as of the balance loss.
        loss = squares_T.sum() / num_tokens.clamp(min=1)
        get_moe_metrics_tracker().record(
            "z_loss",
            loss * self.tp_cp_group.size(),
            self.layer_number,
            self._num_tracked,
            avg_group=self.tp_dp_cp_group,
        )
        attached = attached_loss(loss, coeff, num_tokens, self.calculate_per_token_loss)
        return MoEAuxLossAutoScaler.apply(logits, attached)

    def _choose(self, logits: Tensor, padded: Tensor | None) -> Routing:
        if padded is not None:
            # So that later layers do not see those of padding.
            logits = logits.masked_fill(padded.view(*logits.shape[:2], 1), 0.0)
        logits_TE = self.apply_z_loss(logits.view(-1, self.moepp.num_experts), padded)
        logits_TE = standardized(logits_TE, self.moepp.logits_norm_std)
        num_sequences = None
        if RoutingStatistics.is_counting(self.training):
            counted_apart = {"microbatch": 1, "sequence": logits.shape[1], "global": 1}
            num_sequences = counted_apart[self.moepp.balance_scope]
        return self._select(logits_TE, num_sequences, padded)._replace(logits=logits)

    def finish(
        self,
        chosen: Routing,
        padded: Tensor | None = None,
        previous_logits: Tensor | None = None,
        tags: Tensor | None = None,
    ) -> Routing:
        """The rest of `forward`: attach the losses, apply capacity limits, let the watch count.

        Args:
            chosen: Result of `choose`.
            padded: [T] bool tokens that are padding; None for none.
            previous_logits: Same as in `forward`.
            tags: Same as in `forward`.
        """
        gates_TE, routing_map_TE, counts_SE, *_ = chosen
        num_tokens = gates_TE.shape[0] if padded is None else (~padded).sum()
        if counts_SE is not None and self.moepp.balance_coeff > 0:
            gates_TE = self._balance(chosen, padded)
        if self.moepp.capacity_factor is not None:
            routing_map_TE = within_capacity(
                gates_TE,
                routing_map_TE,
                self.moepp,
                self.tp_cp_group,
                self.cp_group.size(),
                has_padding=padded is not None,
            )
            gates_TE = gates_TE * routing_map_TE
        if counts_SE is not None and self.enable_expert_bias:
            # What L_b would have equal. megatron-core's `finalize_model_grads` moves the biases
            # by the sign of the mean less each expert's.
            self.local_tokens_per_expert += counts_SE.sum(dim=0) * self.balance_weights
        finished = chosen._replace(gates=gates_TE, routing_map=routing_map_TE)
        residual = None
        if self.residual_weight is not None and previous_logits is not None:
            residual = self.residual_weight, previous_logits
        self.watch.see(
            chosen,
            finished,
            num_tokens,
            training=self.training,
            bias=self.expert_bias,
            residual=residual,
            padded=padded,
            tags=tags,
        )
        return finished

    def _add_residual(self, logits: Tensor, previous: Tensor, weight: Tensor) -> Tensor:
        """`logits + G z_(j-1)`, [s, b, E]; the matrix product adds, so nothing is read twice."""
        num_experts = self.moepp.num_experts
        residual = previous.to(logits.dtype).reshape(-1, num_experts)
        total = torch.addmm(logits.view(-1, num_experts), residual, weight.to(logits.dtype).T)
        return total.view(logits.shape)

    def _select(
        self, logits_TE: Tensor, num_sequences: int | None, padded_T: Tensor | None
    ) -> Routing:
        arguments = (logits_TE, self.expert_bias, self.moepp, num_sequences, padded_T)
        if self.fused and logits_TE.dtype == torch.float32 and self.router_replay is None:
            from moepp_megatron.moe.kernels.router import select as fused_select

            return fused_select(*arguments)
        return select(*arguments, self.router_replay)

    def _balance(self, chosen: Routing, padded: Tensor | None) -> Tensor:
        """The gates with the gradient of this rank's summand of L_b, which is counted."""
        gates_TE, _, counts_SE, score_sums_SE, *_ = chosen
        assert counts_SE is not None, "a selection that was not counted has no balance loss"
        assert score_sums_SE is not None, "counts and sums come together"
        num_sequences = counts_SE.shape[0]
        per_sequence = tokens_of_sequences(gates_TE.shape[0], num_sequences, padded)
        seen, group = SelectedFractions(), self.tp_cp_group
        if self.moepp.balance_scope == "global":
            seen, group = self.global_fractions, self.tp_dp_cp_group
        fractions = seen.add(counts_SE, per_sequence, group)
        shared = tokens_over_group(per_sequence, self.tp_cp_group)
        weights_SE = loss_weights(fractions, self.balance_weights, self.moepp)
        loss = local_balance_loss(score_sums_SE, weights_SE, shared)
        get_moe_metrics_tracker().record(
            _TRACKED_NAMES[self.moepp.balance_scope],
            loss,
            self.layer_number,
            self._num_tracked,
            reduce_group=self.tp_cp_group,
        )
        if isinstance(shared, int):
            num_tokens: NumTokens = shared * num_sequences
            self.statistics.add_loss(BALANCE, loss)
        else:
            num_tokens = shared.sum()
            self.statistics.add_loss(BALANCE, loss, num_tokens)
        attached = attached_loss(
            loss, self.moepp.balance_coeff, num_tokens, self.calculate_per_token_loss
        )
        if self.health.enabled:
            assert chosen.logits is not None, "a router's result has its logits"
            self.health.watch_gradients(chosen.logits, attached)
        return MoEAuxLossAutoScaler.apply(gates_TE, attached)
