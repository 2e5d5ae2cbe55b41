"""The link that a process group's messages take, and its rated bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.config.hardware import Hardware, find_hardware
from moepp_megatron.tools.profiling.collective import Collective
from moepp_megatron.tools.profiling.trace import RankTrace


@dataclass(frozen=True)
class Link:
    """A kind of link.

    Attributes:
        name: NVLink, network, or this machine if it has no GPU.
        peak_gb_s: Rated bandwidth of one direction of a GPU, 1e9 bytes/s; None where unknown.
    """

    name: str
    peak_gb_s: float | None = None


def _link_peaks(hardware: Hardware | None) -> dict[str, float | None]:
    """Rated GB/s of a GPU in one direction, by `nvlink` and `network`; None where unknown."""
    both = hardware.nvlink_gb_s if hardware else None
    bits = hardware.network_gbit_s_per_gpu if hardware else None
    # NVLink is rated with both directions added; nccl-tests' bus bandwidth is that of one.
    return {"nvlink": both / 2 if both else None, "network": bits / 8 if bits else None}


class Links:
    """Link of each call, by the nodes and the GPU that the traces name."""

    def __init__(self, traces: list[RankTrace]) -> None:
        self._on_gpu = any(trace.on_gpu for trace in traces)
        self._nodes = traces[0].about.nodes
        self.hardware = find_hardware(traces[0].about.device) if self._on_gpu else None

    def of(self, call: Collective) -> Link:
        """The slowest link that the group's messages must take."""
        nodes = {
            self._nodes[rank] if rank < len(self._nodes) else None for rank in call.group_ranks
        }
        if not nodes or None in nodes:
            return Link("unknown")
        if not self._on_gpu:
            return Link("this machine" if len(nodes) == 1 else "network")
        peaks = _link_peaks(self.hardware)
        if len(nodes) == 1:
            return Link("NVLink", peaks["nvlink"])
        return Link("network", peaks["network"])
