"""Slowdown of an exchange by a shared network: thin spine links and hashed messages.

Nodes are in blocks that one set of leaf switches joins at full rate; messages that leave a block go
through uplinks that all its ports share. A port alone is never shared: `planning/links.py` has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.workbench.planning.links import Placement

Values = NDArray[np.float64]

_BANK = 4096


@dataclass(frozen=True)
class Fabric:
    """The network beyond a node.

    Attributes:
        leaf_nodes: Nodes joined at full rate. 32: a scalable unit of NVIDIA's DGX SuperPOD with
            H100 (RA-11333-001), whose nodes meet on one leaf switch a rail.
        oversubscription: Rate of the ports below a leaf switch over that of its uplinks. 1 is a
            full fat tree, as there; Llama 3's cluster had 7 between pods of 3,072 GPUs
            (arXiv 2407.21783, section 3.3.1).
        hashed_flows: Messages of a port that are under way at a time, each hashed to one uplink;
            0 where switches spread packets over all uplinks (adaptive routing).
    """

    leaf_nodes: int = 32
    oversubscription: float = 1.0
    hashed_flows: int = 0

    def leaving(self, place: Placement) -> float:
        """Share of a group's messages between nodes that leave the block."""
        if place.nodes <= self.leaf_nodes:
            return 0.0
        return (place.nodes - self.leaf_nodes) / (place.nodes - 1)

    def is_idle(self, place: Placement) -> bool:
        """Whether a group's exchange cannot be slowed down."""
        spread_evenly = self.oversubscription <= 1.0 and self.hashed_flows == 0
        return self.leaving(place) == 0.0 or spread_evenly

    def slowness(
        self, rng: np.random.Generator, place: Placement, duty: float, shape: tuple[int, ...]
    ) -> Values:
        """Factor by which an exchange takes longer on the network than alone.

        The ports of a rail's leaf switch that send at the same time share its uplinks; where flows
        are hashed the exchange waits for the fullest uplink.

        Args:
            rng: Random numbers.
            place: Placement of a group's ranks.
            duty: Share of the time that a port is in an exchange.
            shape: Shape of the result.
        """
        leaving = self.leaving(place)
        ports = self.leaf_nodes
        own = min(place.nodes, ports)
        # All ports of the own group send at once; of the other groups' those that happen to.
        others = rng.binomial(max(ports - own, 0), min(max(duty, 0.0), 1.0), _BANK)
        active = own + others
        if self.hashed_flows:
            uplinks = max(round(ports / self.oversubscription), 1)
            flows = np.maximum(np.round(active * self.hashed_flows * leaving), 1).astype(int)
            counts = rng.multinomial(flows, np.full(uplinks, 1.0 / uplinks))
            # Of what a port sends, over the share of a port's rate that an uplink has.
            fullest = counts.max(axis=1) / self.hashed_flows
            through = fullest * uplinks * self.oversubscription / ports
        else:
            through = active * leaving * self.oversubscription / ports
        # Ports and uplinks work at the same time: the slower of both counts.
        factor = np.maximum(through, 1.0)
        return factor[rng.integers(_BANK, size=shape)]
