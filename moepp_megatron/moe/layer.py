"""The MoE++ layer: megatron-core's `MoELayer` with zero-computation experts and a residual router.

Order of operations; local work runs while tokens travel:

    route -> dispatch FFN-routed tokens ...... FFN experts -> combine ........... -> add
                  shared experts in the meantime      zero-computation experts

With the Triton kernels of `moe/kernels`, one kernel adds up all experts' outputs. Zero-computation
experts have one of their own where tokens travel, in the meantime, and where a dispatcher adds up
FFN experts' outputs by itself (`kernels.combine`).
"""

from typing import Any, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.cuda_graphs import refuse_uncapturable
from moepp_megatron.moe.dispatcher import RowDispatcher, build_dispatcher, bytes_sent
from moepp_megatron.moe.kernels import use_kernels
from moepp_megatron.moe.local_experts import CPUExperts, EngineExperts
from moepp_megatron.moe.padding import local_mask
from moepp_megatron.moe.router import MoEPPRouter
from moepp_megatron.moe.selection import Routing
from moepp_megatron.moe.static_dispatcher import StaticTokenDispatcher
from moepp_megatron.moe.statistics import RoutingStatistics, tracked_losses
from moepp_megatron.moe.upstream_private import check_upstream
from moepp_megatron.moe.upstream_settings import refuse_ignored
from moepp_megatron.moe.zero_computation import Ingredients, ZeroComputationExperts


