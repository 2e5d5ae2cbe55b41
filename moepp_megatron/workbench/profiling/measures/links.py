"""The link that a process group's messages take, and its peak bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moepp_megatron.config.hardware import Hardware, find_hardware
from moepp_megatron.workbench.profiling.collective import Collective
from moepp_megatron.workbench.profiling.trace import RankTrace

# Bus bandwidth in GB/s that a call could reach; None where nobody has measured it.
MeasuredPeak = Callable[[Collective], float | None]


@dataclass(frozen=True)
class Link:
    """A kind of link.

    Attributes:
        name: NVLink, network, or this machine if it has no GPU.
        peak_gb_s: Rated bandwidth of one direction of a GPU, 1e9 bytes/s; None where unknown.
    """

    name: str
    peak_gb_s: float | None = None


class Links:
    """Which link each call takes.

    Args:
        traces: All recorded ranks.
        hardware: Description of the GPUs; found by their name if None.
    """

    def __init__(self, traces: list[RankTrace], hardware: Hardware | None = None) -> None:
        self._on_gpu = any(trace.on_gpu for trace in traces)
        about = traces[0].about
        self._nodes: list[str] = list(about.get("nodes", []))
        self.hardware = hardware
        if hardware is None and self._on_gpu:
            self.hardware = find_hardware(str(about.get("device", "")))

    def of(self, call: Collective) -> Link:
        """The slowest link that the group's messages must take."""
        nodes = {
            self._nodes[rank] if rank < len(self._nodes) else None for rank in call.group_ranks
        }
        if not nodes or None in nodes:
            return Link("unknown")
        if not self._on_gpu:
            return Link("this machine" if len(nodes) == 1 else "network")
        if len(nodes) == 1:
            both = self.hardware.nvlink_gb_s if self.hardware else None
            # Rated with both directions added; nccl-tests' bus bandwidth is that of one.
            return Link("NVLink", both / 2 if both else None)
        bits = self.hardware.network_gbit_s_per_gpu if self.hardware else None
        return Link("network", bits / 8 if bits else None)
