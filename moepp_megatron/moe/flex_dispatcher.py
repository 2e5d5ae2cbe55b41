"""megatron-core's flex dispatcher (DeepEP, HybridEP) for routing maps of FFN experts only.

A row of an FFN-only map holds anything from 0 to K selections. How each backend handles that:

- HybridEP takes the map itself and needs no change.
- DeepEP takes K expert indices per token. megatron-core fills the slots that a token does not use
  with real experts of probability 0, which would be sent to and computed for nothing; only with a
  capacity factor does it write DeepEP's sentinel -1 there. Here the sentinel is always written, and
  by the map, so that a selection whose gate underflows to 0 keeps its gradient.
- NCCL-EP takes K indices too and documents no sentinel, so it is refused.
"""

from copy import copy
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def _set_deepep_metadata(manager: Any, routing_map: Tensor, probs: Tensor) -> None:
    """Replacement of DeepEP's `setup_metadata`: indices and weights from an FFN-only map."""
    # `routing_map` (bool) and `probs` (fp32, 0 where not selected) are [T, ranks, local experts],
    # copied to the tensor ranks of an expert. Out come `token_indices` [T, slots] int64, -1 in
    # unused slots, and `token_probs` [T, slots] fp32, 0 there.
    routing_map = routing_map.reshape(-1, manager.num_experts)
    probs = probs.reshape(-1, manager.num_experts)
    slots = min(manager.router_topk, manager.num_experts)
    # Gates are never negative, so selections come before everything else.
    indices = torch.where(routing_map, probs.detach(), -1.0).topk(slots, dim=-1).indices
    is_used = routing_map.gather(1, indices)
    manager.token_indices = indices.masked_fill(~is_used, -1)
    manager.token_probs = torch.where(is_used, probs.gather(1, indices), 0.0)


def _multihot(num_local_experts: int, indices: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """[T, L] map and gates; DeepEP's `_indices_to_multihot` selects by a mask: the host waits."""
    is_used = indices >= 0
    # Unused slots go to a column of their own, which is left out.
    columns = torch.where(is_used, indices, num_local_experts)
    shape = indices.shape[0], num_local_experts + 1
    routing_map = is_used.new_zeros(shape).scatter(1, columns, is_used)
    gates = probs.new_zeros(shape).scatter(1, columns, probs)
    return routing_map[:, :-1].contiguous(), gates[:, :-1].contiguous()


class FFNFlexTokenDispatcher(MoEFlexTokenDispatcher):
    """Flex dispatch of FFN-routed tokens only; `moe_flex_dispatcher_backend` names the backend.

    Raises:
        ValueError: If the backend cannot carry FFN-only routing.
        ImportError: If the backend's package is not installed.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        backend = config.moe_flex_dispatcher_backend
        if backend not in ("deepep", "hybridep"):
            raise ValueError(
                f"moe_flex_dispatcher_backend ({backend}) must be deepep or hybridep, because it "
                "has no way to leave a token's slot unused; use deepep"
            )
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection)
        if backend == "deepep":
            manager = self.manager
            manager.setup_metadata = partial(_set_deepep_metadata, manager)
            manager._indices_to_multihot = partial(_multihot, num_local_experts)
            # In FP8 its permutation would pad the rows too, for which the host waits four times in
            # each layer and micro-batch. The experts pad without a wait.
            manager.config = copy(config)
            manager.config.fp8 = None

    @property
    def manager(self) -> Any:
        """megatron-core's own, which calls the backend and keeps a pass's routing and gates."""
        return self._comm_manager
