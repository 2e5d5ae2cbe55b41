"""Duration of a layer's passes as a function of its fullest rank's load and of the network."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.layer_time import (
    NETWORK,
    PassTime,
    edge_time,
    layer_key,
    layer_time,
)
from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.memory import fullest_rows
from moepp_megatron.workbench.planning.workload import Workload

Values = NDArray[np.float64]

# Loads at which a layer is timed; in between, times are interpolated.
_POINTS = 49


@dataclass(frozen=True)
class PassTable:
    """Times of an MoE layer at some loads, seconds.

    Attributes:
        skews: Rows of the fullest rank over the mean, ascending [n].
        forward: Forward pass at each [n].
        backward: Backward pass [n].
        forward_slow: Time that a network of half the rate adds to the forward pass [n].
        backward_slow: The same backward [n].
        computing: Share of a layer's time without communication, at even load.
    """

    skews: Values
    forward: Values
    backward: Values
    forward_slow: Values
    backward_slow: Values
    computing: float

    def times(self, skew: Values, slowness: Values | None) -> tuple[Values, Values]:
        """Times of forward and backward pass at these loads.

        Args:
            skew: Any shape.
            slowness: Factor by which a message takes longer on the network than alone [same shape];
                None for 1.
        """
        ahead = np.interp(skew, self.skews, self.forward)
        back = np.interp(skew, self.skews, self.backward)
        if slowness is not None:
            ahead += (slowness - 1.0) * np.interp(skew, self.skews, self.forward_slow)
            back += (slowness - 1.0) * np.interp(skew, self.skews, self.backward_slow)
        return ahead, back


def moe_table(load: Workload, grid: Grid, machine: Machine, highest: float) -> PassTable:
    """Times of an MoE layer for loads from 1 to `highest`."""
    key = layer_key(grid)
    halved = replace(machine, network=machine.network / 2)
    skews = np.linspace(1.0, max(highest, 1.0 + 1e-6), _POINTS)

    def at(skew: float, cluster: Machine) -> PassTime:
        return layer_time(load, key, cluster, True, fullest_rows(load, grid, skew), skew)

    normal = [at(float(skew), machine) for skew in skews]
    slow = [at(float(skew), halved) for skew in skews]
    forward = np.array([one.forward for one in normal])
    backward = np.array([one.backward for one in normal])
    return PassTable(
        skews=skews,
        forward=forward,
        backward=backward,
        forward_slow=np.array([one.forward for one in slow]) - forward,
        backward_slow=np.array([one.backward for one in slow]) - backward,
        computing=computing_share(normal[0]),
    )


def dense_time(load: Workload, grid: Grid, machine: Machine) -> PassTime:
    """Time of a layer without experts."""
    return layer_time(load, layer_key(grid), machine, False, fullest_rows(load, grid), 1.0)


def end_times(load: Workload, grid: Grid, machine: Machine) -> tuple[PassTime, PassTime]:
    """Times of the embedding, and of output layer and loss."""
    key = layer_key(grid)
    return edge_time(load, key, machine, False), edge_time(load, key, machine, True)


def computing_share(time: PassTime) -> float:
    """Share of a layer's passes without exposed communication."""
    if time.total == 0:
        return 1.0
    return 1.0 - sum(time.seconds.get(name, 0.0) for name in NETWORK) / time.total