class _CountedLayer(MoELayer):
    """megatron-core's MoE layer with the `statistics` that a run writes."""

    statistics: RoutingStatistics

    def dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Dispatch as megatron-core does and count the bytes."""
        dispatched = super().dispatch(hidden_states, probs)
        self.count_bytes(hidden_states)
        return dispatched

    def count_bytes(self, hidden_states: Tensor) -> None:
        """Count the bytes of the pass that is dispatched."""
        if RoutingStatistics.is_counting(self.training):
            self.statistics.a2a_bytes += bytes_sent(self.token_dispatcher, hidden_states)


class VanillaMoELayer(_CountedLayer):
    """megatron-core's MoE layer, bit for bit, with counts of its selections."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.statistics = RoutingStatistics(config.num_moe_experts)

    def route(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Route as megatron-core does and count the selections."""
        if padding_mask is not None:
            padding_mask = local_mask(padding_mask, hidden_states, self.config, self.attn_tp_group)
        if not RoutingStatistics.is_counting(self.training):
            return super().route(hidden_states, padding_mask)
        before = {} if padding_mask is None else tracked_losses(self.layer_number)
        probs, routing_map = super().route(hidden_states, padding_mask)
        counted, num_tokens = routing_map, routing_map.shape[0]
        if padding_mask is not None:
            # megatron-core routes padding as it does tokens; it counts in none of its losses.
            counts = ~padding_mask.reshape(-1)
            counted, num_tokens = routing_map & counts.unsqueeze(-1), counts.sum()
            for name, loss in tracked_losses(self.layer_number).items():
                self.statistics.add_loss(name, loss - before.get(name, 0.0), num_tokens)
        self.statistics.add_selection(counted.sum(dim=0), num_tokens)
        return probs, routing_map


class MoEPPLayer(_CountedLayer):
    """One MoE++ layer.

    Args:
        config: `num_moe_experts` counts FFN experts.
        submodules: Experts, shared experts and router builders (see `moepp_megatron.moe.spec`).
        layer_number: Global layer number, 1-based.
        pg_collection: Process groups; Megatron's global ones where None.
        is_mtp_layer: Same as in megatron-core.
        name: Module name.
        moepp: The MoE++ settings.

    Attributes:
        fuses: True if kernels add up the experts' outputs: where `moepp.fused` allows it and they
            compute every kind of experts that there is (`experts.ExpertKind.has_kernel`).
        is_static: Whether training passes use the buffer of `MoEPPConfig.static_rows`.

    Raises:
        ValueError: If a setting of megatron-core cannot be honoured by this layer.
    """

    router: MoEPPRouter

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        *,
        moepp: MoEPPConfig,
    ) -> None:
        check_upstream()
        refuse_ignored(config, moepp)
        refuse_uncapturable(config, moepp)
        if is_mtp_layer:
            raise ValueError(
                f"TransformerConfig.mtp_num_layers ({config.mtp_num_layers}) must come with "
                "mtp_block_spec=get_moepp_mtp_block_spec(...) and MoEPPGPTModel, because "
                "megatron-core's own MTP layers get no router logits of the layer before; use "
                "these, or None"
            )
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        self.moepp = moepp
        self.statistics = self.router.statistics
        self.token_dispatcher = build_dispatcher(
            self.num_local_experts,
            self.local_expert_indices,
            config,
            pg_collection,
            moepp.deduplicate_dispatch,
        )
        self._dynamic_dispatcher = self.token_dispatcher
        self._static_dispatcher: StaticTokenDispatcher | None = None
        self.is_static = False
        if moepp.static_rows is not None:
            self._static_dispatcher = StaticTokenDispatcher(
                config, pg_collection, moepp.static_rows
            )
            if not isinstance(self.experts, (CPUExperts, EngineExperts)):
                raise ValueError(
                    f"static_rows ({moepp.static_rows}) must be None with "
                    f"{type(self.experts).__name__}, which reads the rows of each expert on the "
                    "host; use None, or SwiGLU experts in bf16 on Hopper or newer"
                )
        self.zero_computation = ZeroComputationExperts(config, moepp)
        # Parameters are gathered and gradients reduced in the order of modules. The router uses
        # these experts' weights, so they come beside it, not a layer's FFN experts away.
        for module in ("experts", "shared_experts"):
            if module in self._modules:
                self._modules[module] = self._modules.pop(module)
        self.fuses = use_kernels(moepp.fused) and moepp.have_kernels
        # The combined schedule has its own nodes; other callers of the layer wait at once.
        self.local_first = (
            self.fuses_rows
            and self.ep_group.size() > 1
            and not config.overlap_moe_expert_parallel_comm
        )

    @property
    def fuses_rows(self) -> bool:
        """True if a kernel also sums FFN experts' rows, which not every dispatcher allows."""
        return self.fuses and isinstance(self.token_dispatcher, RowDispatcher)

    def forward(
        self,
        hidden_states: Tensor,
        previous_logits: Tensor | None = None,
        padding_mask: Tensor | None = None,
        chosen: Routing | None = None,
        tags: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            hidden_states: [s, b, D] local tokens.
            previous_logits: [s, b, E] fp32 router logits of the MoE layer before, or None.
            padding_mask: [b, s] True for padding, as in megatron-core, or None. s is that of
                `hidden_states`, or with sequence parallelism that of all tensor-parallel ranks.
                Padding selects no expert, counts in no loss, limit or statistic, returns 0, shared
                experts included, and passes on logits of 0.
            chosen: What the router chose, where it has run before (`cuda_graphs`), without padding.
            tags: [s, b] tags from `token_tags`, or None.

        Returns:
            The output [s, b, D] and this layer's router logits [s, b, E] fp32.
        """
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError(
                f"sequence_parallel ({self.config.sequence_parallel}) must be true where MoE "
                f"layers train with tensor_model_parallel_size ({self.attn_tp_group.size()}) > 1"
            )
        padding = self.padding_of(hidden_states, padding_mask)
        arguments = (hidden_states, previous_logits, padding, tags)
        if self.moe_layer_recompute and self.training:
            return self._recomputed_forward(*arguments)
        if chosen is None:
            return self._forward(*arguments)
        return self._experts(hidden_states, self.router.finish(chosen))

    def padding_of(self, hidden_states: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        """[s, b] bool, True for padding, of the local tokens; arguments as `forward`."""
        if padding_mask is None:
            return None
        return local_mask(
            padding_mask.transpose(0, 1).bool(), hidden_states, self.config, self.attn_tp_group
        )

    def _recomputed_forward(self, *arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        """Same as `_forward`, run again in the backward pass; logits go in and out of it."""
        if not (self.config.fp8 or self.config.fp4):
            return tensor_parallel.checkpoint(self._forward, False, *arguments)
        # The backward pass runs outside of the FP8 context. Transformer Engine's own function
        # enters it again, and with delayed scaling takes the scales of the first pass.
        from megatron.core.extensions.transformer_engine import te_checkpoint

        return te_checkpoint(
            self._forward,
            False,
            tensor_parallel.random.get_cuda_rng_tracker,
            self.tp_group,
            *arguments,
        )

    def _forward(
        self,
        hidden_states: Tensor,
        previous_logits: Tensor | None,
        padding: Tensor | None,
        tags: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        mixing_weight = self.zero_computation.mixing_rows
        routing = self.router(hidden_states, previous_logits, padding, tags, mixing_weight)
        return self._experts(hidden_states, routing, padding)

    def _experts(
        self, hidden_states: Tensor, routing: Routing, padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run dispatch, experts and combine."""
        assert routing.logits is not None, "a router's result has its logits"
        if self.router.health.enabled and RoutingStatistics.is_counting(self.training):
            self._measure_constants(hidden_states, routing)
        self.choose_dispatcher(routing)
        return self.combined_output(hidden_states, routing, padding), routing.logits

    def choose_dispatcher(self, routing: Routing) -> None:
        """Begin a pass with the dispatcher that it uses, and count how full static rows are."""
        self.token_dispatcher = self._dynamic_dispatcher
        if self._static_dispatcher is not None and self.training:
            routing_map = routing.routing_map[:, : self.moepp.num_ffn_experts]
            self.statistics.add_fill(self._static_dispatcher.fill(routing_map))
            if self.is_static:
                self.token_dispatcher = self._static_dispatcher

    def combined_output(
        self,
        hidden_states: Tensor,
        routing: Routing,
        padding: Tensor | None = None,
        counts: bool = True,
    ) -> Tensor:
        """[s, b, D] output of all experts; `counts` bytes that travel."""
        dispatch = self.dispatch if counts else super(_CountedLayer, self).dispatch
        dispatched, probs = dispatch(*self.ffn_input(hidden_states, routing))
        # While tokens travel to their experts and back: what needs no token to move.
        shared_output = self.shared_output(hidden_states, padding)
        expert_output, _ = self.routed_experts_compute(dispatched, probs)
        returning = self.combine(expert_output)
        if self.fuses:
            all_output = self.fused_output(returning, hidden_states, routing, shared_output)
            return all_output.view(hidden_states.shape)
        output = self.local_output(hidden_states, routing, shared_output)
        ffn_output = self.postprocess(returning, None)
        if output is None:
            return ffn_output
        output.add_(ffn_output.view_as(output))
        return output.view(hidden_states.shape)

    def _measure_constants(self, hidden_states: Tensor, routing: Routing) -> None:
        if self.moepp.num_constant_experts > 0:
            tokens = hidden_states.detach().reshape(-1, hidden_states.shape[-1])
            with torch.no_grad():
                mixing = self.zero_computation.mixing(tokens, routing.mixing_logits)
            self.router.health.add_constants(routing.gates, mixing, self.zero_computation.vectors)

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Any:
        """Refuse (ValueError): megatron-core's way to call a router cannot pass its logits on."""
        raise ValueError(
            "TransformerConfig.overlap_moe_expert_parallel_comm "
            f"({self.config.overlap_moe_expert_parallel_comm}) must run MoE++ layers through "
            "MoEPPGPTModel.build_schedule_plan, because megatron-core's own schedule plan keeps "
            "probabilities and routing map of a router and drops its logits; build the model as "
            "MoEPPGPTModel, or set it to False"
        )

    def ffn_input(self, hidden_states: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Rows for FFN experts and their gates, in the dispatcher's order: input of `dispatch`."""
        num_ffn = self.moepp.num_ffn_experts
        gates, routing_map = routing.gates[:, :num_ffn], routing.routing_map[:, :num_ffn]
        if self.moepp.expert_input_scale != 1.0:
            hidden_states = hidden_states * self.moepp.expert_input_scale
        return self.preprocess(hidden_states, gates, routing_map)

    def shared_output(self, hidden_states: Tensor, padding: Tensor | None) -> Tensor | None:
        """[s, b, D] output of the shared experts, 0 for padding [s, b]; None if there are none."""
        output = self.shared_experts_compute(hidden_states)
        if output is None or padding is None:
            return output
        return output.masked_fill(padding.unsqueeze(-1), 0.0)

    def local_output(
        self, hidden_states: Tensor, routing: Routing, addend: Tensor | None
    ) -> Tensor | None:
        """[T, D] zero-computation experts' output plus [s, b, D] `addend`; None for neither.

        With kernels and without such experts it is the addend itself, else a new tensor.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        addend = None if addend is None else addend.reshape(tokens.shape)
        if not self.fuses:
            return self.zero_computation(tokens, routing.gates, addend, routing.mixing_logits)
        zero = self._ingredients(hidden_states, routing)
        if zero is None:
            return addend
        from moepp_megatron.moe.kernels.combine import add_local

        return add_local(zero, addend, self.moepp)

    def _ingredients(self, hidden_states: Tensor, routing: Routing) -> Ingredients | None:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.zero_computation.ingredients(
            tokens, routing.gates, routing.routing_map, routing.mixing_logits
        )

    def fused_output(
        self,
        returning: Tensor,
        hidden_states: Tensor,
        routing: Routing,
        shared_output: Tensor | None,
    ) -> Tensor:
        """Output of all experts, T D numbers, added up by kernels."""
        from moepp_megatron.moe.kernels.combine import combine

        if not self.fuses_rows:
            # What is returning is there already.
            finished: Tensor = self.postprocess(returning, shared_output)
            local = self.local_output(hidden_states, routing, finished)
            return finished if local is None else local
        zero, addend = self._ingredients(hidden_states, routing), shared_output
        if self.local_first:
            zero, addend = None, self.local_output(hidden_states, routing, addend)
        if addend is not None:
            addend = addend.reshape(-1, hidden_states.shape[-1])
        rows, table = cast(RowDispatcher, self.token_dispatcher).combine_rows(returning)
        return combine(rows, table, zero, addend, self.moepp)


def moepp_layers(model: torch.nn.Module) -> list[MoEPPLayer]:
    """The MoE++ layers of a model (or model chunk), in their order."""
    return [module for module in model.modules() if isinstance(module, MoEPPLayer)]


def decoder_moepp_layers(model: torch.nn.Module) -> list[MoEPPLayer]:
    """`moepp_layers` without those of multi-token prediction, which are numbered after them."""
    return [layer for layer in moepp_layers(model) if layer.layer_number <= layer.config.num_layers]


def moe_statistics(model: torch.nn.Module) -> dict[int, RoutingStatistics]:
    """Statistics of every MoE layer of a model (or model chunk), by global layer number."""
    return {
        module.layer_number: module.statistics
        for module in model.modules()
        if isinstance(module, (MoEPPLayer, VanillaMoELayer))
    }
