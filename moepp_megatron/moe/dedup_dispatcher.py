"""An all-to-all that sends a token at most once to each rank.

Experts of one token often live on one rank. The plain dispatcher then sends that rank the same
vector once per expert and gets one vector per expert back. This one works in two levels, which
mirror each other around the experts:

    tokens    [T, D]                                         output  [T, D]
      |  one copy per rank with an expert of the token         ^  sum over the token's copies
    copies    [C, D]                                         sums    [C, D]
      |  all-to-all: a copy travels                            ^  all-to-all: one vector returns
    copies    [C', D]                                        sums    [C', D]
      |  one selection per expert of the rank                  ^  sum over the copy's selections
    batch     [S', D]  ---->  FFN experts, times gates  ---->  outputs [S', D]

The experts see bit for bit the batch of the plain dispatcher. Only the sum over a token's experts
is bracketed by ranks, so results agree to rounding, and to the bit where a token has at most two
FFN experts.

With the C copies travel the gate of each selection, 4 bytes, and L bytes per copy that say which of
the rank's L experts it is for. Gates do not say that: a selection whose gate has underflowed to 0
still counts and has a gradient.

Shape suffixes: T tokens, R ranks of the expert-parallel group, L experts of a rank, F = R L, C
copies, S selections, D hidden size; a prime marks what a rank receives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.moe.copies import Copies
from moepp_megatron.moe.exchange import Exchange
from moepp_megatron.moe.upstream_settings import refuse_setting


class DedupAlltoAllTokenDispatcher(MoETokenDispatcher):
    """All-to-all of FFN-routed tokens, each vector at most once per pair of ranks.

    It extends megatron-core's base class and not its all-to-all dispatcher, whose bookkeeping
    counts selections and would have to be replaced entirely.

    Attributes:
        input_splits: [R] copies that this rank sends to each rank.
        output_splits: [R] copies that it receives from each rank.

    Raises:
        ValueError: If a setting of megatron-core cannot be honoured by this dispatcher.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        if config.moe_router_padding_for_quantization:
            raise ValueError(
                "TransformerConfig.moe_router_padding_for_quantization (True) must be False with "
                "deduplicated dispatch, because padding would select experts that the router did "
                "not; use False, and experts pad their own batches"
            )
        if config.overlap_moe_expert_parallel_comm:
            raise ValueError(
                "TransformerConfig.overlap_moe_expert_parallel_comm (True) must be False with "
                "deduplicated dispatch, because that schedule frees what is still on its way; use "
                "False, or the plain all-to-all"
            )
        refuse_setting(config, "moe_shared_expert_overlap", type(self).__name__)
        super().__init__(config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        self.input_splits: list[int] | None = None
        self.output_splits: list[int] | None = None

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Copy every token [s, b, D] once for each rank that holds an expert of it.

        Returns [C, D] copies in order of ranks, then tokens, and [S] gates (fp32 in training) in
        order of copies, then experts.
        """
        self._hidden_shape = hidden_states.shape
        by_rank = (routing_map.shape[0], self.ep_size, self.num_local_experts)
        map_TRL, gates_TRL = routing_map.view(by_rank), probs.reshape(by_rank)
        map_TR = map_TRL.any(dim=-1)

        self._map_TR = map_TR
        counts = self.exchange_counts(routing_map, map_TR)
        self._counts = counts
        self.input_splits, self.output_splits = counts.copies.sent, counts.copies.received

        self._to_ranks = Copies(map_TR, sum(counts.copies.sent))
        token_C, rank_C = self._to_ranks.row, self._to_ranks.column
        self._map_CL = map_TRL[token_C, rank_C]
        selected = self._map_CL.nonzero_static(size=sum(counts.selections.sent))
        copy_S, expert_S = selected.unbind(dim=1)
        gates_S = gates_TRL[token_C[copy_S], rank_C[copy_S], expert_S]
        tokens_TD = hidden_states.reshape(-1, self._hidden_shape[-1])
        return self._to_ranks.spread(tokens_TD), gates_S

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send copies, gates and maps on their way; returns tickets (see `exchange`)."""
        self._outbound = [
            Exchange(self.ep_group, counts.sent, counts.received)
            for counts in (self._counts.copies, self._counts.selections, self._counts.copies)
        ]
        copies, gates, maps = self._outbound
        # Collectives of a group run in the order they began: the small ones need not wait for the
        # large one.
        self._map_ticket = maps.begin(self._map_CL.to(torch.uint8))
        gates_ticket = gates.begin(probs)
        return copies.begin(hidden_states), gates_ticket

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Wait by the tickets and copy each copy once for every expert of this rank that wants it.

        Returns:
            [S', D] the experts' batch in order of experts; [L] int64 rows of each expert, on the
            host; [S'] gates.
        """
        copies, gates, maps = self._outbound
        map_CL = self._gather(maps.end(self._map_ticket), self._counts.copies).bool()
        gates_S = self._gather(gates.end(probs), self._counts.selections)
        copies_CD = self._gather(copies.end(hidden_states), self._counts.copies)
        self._to_experts = Copies(map_CL, gates_S.shape[0])
        return (
            self._to_experts.spread(copies_CD),
            self._counts.tokens_per_expert,
            self._to_experts.in_order_of_columns(gates_S),
        )

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """[C', D] sums over the copies' selections of [S', D] expert outputs, times their gates."""
        sums_CD = self._to_experts.add_up(hidden_states)
        if self.tp_size == 1:
            return sums_CD
        # Each tensor rank of an expert has a part of the sum; added in fp32 as megatron-core does.
        return reduce_scatter_to_sequence_parallel_region(
            sums_CD.float(),
            group=self.tp_group,
            input_split_sizes=self._counts.copies.of_tensor_ranks,
        ).to(sums_CD.dtype)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Send the sums back to where their tokens are; returns a ticket."""
        counts = self._counts.copies
        self._inbound = Exchange(self.ep_group, counts.received, counts.sent)
        return self._inbound.begin(hidden_states)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Wait for the sums and add up those of each token: [s, b, D]."""
        returned_CD = self._inbound.end(hidden_states)
        return self._to_ranks.add_up(returned_CD).view(self._hidden_shape)

    def combine_rows(self, ticket: Tensor) -> tuple[Tensor, Tensor]:
        """[C, D] sums, and [T, slots] int32 indices of each token's sums, for `kernels.combine`.

        Replaces `combine_postprocess`, which adds up a token's sums.
        """
        from moepp_megatron.moe.kernels.rows import rows_of_tokens

        table = rows_of_tokens(self._map_TR, min(self.config.moe_router_topk, self.ep_size))
        return self._inbound.end(ticket), table

    def _gather(self, rows: Tensor, counts: _ExchangedRows) -> Tensor:
        """The rows that all tensor ranks of this rank's experts received."""
        if self.tp_size == 1:
            return rows
        return gather_from_sequence_parallel_region(
            rows, group=self.tp_group, output_split_sizes=counts.of_tensor_ranks
        )

    @torch.no_grad()
    def exchange_counts(self, routing_map: Tensor, map_TR: Tensor) -> _DispatchCounts:
        """Exchange the counts between all ranks: one small collective, one wait for the GPU."""
        ranks, tensor_ranks, experts = self.ep_size, self.tp_size, self.num_local_experts
        local_counts = torch.cat([routing_map.sum(dim=0), map_TR.sum(dim=0)])
        every = gather_from_sequence_parallel_region(local_counts, group=self.tp_ep_group).cpu()
        # [from expert-parallel rank, from tensor rank, F + R]
        every = every.view(ranks, tensor_ranks, -1)
        # [from, from, to rank, of its experts] and [from, from, to rank]
        selections = every[..., : ranks * experts].view(ranks, tensor_ranks, ranks, experts)
        return _DispatchCounts(
            copies=self.counts_of_this_rank(every[..., ranks * experts :]),
            selections=self.counts_of_this_rank(selections.sum(dim=-1)),
            tokens_per_expert=selections[:, :, self.ep_rank].sum(dim=(0, 1)),
        )

    def counts_of_this_rank(self, rows: Tensor) -> _ExchangedRows:
        """This rank's part of [from expert-parallel, from tensor, to expert-parallel] counts."""
        to_here = rows[:, :, self.ep_rank]
        return _ExchangedRows(
            sent=rows[self.ep_rank, self.tp_rank].tolist(),
            received=to_here[:, self.tp_rank].tolist(),
            of_tensor_ranks=to_here.sum(dim=0).tolist(),
        )


@dataclass(frozen=True)
class _ExchangedRows:
    """Rows [R] that this rank sends and receives, and those received by each tensor rank."""

    sent: list[int]
    received: list[int]
    of_tensor_ranks: list[int]


@dataclass(frozen=True)
class _DispatchCounts:
    """Numbers of exchanged copies and selections, and [L] selections of each local expert."""

    copies: _ExchangedRows
    selections: _ExchangedRows
    tokens_per_expert: Tensor
