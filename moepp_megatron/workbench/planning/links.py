"""The time of a message, from the nodes of its ranks and its size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, exp, lgamma

from moepp_megatron.workbench.planning.grid import Grid, GroupName, group_shape
from moepp_megatron.workbench.planning.machine import Machine


@dataclass(frozen=True)
class Placement:
    """Distribution of a group's ranks over nodes.

    Attributes:
        size: Ranks.
        per_node: Ranks on each node.
    """

    size: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Nodes that the group spans."""
        return ceil(self.size / self.per_node)


def placement(grid: Grid, name: GroupName, per_node: int) -> Placement:
    """The placement of a group if node after node is filled with `per_node` ranks."""
    size, stride = group_shape(grid, name)
    return Placement(size, min(size, max(per_node // stride, 1)))


def gather_seconds(place: Placement, total_bytes: float, machine: Machine) -> float:
    """All-gather of a tensor of `total_bytes`, or its reduce-scatter, in rings.

    Across nodes every rank of a node drives its own port.
    """
    if place.size == 1:
        return 0.0
    inside = total_bytes * (place.size - 1) / place.size / machine.nvlink
    if place.per_node == 1:
        inside = 0.0
    if place.nodes == 1:
        return inside + machine.reached.nvlink_latency_s
    across = total_bytes * (place.nodes - 1) / place.nodes / (place.per_node * machine.network)
    reached = machine.reached
    return max(inside, across) + reached.network_latency_s + reached.hop_s * (place.nodes - 1)


def all_to_all_seconds(place: Placement, sent_bytes: float, machine: Machine) -> float:
    """Time of an all-to-all: every rank sends `sent_bytes`, evenly to all ranks including itself.

    Times inside the node and across nodes add up, as in measurements.
    """
    if place.size == 1:
        return 0.0
    inside = sent_bytes * (place.per_node - 1) / place.size
    across = sent_bytes * (place.size - place.per_node) / place.size
    return _start(place, machine) + inside / machine.nvlink + across / machine.network


def hierarchical_seconds(
    place: Placement, inside_bytes: float, across_bytes: float, machine: Machine
) -> float:
    """DeepEP's and HybridEP's exchange: once to each node, from there on by NVLink meanwhile.

    Args:
        place: Placement of the expert-parallel group.
        inside_bytes: Bytes that a rank sends to others over NVLink.
        across_bytes: Bytes that it sends to other nodes.
        machine: The cluster.
    """
    if place.size == 1:
        return 0.0
    slower = max(inside_bytes / machine.nvlink, across_bytes / machine.network)
    return _start(place, machine) + slower


def send_seconds(is_across: bool, sent_bytes: float, machine: Machine) -> float:
    """One message from rank to rank."""
    if is_across:
        return machine.reached.network_latency_s + sent_bytes / machine.network
    return machine.reached.nvlink_latency_s + sent_bytes / machine.nvlink


def _start(place: Placement, machine: Machine) -> float:
    reached = machine.reached
    return reached.nvlink_latency_s if place.nodes == 1 else reached.network_latency_s


@lru_cache(maxsize=4096)
def distinct_targets(targets: int, draws: float, experts: int | None = None) -> float:
    """Expected number of different targets that a token's experts lie on.

    Args:
        targets: Ranks or nodes, over which experts are spread evenly.
        draws: Different experts that the token takes; a mean, so not always whole.
        experts: Experts; None for so many that drawing one twice does not matter.
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
