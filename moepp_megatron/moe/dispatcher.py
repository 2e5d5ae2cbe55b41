"""Token dispatchers that move only what FFN experts need.

Dispatchers with an all-to-all do not wait for it: `token_dispatch` and `token_combine` only start
it and return tickets (see `exchange`), `dispatch_postprocess` and `combine_postprocess` wait.
"""

import copy
import functools
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.moe.dedup_dispatcher import DedupAlltoAllTokenDispatcher
from moepp_megatron.moe.exchange import Exchange
from moepp_megatron.moe.flex_dispatcher import FFNFlexTokenDispatcher
from moepp_megatron.moe.static_dispatcher import StaticTokenDispatcher
from moepp_megatron.moe.upstream_settings import refuse_setting


class FFNAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """All-to-all of FFN-routed tokens only: the FFN columns of the routing map and gates.

    A row of the map holds 0 to K selections, so the permuted rows are the map's sum and not T * K,
    which megatron-core's dropless path assumes.
    """

    config: TransformerConfig
    tokens_per_expert: Tensor

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        refuse_setting(config, "moe_shared_expert_overlap", type(self).__name__)
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection)
        # megatron-core moves this after the permutation where `preprocess` is captured in a CUDA
        # graph, and its "local" graphs claim to whenever the router is. Here it never is.
        self.cuda_dtoh_point = "before_permutation_1"
        # The combined schedule frees what has been sent as soon as the call returns.
        self._waits_at_once = config.overlap_moe_expert_parallel_comm
        self._given_config = self.config
        # Whether all rows come from this rank, which has them in order of experts.
        self._is_single_rank = self.ep_size * self.tp_size == 1

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Same as in megatron-core: rows [rows, D] and gates [rows] in order of experts."""
        self.config = self._given_config
        return super().dispatch_preprocess(hidden_states, routing_map, probs)

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """[local experts] int64 tokens of each, known on the host before the permutation."""
        tokens_per_expert = super().preprocess(routing_map)
        if not self.drop_and_pad:
            # The number of permuted rows, which they add up to, has to be a Python number by then.
            self.cuda_sync_point = "before_permutation_1"
        return tokens_per_expert

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: Tensor | None = None
    ) -> Tensor:
        tokens_per_expert = super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        if point == "before_permutation_1" and not self.drop_and_pad:
            counts = tokens_per_expert if self.input_splits is None else self.input_splits
            assert counts is not None, "preprocess has counted the rows"
            self.num_out_tokens = int(counts.sum())
            if self.num_out_tokens == 0:
                self.config = _without_fusion(self.config)
        return tokens_per_expert

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send rows [rows, D] and gates [rows] to their experts' ranks; returns tickets.

        With `overlap_moe_expert_parallel_comm` it returns the received rows and gates.
        """
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_ep_alltoall", self.tokens_per_expert
        )
        self._outbound = [self._exchange(back=False) for _ in range(2)]
        rows, gates = self._outbound
        # Collectives of a group run in the order they began: the small one need not wait.
        gates_ticket = gates.begin(probs)
        rows_ticket = rows.begin(hidden_states)
        if self._waits_at_once:
            return rows.end(rows_ticket), gates.end(gates_ticket)
        return rows_ticket, gates_ticket

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Wait for rows and gates, given their tickets; then as in megatron-core."""
        if self._is_single_rank:
            # megatron-core would copy each expert's rows to where they are already.
            return hidden_states, self.tokens_per_expert, probs
        if not self._waits_at_once:
            rows, gates = self._outbound
            hidden_states, probs = rows.end(hidden_states), gates.end(probs)
        return super().dispatch_postprocess(hidden_states, probs)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Same as in megatron-core."""
        return hidden_states if self._is_single_rank else super().combine_preprocess(hidden_states)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Send the experts' outputs back; returns a ticket, or as in `token_dispatch`."""
        self._inbound = self._exchange(back=True)
        ticket = self._inbound.begin(hidden_states)
        return self._inbound.end(ticket) if self._waits_at_once else ticket

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Wait for the experts' outputs, given their ticket; then as in megatron-core."""
        if not self._waits_at_once:
            hidden_states = self._inbound.end(hidden_states)
        return super().combine_postprocess(hidden_states)

    def combine_rows(self, ticket: Tensor) -> tuple[Tensor, Tensor]:
        """[R, D] outputs, and [T, slots] int32 indices of each token's, for `kernels.combine`.

        Replaces `combine_postprocess`, which adds up a token's outputs.
        """
        from moepp_megatron.moe.kernels.rows import rows_of_tokens

        slots = min(self.config.moe_router_topk, self.num_experts)
        if self.config.moe_router_padding_for_quantization:
            # Rows that fill an expert's batch are tokens that did not select it.
            slots = self.num_experts
        table = rows_of_tokens(self.routing_map, slots)
        return (ticket if self._waits_at_once else self._inbound.end(ticket)), table

    def _exchange(self, back: bool) -> Exchange:
        """All-to-all of one row per selection, towards the experts or back."""
        out, home = self.input_splits, self.output_splits
        # megatron-core leaves the splits alone where there is one rank, and where every expert gets
        # as many rows (`moe_pad_expert_input_to_capacity`).
        if self.ep_size == 1:
            out, home = [], []
        elif self.drop_and_pad:
            out = home = [self.num_out_tokens // self.ep_size] * self.ep_size
        return Exchange(self.ep_group, home, out) if back else Exchange(self.ep_group, out, home)


class _FFNAllGatherTokenDispatcher(MoEAllGatherTokenDispatcher):
    """All-gather that also works on a rank whose experts no token selected."""

    # Rows are gathered into a new tensor. megatron-core gathers them into its global buffer `mpu`,
    # which every tensor-parallel layer with sequence parallelism overwrites, and a shared expert
    # does so while the rows are still to be read.

    config: TransformerConfig
    routing_map: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given_config = self.config

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Same as in megatron-core: the rows, gates and routing map of all ranks of the group."""
        if self.tp_size * self.ep_size == 1:
            return hidden_states, probs
        gather = functools.partial(gather_from_sequence_parallel_region, group=self.tp_ep_group)
        with torch.no_grad():
            self.routing_map = gather(self.routing_map)
        return gather(hidden_states), gather(probs)

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Same as in megatron-core: [rows, D] rows, [local experts] counts, [rows] gates."""
        self.config = self._given_config
        if self.config.moe_permute_fusion:
            local_columns = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
            # The rows are counted on the host anyway, so waiting for the map costs nothing.
            if not self.routing_map[:, local_columns].any():
                self.config = _without_fusion(self.config)
        return super().dispatch_postprocess(hidden_states, probs)


def _without_fusion(config: TransformerConfig) -> TransformerConfig:
    """The configuration of a pass in which no row is permuted, which TE's fused kernels refuse."""
    plain = copy.copy(config)
    plain.moe_permute_fusion = False
    return plain


# Those that have the experts' outputs as rows before they add them up.
RowDispatcher = FFNAlltoAllTokenDispatcher | DedupAlltoAllTokenDispatcher | StaticTokenDispatcher


# What `TransformerConfig.moe_token_dispatcher_type` may name; below, with `deduplicate_dispatch`.
DISPATCHERS: dict[str, type[MoETokenDispatcher]] = {
    "alltoall": FFNAlltoAllTokenDispatcher,
    "allgather": _FFNAllGatherTokenDispatcher,
    "flex": FFNFlexTokenDispatcher,
}
DEDUPLICATING: dict[str, type[MoETokenDispatcher]] = {"alltoall": DedupAlltoAllTokenDispatcher}


def build_dispatcher(
    num_local_experts: int,
    local_expert_indices: list[int],
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
    deduplicate: bool,
) -> MoETokenDispatcher:
    """The FFN-only dispatcher that `config.moe_token_dispatcher_type` names.

    With `deduplicate` the all-to-all sends a token once to each rank (`dedup_dispatcher`).

    Raises:
        ValueError: If the dispatcher cannot carry FFN-only routing or cannot deduplicate.
        ImportError: If flex is asked for without its package.
    """
    name = config.moe_token_dispatcher_type
    if name not in DISPATCHERS:
        raise ValueError(
            f"moe_token_dispatcher_type ({name}) must be one that carries FFN-only routing; use "
            + " or ".join(DISPATCHERS)
        )
    if deduplicate and name not in DEDUPLICATING:
        known = " or ".join(DEDUPLICATING)
        raise ValueError(
            f"moe_token_dispatcher_type ({name}) must be {known} with deduplicate_dispatch "
            f"(True); use {known}"
        )
    return (DEDUPLICATING if deduplicate else DISPATCHERS)[name](
        num_local_experts, local_expert_indices, config=config, pg_collection=pg_collection
    )


def bytes_sent(dispatcher: MoETokenDispatcher, hidden: Tensor) -> int | Tensor:
    """Bytes of hidden vectors that this rank sends to others for one forward pass.

    Counts dispatch and combine over the expert-parallel group, after both have begun. All-to-all:
    the split sizes, of selections or copies. All-gather: every local token to every other rank and
    back. Flex: one copy of a token per rank that it needs, and back, counted where the token
    starts, so only the sum over ranks is exact; then a scalar on the device. Not counted are gates
    (4 bytes per selection) and the deduplicated dispatcher's maps (a byte per copy and expert).
    """
    row = hidden.shape[-1] * hidden.element_size()
    if isinstance(dispatcher, StaticTokenDispatcher):
        return 2 * (dispatcher.ep_size - 1) * dispatcher.rows_to_peer * row
    if isinstance(dispatcher, (MoEAlltoAllTokenDispatcher, DedupAlltoAllTokenDispatcher)):
        out, home = dispatcher.input_splits, dispatcher.output_splits
        if dispatcher.ep_size == 1 or out is None or home is None:
            return 0
        rank = dispatcher.ep_rank
        return int(sum(out) - out[rank] + sum(home) - home[rank]) * row
    if isinstance(dispatcher, MoEAllGatherTokenDispatcher):
        others = dispatcher.tp_size * dispatcher.ep_size - 1
        return 2 * hidden[..., 0].numel() * others * row
    if isinstance(dispatcher, MoEFlexTokenDispatcher):
        return 2 * _vectors_sent(dispatcher) * row
    raise TypeError(f"no byte count is defined for {type(dispatcher).__name__}")


def _vectors_sent(dispatcher: MoEFlexTokenDispatcher) -> Tensor:
    """Hidden vectors that this rank sends by flex, also of a vanilla layer; stays on the device."""
    manager: Any = dispatcher._comm_manager
    group = manager.group
    if dispatcher.config.moe_flex_dispatcher_backend == "deepep":
        is_used = manager.token_indices >= 0
        targets = (manager.token_indices // manager.num_local_experts).masked_fill(~is_used, 0)
        reached = torch.zeros(targets.shape[0], group.size(), device=targets.device)
        reached.scatter_add_(1, targets, is_used.to(reached.dtype))
    else:
        routing_map = manager.routing_map
        reached = routing_map.view(routing_map.shape[0], group.size(), -1).sum(dim=-1)
    reached[:, group.rank()] = 0
    return (reached > 0).sum()
