"""Routing replay: record or repeat each MoE layer's selected experts [T, K].

megatron-core's `RouterReplay` records and repeats them in a router. An expert's number is its row
of the router: FFN experts first, then constant, copy and zero experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from numpy.typing import NDArray
from torch import Tensor

from moepp_megatron.layer_settings import LayerSettings

Routes = NDArray[np.integer]

# Stands for the zero-computation expert of a model with one, where an engine drops its number.
UNKNOWN = -1


def drive_routers(
    chunk: torch.nn.Module,
    given: Callable[[int], Tensor | None],
    taken: Callable[[int, Tensor], None],
) -> list[RouterReplay]:
    """Record or repeat routes in every forward pass of a model chunk from now on.

    Later micro-batches may be in their forward pass before one is computed again in its backward
    pass. So routers get their routes as the chunk's forward pass begins, and take them again, in
    the same order, where they run again (`RouterReplay.clear_indices` ends a step).

    Args:
        chunk: Its routers have `moe_enable_routing_replay`.
        given: From the number of a layer, from 1, the routes to repeat, [T, K] int64 on any device;
            or None, to select.
        taken: Gets the number of a layer and its routes after the pass.

    Returns:
        The routers' replays.
    """
    routers: dict[int, RouterReplay] = {
        module.layer_number: module.router_replay  # type: ignore[misc]
        for module in chunk.modules()
        if isinstance(getattr(module, "router_replay", None), RouterReplay)
    }

    def before(*_: Any) -> None:
        for number, replay in routers.items():
            routes = given(number)
            action = RouterReplayAction.RECORD
            if routes is not None:
                replay.set_target_indices(routes)
                action = RouterReplayAction.REPLAY_FORWARD
            replay.set_router_replay_action(action)

    def after(*_: Any) -> None:
        for number, replay in routers.items():
            if replay.router_replay_action is RouterReplayAction.RECORD:
                taken(number, replay.recorded_topk_idx)
                replay.clear_router_replay_action()
            else:
                taken(number, replay.target_topk_idx)
                replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)

    chunk.register_forward_pre_hook(before)
    chunk.register_forward_hook(after)
    return list(routers.values())


def checked_routes(
    routes: Routes,
    num_tokens: int,
    pattern: Sequence[bool],
    layer: LayerSettings,
    *,
    is_own: bool = False,
) -> Routes:
    """[tokens, MoE layers, K] int64 routes that a model can repeat.

    Args:
        routes: Whole numbers [tokens, layers, K], as vLLM and SGLang return them of a sequence, or
            [sequences, positions, layers, K]. Layers are the MoE layers, or all layers.
        num_tokens: Tokens that there must be.
        pattern: For each layer, whether it has experts.
        layer: Experts and K.
        is_own: Whether routers of this package selected them, of which a batch may take FFN experts
            only, as upcycled models do at first.

    Raises:
        ValueError: They have another shape, name an expert that there is not or one twice, or, of
            other routers, lack all zero-computation experts.
    """

    def refuse(wrong: object, must: str) -> ValueError:
        return ValueError(
            f"routes ({wrong}) must {must}; record the router's own selections, of all experts "
            "(docs/how_to/replay_routes.md)"
        )

    shape, topk, num_ffn = list(routes.shape), layer.router_topk, layer.num_ffn_experts
    if routes.ndim == 4:
        routes = routes.reshape(-1, *shape[2:])
    layers = routes.shape[1] if routes.ndim == 3 else 0
    if layers not in (sum(pattern), len(pattern)) or routes.shape[::2] != (num_tokens, topk):
        raise refuse(shape, f"be [{num_tokens} tokens, {sum(pattern)} MoE layers, {topk}]")
    if routes.dtype.kind not in "iu":
        raise refuse(routes.dtype, "be whole numbers")
    if layers > sum(pattern):
        routes = routes[:, np.flatnonzero(pattern)]
    # The integers of an engine may be too small for the number that -1 stands for.
    routes = routes.astype(np.int64)
    if layer.num_zero_computation_experts == 1:
        routes = np.where(routes == UNKNOWN, num_ffn, routes)
    for extreme in (int(routes.min()), int(routes.max())):
        if not 0 <= extreme < layer.num_experts:
            raise refuse(f"expert {extreme}", f"name experts 0 to {layer.num_experts - 1}")
    ordered = np.sort(routes, axis=-1)
    engines = "which is not so where an engine writes 0 for zero-computation experts"
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise refuse("one expert twice", f"name {topk} experts of a token, {engines}")
    if layer.num_zero_computation_experts and not is_own and routes.max() < num_ffn:
        raise refuse("FFN experts only", f"name zero-computation experts too, {engines}")
    return routes
