"""Token dispatchers that move only what FFN experts need."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moepp_megatron.moe.flex_dispatcher import FFNFlexTokenDispatcher, vectors_sent


class FFNAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """All-to-all of FFN-routed tokens only.

    Takes the FFN columns of the routing map and gates. A row of the map then holds anything from 0
    to K selections, so the number of permuted rows is the map's sum and not T * K, which
    megatron-core's dropless path assumes.
    """

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """As in megatron-core, with the number of permuted rows taken from the map.

        Args:
            routing_map: [T, F] bool.

        Returns:
            [local experts] int64 tokens of each local expert.
        """
        tokens_per_expert = super().preprocess(routing_map)
        if not self.drop_and_pad:
            self.num_out_tokens = routing_map.sum()
            # The permutation needs it as a Python number, so it has to be on the host by then.
            self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_expert

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: Tensor | None = None
    ) -> Tensor:
        tokens_per_expert = super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)
        if point == "before_permutation_1" and torch.is_tensor(self.num_out_tokens):
            self.num_out_tokens = int(self.num_out_tokens)  # type: ignore[assignment]
        return tokens_per_expert


def build_dispatcher(
    num_local_experts: int,
    local_expert_indices: list[int],
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
) -> MoETokenDispatcher:
    """The FFN-only dispatcher that `config.moe_token_dispatcher_type` names.

    Raises:
        ValueError: For a dispatcher that cannot carry FFN-only routing.
        ImportError: For flex without its package.
    """
    dispatchers: dict[str, type[MoETokenDispatcher]] = {
        "alltoall": FFNAlltoAllTokenDispatcher,
        # It counts selections from the map it gathers, so FFN columns alone are right as it is.
        "allgather": MoEAllGatherTokenDispatcher,
        "flex": FFNFlexTokenDispatcher,
    }
    name = config.moe_token_dispatcher_type
    if name not in dispatchers:
        raise ValueError(
            f"moe_token_dispatcher_type ({name}) must be one that carries FFN-only routing; use "
            + " or ".join(dispatchers)
        )
    return dispatchers[name](
        num_local_experts, local_expert_indices, config=config, pg_collection=pg_collection
    )


def bytes_sent(dispatcher: MoETokenDispatcher, hidden: Tensor) -> int:
    """Bytes of hidden vectors that this rank sends to others for one forward pass.

    Counts dispatch and combine over the expert-parallel group. The all-to-all: by the split sizes
    that it was called with. The all-gather: one copy of every local token to every other rank and
    back. Flex: one copy of a token to every other rank that it needs, and back (counted where the
    token starts, so only the sum over ranks is exact). The gates that travel along, 4 bytes a
    selection, are not counted.

    Args:
        dispatcher: After `dispatch_preprocess` and `token_dispatch` of this pass.
        hidden: [s, b, D] the layer's input.
    """
    row = hidden.shape[-1] * hidden.element_size()
    if isinstance(dispatcher, MoEAlltoAllTokenDispatcher):
        if dispatcher.ep_size == 1 or dispatcher.input_splits is None:
            return 0
        own = dispatcher.ep_rank
        outgoing = sum(int(n) for n in dispatcher.input_splits) - int(dispatcher.input_splits[own])
        returning = sum(int(n) for n in dispatcher.output_splits) - int(
            dispatcher.output_splits[own]
        )
        return (outgoing + returning) * row
    if isinstance(dispatcher, MoEAllGatherTokenDispatcher):
        others = dispatcher.tp_size * dispatcher.ep_size - 1
        return 2 * hidden[..., 0].numel() * others * row
    if isinstance(dispatcher, MoEFlexTokenDispatcher):
        return 2 * vectors_sent(dispatcher) * row
    raise TypeError(f"no byte count is defined for {type(dispatcher).__name__}")
