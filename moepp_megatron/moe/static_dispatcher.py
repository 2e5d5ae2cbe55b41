"""Dispatch into buffers of a fixed size: counts and offsets are on the device, the host reads none.

A rank has room for `rows_to_peer` rows to each rank of the expert-parallel group. More selections
are cut off, so the result is wrong then, and `fill` above 1 says so: the loop undoes such a pass
and repeats it with another dispatcher. Rows beyond those that are needed hold arbitrary numbers,
which no product and no sum reads.

Shape suffixes: T local tokens, F FFN experts, P expert-parallel ranks, L local experts, D channels,
R rows: P times `rows_to_peer`.
"""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.layer_settings import static_rows
from moepp_megatron.moe.copies import Permutation, Places, rows_of_tokens
from moepp_megatron.moe.exchange import Exchange


class StaticTokenDispatcher(MoETokenDispatcher):
    """All-to-all of equal splits; methods as of `FFNAlltoAllTokenDispatcher`.

    Attributes:
        rows_to_peer: Rows to each rank in the pass begun last.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        rows_per_selection: float,
    ) -> None:
        super().__init__(config, pg_collection)
        if self.tp_size > 1:
            raise ValueError(
                f"static_rows ({rows_per_selection}) must be None with "
                f"expert_tensor_parallel_size ({self.tp_size}) > 1; use None"
            )
        self._rows_per_selection = rows_per_selection
        self.rows_to_peer = 0

    def fill(self, routing_map: Tensor) -> Tensor:
        """Most rows for one rank of `routing_map` [T, F], of the room for them; float64 scalar."""
        with torch.no_grad():
            rows_P = routing_map.sum(dim=0).view(self.ep_size, -1).sum(dim=1)
            return rows_P.max().double() / self._room(len(routing_map))

    def _room(self, num_tokens: int) -> int:
        topk: int = self.config.moe_router_topk
        return static_rows(self._rows_per_selection, topk, num_tokens, self.ep_size)

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows [R, D] and gates [R]: for each rank in order of its experts, then tokens."""
        self._shape, device = hidden_states.shape, hidden_states.device
        tokens = hidden_states.reshape(-1, self._shape[-1])
        self._routing_map, self.rows_to_peer = routing_map, self._room(len(tokens))
        room, num_entries = self.rows_to_peer, routing_map.numel()
        num_rows = room * self.ep_size
        with torch.no_grad():
            wanted = routing_map.T.reshape(self.ep_size, -1)
            place = wanted.cumsum(dim=1) - 1
            first = torch.arange(self.ep_size, device=device).unsqueeze(1) * room
            # What has no row goes to one more, which is then cut off.
            slot = torch.where(wanted & (place < room), place + first, num_rows).view(-1)
            entry = torch.full((num_rows + 1,), num_entries, device=device)
            entry = entry.scatter_(0, slot, torch.arange(num_entries, device=device))[:num_rows]
            token = torch.where(entry < num_entries, entry % len(tokens), len(tokens))
            self._slot = slot
            ends = routing_map.sum(dim=0).view(self.ep_size, -1).cumsum(dim=1).clamp(max=room)
            self._counts_PL = ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))
        self._tokens = Places(token, len(tokens))
        gates = Places(entry, num_entries).spread(probs.T.reshape(-1))
        return self._tokens.spread(tokens), gates

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Send rows [R, D], gates [R] and how many there are of each expert; returns tickets."""
        if self.ep_size > 1:
            received = torch.empty_like(self._counts_PL)
            dist.all_to_all_single(received, self._counts_PL, group=self.ep_group)
            self._counts_PL = received
        self._outbound = self._exchange(), self._exchange()
        rows, gates = self._outbound
        gates_ticket = gates.begin(probs)
        return rows.begin(hidden_states), gates_ticket

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [R, D], [L] int64 counts and gates [R], in order of experts; all on the device."""
        rows, gates = self._outbound
        hidden_states, probs = rows.end(hidden_states), gates.end(probs)
        counts_L = self._counts_PL.sum(dim=0)
        if self.ep_size > 1:
            ends = self._counts_PL.cumsum(dim=1)
            place = torch.arange(self.rows_to_peer, device=ends.device).repeat(self.ep_size, 1)
            # Rows that hold nothing have an expert after the last one.
            expert = torch.searchsorted(ends, place, right=True).view(-1)
            self._by_expert = Permutation(expert.argsort(stable=True))
            hidden_states = self._by_expert.spread(hidden_states)
            probs = self._by_expert.spread(probs)
        return hidden_states, counts_L, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The experts' outputs [R, D] in the order in which rows came."""
        return self._by_expert.add_up(hidden_states) if self.ep_size > 1 else hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Send the experts' outputs back; returns a ticket."""
        self._inbound = self._exchange()
        return self._inbound.begin(hidden_states)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Wait for the experts' outputs, given their ticket, and add up each token's."""
        return self._tokens.add_up(self._inbound.end(hidden_states)).view(self._shape)

    def combine_rows(self, ticket: Tensor) -> tuple[Tensor, Tensor]:
        """As of `FFNAlltoAllTokenDispatcher`."""
        num_rows = self.rows_to_peer * self.ep_size
        numbers = self._slot.view(-1, len(self._routing_map)).T.int()
        numbers = numbers.masked_fill(numbers == num_rows, -1)
        slots = min(self.config.moe_router_topk, self._routing_map.shape[1])
        return self._inbound.end(ticket), rows_of_tokens(self._routing_map, slots, numbers)

    def _exchange(self) -> Exchange:
        splits = [self.rows_to_peer] * self.ep_size
        return Exchange(self.ep_group, splits, splits)
