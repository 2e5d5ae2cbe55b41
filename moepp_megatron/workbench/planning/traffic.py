"""A layer's communication with other ranks, and its time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.links import (
    Placement,
    all_to_all_seconds,
    distinct_targets,
    gather_seconds,
    hierarchical_seconds,
    placement,
    send_seconds,
)
from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.workload import Workload


@dataclass(frozen=True, slots=True)
class LayerTraffic:
    """Seconds of one layer and micro-batch on the slowest rank, none of it hidden.

    Attributes:
        tensor_forward: Gathers and reduce-scatters of tensor parallelism, forward.
        tensor_backward: The same, backward.
        context: Keys and values around the context-parallel ring, forward; backward twice that.
        experts: Dispatch and combine, one pass.
    """

    tensor_forward: float
    tensor_backward: float
    context: float
    experts: float


def layer_traffic(
    load: Workload, grid: Grid, machine: Machine, is_moe: bool, skew: float = 1.0
) -> LayerTraffic:
    """Communication of one layer.

    Args:
        load: The workload.
        grid: The layout.
        machine: The cluster.
        is_moe: Whether the layer holds experts.
        skew: Rows of the fullest rank over the mean: its links are the bottleneck.
    """
    blocks = [load.attention.gathered_width(load.hidden)]
    if not is_moe or load.experts.shared_size:
        blocks.append(load.hidden)
    forward = backward = 0.0
    if grid.tp > 1:
        place = placement(grid, "tp", machine.per_node)
        size = grid.tokens(load.seq) * grid.tp * load.numbers.activation_bytes
        scatter = gather_seconds(place, size * load.hidden, machine)
        for width in blocks:
            gather = gather_seconds(place, size * width, machine)
            forward += gather + scatter
            # The gathered input is not kept: the weights' gradients gather it again. That gather
            # and the reduce-scatter of the input's gradient run beside products (megatron-core,
            # tensor_parallel/layers.py, and Transformer Engine's modules): what is left is the
            # gather of the output's gradient, as long as the forward pass's reduce-scatter.
            backward += scatter
    if load.tensor_overlap:
        # Around a ring, all but one of a product's chunks compute beside the next one's transfer.
        forward, backward = forward / grid.tp, backward / grid.tp
    return LayerTraffic(
        tensor_forward=forward,
        tensor_backward=backward,
        context=_context(load, grid, machine),
        experts=_expert_seconds(load, grid, machine, skew) if is_moe else 0.0,
    )


def _context(load: Workload, grid: Grid, machine: Machine) -> float:
    if grid.cp == 1:
        return 0.0
    place = placement(grid, "cp", machine.per_node)
    block = grid.tokens(load.seq) * grid.tp * load.attention.exchanged_width(grid.tp)
    step = send_seconds(place.nodes > 1, block * load.numbers.activation_bytes, machine)
    return (grid.cp - 1) * step


def _expert_seconds(load: Workload, grid: Grid, machine: Machine, skew: float = 1.0) -> float:
    """Dispatch and combine of one pass (forward or backward)."""
    place = placement(grid, "ep", machine.per_node)
    row = load.hidden * load.numbers.activation_bytes
    tokens = grid.tokens(load.seq)
    taken = load.experts.ffn_per_token
    seconds = 0.0
    if place.size > 1:
        if load.experts.dispatcher == "alltoall":
            seconds = all_to_all_seconds(place, skew * tokens * taken * row, machine)
        elif load.experts.dispatcher == "alltoall_dedup":
            copies = tokens * distinct_targets(place.size, taken, load.experts.num_ffn_experts)
            seconds = all_to_all_seconds(place, skew * copies * row, machine)
        elif load.experts.dispatcher == "flex":
            most_nodes = load.experts.most_nodes_of(place.nodes)
            inside, across = hierarchical_rows(
                place, taken, load.experts.num_ffn_experts, most_nodes
            )
            inside, across = skew * tokens * inside * row, skew * tokens * across * row
            seconds = hierarchical_seconds(place, inside, across, machine)
        elif load.experts.dispatcher == "allgather":
            seconds = gather_seconds(place, tokens * place.size * row, machine)
        else:
            assert_never(load.experts.dispatcher)
    if grid.etp > 1:
        group = placement(grid, "etp", machine.per_node)
        gathered = skew * tokens * taken * row * grid.etp
        seconds += gather_seconds(group, gathered, machine)
    return 2 * seconds


def hierarchical_rows(
    place: Placement, taken: float, experts: int, most_nodes: int | None = None
) -> tuple[float, float]:
    """Rows per token over NVLink and over the network: once to each node and rank.

    Args:
        place: Placement of the expert-parallel group.
        taken: Different experts per token.
        experts: Experts of the layer, spread evenly over the ranks.
        most_nodes: A token's experts lie on at most so many nodes.
    """
    to_ranks = distinct_targets(place.size, taken, experts)
    to_nodes = distinct_targets(place.nodes, taken, experts)
    to_nodes = min(to_nodes, most_nodes or to_nodes)
    across = to_nodes * (place.nodes - 1) / place.nodes
    # A token lands on the rank of its own number in each node: that one of the node's ranks
    # needs no copy over NVLink.
    return to_ranks * (place.per_node - 1) / place.per_node, across


def exchanged_bytes(load: Workload, grid: Grid) -> float:
    """Bytes of hidden vectors that one rank sends to other ranks for one layer's forward pass.

    It counts like `moe.dispatcher.bytes_sent`: dispatch and combine over the expert-parallel
    group, gates and maps not counted.
    """
    row = load.hidden * load.numbers.activation_bytes
    tokens, taken, ep = grid.tokens(load.seq), load.experts.ffn_per_token, grid.ep
    if ep == 1:
        return 0.0
    match load.experts.dispatcher:
        case "alltoall":
            rows = taken * (ep - 1) / ep
        case "allgather":
            rows = grid.etp * ep - 1.0
        case "alltoall_dedup" | "flex":
            rows = distinct_targets(ep, taken, load.experts.num_ffn_experts) * (ep - 1) / ep
        case other:
            assert_never(other)
    return 2.0 * tokens * rows * row
