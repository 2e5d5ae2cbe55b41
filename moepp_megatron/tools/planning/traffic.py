"""Time of messages, and of a layer's communication, from the nodes of ranks and sizes."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, exp, lgamma
from typing import assert_never

from moepp_megatron.layer_settings import static_rows
from moepp_megatron.tools.planning.grid import Grid
from moepp_megatron.tools.planning.machine import Machine
from moepp_megatron.tools.planning.workload import Workload


@dataclass(frozen=True)
class _Placement:
    """Distribution of a group's ranks over nodes."""

    size: int  # ranks
    per_node: int  # ranks on each node

    @property
    def nodes(self) -> int:
        """Nodes that the group spans."""
        return ceil(self.size / self.per_node)


def placement(grid: Grid, name: str, per_node: int) -> _Placement:
    """The placement of a group if node after node is filled with `per_node` ranks.

    megatron-core numbers ranks in the order "tp-cp-ep-dp-pp", the first fastest: attention with
    ep = 1, experts with cp = 1 (megatron/core/parallel_state.py, `RankGenerator`).
    """
    # Size, and the distance between neighbours in rank numbers.
    shapes = {
        "tp": (grid.tp, 1),
        "cp": (grid.cp, grid.tp),
        "dp_cp": (grid.dp * grid.cp, grid.tp),
        "pp": (grid.pp, grid.world // grid.pp),
        "etp": (grid.etp, 1),
        "ep": (grid.ep, grid.etp),
        "edp": (grid.edp, grid.etp * grid.ep),
    }
    size, stride = shapes[name]
    return _Placement(size, min(size, max(per_node // stride, 1)))


def gather_seconds(place: _Placement, total_bytes: float, machine: Machine) -> float:
    """All-gather of a tensor of `total_bytes`, or its reduce-scatter, in rings over all ports."""
    if place.size == 1:
        return 0.0
    share = (place.size - 1) / place.size if place.per_node > 1 else 0.0
    inside = total_bytes * share / machine.nvlink
    across = total_bytes * (place.nodes - 1) / place.nodes / (place.per_node * machine.network)
    return max(inside, across) + _start(place, machine) + machine.reached.hop_s * (place.nodes - 1)


def _all_to_all_seconds(place: _Placement, sent_bytes: float, machine: Machine) -> float:
    """Time of an all-to-all: every rank sends `sent_bytes`, evenly to all ranks and itself."""
    # Times inside the node and across nodes add up, as in measurements.
    if place.size == 1:
        return 0.0
    inside = sent_bytes * (place.per_node - 1) / place.size
    across = sent_bytes * (place.size - place.per_node) / place.size
    return _start(place, machine) + inside / machine.nvlink + across / machine.network


def _hierarchical_seconds(
    place: _Placement, inside_bytes: float, across_bytes: float, machine: Machine
) -> float:
    """DeepEP's and HybridEP's exchange: once to each node, from there on by NVLink meanwhile."""
    if place.size == 1:
        return 0.0
    slower = max(inside_bytes / machine.nvlink, across_bytes / machine.network)
    return _start(place, machine) + slower


def send_seconds(is_across: bool, sent_bytes: float, machine: Machine) -> float:
    """One message from rank to rank."""
    if is_across:
        return machine.reached.network_latency_s + sent_bytes / machine.network
    return machine.reached.nvlink_latency_s + sent_bytes / machine.nvlink


def _start(place: _Placement, machine: Machine) -> float:
    reached = machine.reached
    return reached.nvlink_latency_s if place.nodes == 1 else reached.network_latency_s


def rows_with_room(load: Workload, grid: Grid, rows: float) -> float:
    """Rows that a rank's dispatcher moves and keeps: `rows`, or the buffer of static rows."""
    share = load.experts.static_rows
    if share is None:
        return rows
    topk, tokens = load.experts.router_topk, grid.tokens(load.seq)
    return float(grid.ep * static_rows(share, topk, tokens, grid.ep))


@lru_cache(maxsize=4096)
def distinct_targets(targets: int, draws: float, experts: int | None = None) -> float:
    """Expected number of the ranks or nodes that a token's `draws` different experts lie on.

    `experts` are spread evenly; None for so many that drawing one twice does not matter.
    """
    if experts is None or targets >= experts or targets == 1:
        return targets * (1.0 - (1.0 - 1.0 / targets) ** draws)
    others = experts - experts / targets
    if draws >= others:
        return float(targets)
    # C(others, draws) / C(experts, draws): none of the draws lies on a given target.
    missed = lgamma(others + 1) - lgamma(others - draws + 1)
    missed += lgamma(experts - draws + 1) - lgamma(experts + 1)
    return targets * (1.0 - exp(missed))


@dataclass(frozen=True, slots=True)
class _LayerTraffic:
    """Seconds of one layer and micro-batch on the slowest rank, none of it hidden."""

    tensor_forward: float  # gathers and reduce-scatters of tensor parallelism, forward
    tensor_backward: float  # the same, backward
    context: float  # keys and values around the context-parallel ring, forward; backward twice that
    experts: float  # dispatch and combine, one pass


def layer_traffic(
    load: Workload, grid: Grid, machine: Machine, is_moe: bool, skew: float = 1.0
) -> _LayerTraffic:
    """Communication of one layer; `skew`: rows of the fullest rank over the mean."""
    blocks = [load.attention.gathered_width(load.hidden)]
    if not is_moe or load.experts.shared_size:
        blocks.append(load.hidden)
    place = placement(grid, "tp", machine.per_node)
    size = grid.tokens(load.seq) * grid.tp * load.numbers.activation_bytes
    scatter = gather_seconds(place, size * load.hidden, machine)
    forward = sum(gather_seconds(place, size * width, machine) + scatter for width in blocks)
    # The gathered input is not kept: the weights' gradients gather it again. That gather and the
    # reduce-scatter of the input's gradient run during products (megatron-core,
    # tensor_parallel/layers.py, and Transformer Engine's modules): what is left is the gather of
    # the output's gradient, as long as the forward pass's reduce-scatter.
    backward = scatter * len(blocks)
    if load.tensor_overlap:
        # Around a ring, all but one of a product's chunks compute during the next one's transfer.
        forward, backward = forward / grid.tp, backward / grid.tp
    experts = _expert_seconds(load, grid, machine, skew) if is_moe else 0.0
    return _LayerTraffic(forward, backward, _context(load, grid, machine), experts)


def _context(load: Workload, grid: Grid, machine: Machine) -> float:
    place = placement(grid, "cp", machine.per_node)
    block = grid.tokens(load.seq) * grid.tp * load.attention.exchanged_width(grid.tp)
    step = send_seconds(place.nodes > 1, block * load.numbers.activation_bytes, machine)
    return (grid.cp - 1) * step


def _expert_seconds(load: Workload, grid: Grid, machine: Machine, skew: float) -> float:
    """Dispatch and combine of one pass (forward or backward)."""
    place = placement(grid, "ep", machine.per_node)
    row, tokens = load.row_bytes, grid.tokens(load.seq)
    experts, taken = load.experts.num_ffn_experts, load.experts.ffn_per_token
    match load.experts.dispatcher:
        case "alltoall":
            rows = rows_with_room(load, grid, skew * tokens * taken)
            seconds = _all_to_all_seconds(place, rows * row, machine)
        case "alltoall_dedup":
            copies = tokens * distinct_targets(place.size, taken, experts)
            seconds = _all_to_all_seconds(place, skew * copies * row, machine)
        case "flex":
            most_nodes = load.experts.most_nodes_of(place.nodes)
            inside, across = _hierarchical_rows(place, taken, experts, most_nodes)
            inside, across = skew * tokens * inside * row, skew * tokens * across * row
            seconds = _hierarchical_seconds(place, inside, across, machine)
        case "allgather":
            seconds = gather_seconds(place, tokens * place.size * row, machine)
        case other:
            assert_never(other)
    group = placement(grid, "etp", machine.per_node)
    gathered = skew * tokens * taken * row * grid.etp
    return 2 * (seconds + gather_seconds(group, gathered, machine))


def _hierarchical_rows(
    place: _Placement, taken: float, experts: int, most_nodes: int | None = None
) -> tuple[float, float]:
    """Rows per token over NVLink and network, for `taken` experts on at most `most_nodes` nodes."""
    # A token travels once to each node and rank.
    to_ranks = distinct_targets(place.size, taken, experts)
    to_nodes = distinct_targets(place.nodes, taken, experts)
    to_nodes = min(to_nodes, most_nodes or to_nodes)
    across = to_nodes * (place.nodes - 1) / place.nodes
    # A token lands on the rank of its own number in each node: that one of the node's ranks
    # needs no copy over NVLink.
    return to_ranks * (place.per_node - 1) / place.per_node, across


def exchanged_bytes(load: Workload, grid: Grid) -> float:
    """Bytes of hidden vectors that a rank sends to others in one layer's forward pass.

    As `moe.dispatcher.bytes_sent` counts: dispatch and combine, without gates and maps.
    """
    tokens, taken, ep = grid.tokens(load.seq), load.experts.ffn_per_token, grid.ep
    if ep == 1:
        return 0.0
    match load.experts.dispatcher:
        case "alltoall":
            rows = rows_with_room(load, grid, tokens * taken) / tokens * (ep - 1) / ep
        case "allgather":
            rows = grid.etp * ep - 1.0
        case "alltoall_dedup" | "flex":
            rows = distinct_targets(ep, taken, load.experts.num_ffn_experts) * (ep - 1) / ep
        case other:
            assert_never(other)
    return 2.0 * tokens * rows * load.row_bytes
