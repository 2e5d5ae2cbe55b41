"""Counts the bytes that each layer's routing must send, which a profile is compared with.

Counted from the routing map on its way into the dispatcher, not by the dispatcher, while a profile
is recorded. A selection whose expert lives on another expert-parallel rank crosses once; without
duplicates, a token crosses once to each rank with an expert of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from moepp_megatron.features.profile.ranges import Ranges


@dataclass(frozen=True)
class _DispatchTraffic:
    """One forward pass of one layer on one rank. Sums over passes add every field but names.

    Attributes:
        layer: Global layer number.
        recomputed: Whether the backward pass ran it again.
        dispatcher: Class of the dispatcher.
        tokens: T, local tokens, padding included: in a routing map it looks like tokens that need
            no FFN expert. Training by this package has no padding.
        topk: K, selections of a token.
        selections: FFN selections that are carried out; `phi = selections / (T K)`.
        row_bytes: D * b, bytes of a hidden vector.
        ranks: EP.
        to_ranks: [EP] selections whose expert lives on each rank.
        copies_to_ranks: [EP] tokens with at least one expert on each rank.
        own: Rank within the expert-parallel group.
    """

    layer: int
    recomputed: bool
    dispatcher: str
    tokens: int
    topk: int
    selections: int
    row_bytes: int
    ranks: int
    to_ranks: list[int]
    copies_to_ranks: list[int]
    own: int

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dictionary for JSON."""
        return asdict(self)


class TrafficCounter:
    """Counts the layers of a model while `Ranges` hold its methods.

    Attributes:
        passes: What was counted since the last `take`.
    """

    def __init__(self) -> None:
        self.passes: list[_DispatchTraffic] = []

    def watch(self, ranges: Ranges, model: torch.nn.Module) -> None:
        """Count every pass through the MoE layers of a model."""
        for layer in _moe_layers(model):
            ranges.replace(
                layer.token_dispatcher,
                "dispatch_preprocess",
                functools.partial(self._counted, layer),
            )

    def take(self) -> list[_DispatchTraffic]:
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
def _traffic(layer: MoELayer, hidden: Tensor, routing_map: Tensor) -> _DispatchTraffic:
    """Counts of one pass."""
    # hidden: [s, b, D] local tokens.
    # routing_map: [T, F] bool.
    ranks = layer.ep_group.size()
    by_rank = routing_map.view(routing_map.shape[0], ranks, -1)
    to_ranks = by_rank.sum(dim=(0, 2)).tolist()
    return _DispatchTraffic(
        layer=int(layer.layer_number or 0),
        # Autograd runs a recomputed forward pass inside of a node of its graph.
        recomputed=torch._C._current_autograd_node() is not None,
        dispatcher=type(layer.token_dispatcher).__name__,
        tokens=routing_map.shape[0],
        topk=int(layer.config.moe_router_topk),
        selections=int(sum(to_ranks)),
        row_bytes=hidden.shape[-1] * hidden.element_size(),
        ranks=ranks,
        to_ranks=to_ranks,
        copies_to_ranks=by_rank.any(dim=2).sum(dim=0).tolist(),
        own=layer.ep_group.rank(),
    )


def _moe_layers(model: torch.nn.Module) -> Iterator[MoELayer]:
    return (module for module in model.modules() if isinstance(module, MoELayer))
