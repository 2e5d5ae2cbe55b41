"""Counts the bytes that each layer's routing must send, which a profile is compared with.

Counted from the routing map on its way into the dispatcher, not by the dispatcher, while a profile
is recorded. A selection whose expert lives on another expert-parallel rank crosses once; without
duplicates, a token crosses once to each rank with an expert of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from moepp_megatron.features.profile.ranges import Ranges


class TrafficCounter:
    """Counts the layers of a model while `Ranges` hold its methods.

    Attributes:
        passes: What was counted since the last `take`.
    """

    def __init__(self) -> None:
        self.passes: list[dict[str, Any]] = []

    def watch(self, ranges: Ranges, model: torch.nn.Module) -> None:
        """Count every pass through the MoE layers of a model."""
        for layer in model.modules():
            if isinstance(layer, MoELayer):
                wrapper = functools.partial(self._counted, layer)
                ranges.replace(layer.token_dispatcher, "dispatch_preprocess", wrapper)

    def take(self) -> list[dict[str, Any]]:
        """Return the counts and reset them."""
        passes, self.passes = self.passes, []
        return passes

    def _counted(self, layer: MoELayer, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def inner(hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> Any:
            self.passes.append(_traffic(layer, hidden_states, routing_map))
            return function(hidden_states, routing_map, probs)

        return inner


@torch.no_grad()
def _traffic(layer: MoELayer, hidden: Tensor, routing_map: Tensor) -> dict[str, Any]:
    """Counts of one forward pass of a layer on one rank (`tools.profiling.trace.Pass`)."""
    # hidden: [s, b, D] local tokens.
    # routing_map: [T, F] bool. Padding looks like tokens that need no FFN expert; training by this
    # package has none.
    ranks = layer.ep_group.size()
    by_rank = routing_map.view(routing_map.shape[0], ranks, -1)
    to_ranks = by_rank.sum(dim=(0, 2)).tolist()
    return {
        "layer": int(layer.layer_number or 0),
        # Autograd runs a recomputed forward pass inside of a node of its graph.
        "recomputed": torch._C._current_autograd_node() is not None,
        "dispatcher": type(layer.token_dispatcher).__name__,
        "tokens": routing_map.shape[0],
        "topk": int(layer.config.moe_router_topk),
        "selections": int(sum(to_ranks)),
        "row_bytes": hidden.shape[-1] * hidden.element_size(),
        "ranks": ranks,
        "to_ranks": to_ranks,
        "copies_to_ranks": by_rank.any(dim=2).sum(dim=0).tolist(),
        "own": layer.ep_group.rank(),
    }
