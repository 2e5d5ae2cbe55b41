"""A cluster of one kind of GPU: rated numbers times reached shares."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.hardware import Hardware
from moepp_megatron.workbench.planning.efficiency import Efficiencies

_NEEDED = (
    "memory_gb",
    "memory_bandwidth_gb_s",
    "network_gbit_s_per_gpu",
    "gpus_per_node",
)


# Compared by identity: it is the key of caches, and one plan has one machine.
@dataclass(frozen=True, eq=False)
class Machine:
    """Reached rates of a GPU, in SI units.

    Attributes:
        hardware: The description it comes from.
        reached: Shares of the rated numbers.
        multiprocessors: Multiprocessors of a GPU.
        memory_bytes: Device memory.
        memory_rate: Bytes per second in kernels that only move data.
        nvlink: Bytes per second and direction inside a node.
        network: Bytes per second and direction of a GPU's port.
        per_node: GPUs of a node.
    """

    hardware: Hardware
    reached: Efficiencies
    multiprocessors: int
    memory_bytes: float
    memory_rate: float
    nvlink: float
    network: float
    per_node: int

    @property
    def usable_bytes(self) -> float:
        """Device memory that a plan may fill."""
        return self.memory_bytes * (1.0 - self.reached.memory_margin)

    def flops(self, number: str) -> float:
        """FLOP/s that products which fill the GPU reach.

        Args:
            number: "fp32", "bf16", "fp8" (tensorwise, delayed), "fp8_blockwise" or "mxfp8".
        """
        share: float = getattr(self.reached, f"{number}_matmul")
        return self.rated(number) * share

    def rated(self, number: str) -> float:
        """Rated FLOP/s of a format."""
        rated = {
            "fp32": self.hardware.fp32_tflops,
            "bf16": self.hardware.bf16_tflops,
            "fp8": self.hardware.fp8_tflops,
            "fp8_blockwise": self.hardware.fp8_tflops,
            "mxfp8": self.hardware.fp8_tflops,
        }[number]
        assert rated is not None, f"{self.hardware.name} has no {number} rate"
        return rated * 1e12


def machine_of(hardware: Hardware, reached: Efficiencies | None = None) -> Machine:
    """The machine of a description.

    Args:
        hardware: The description.
        reached: Shares of its rated numbers; by default the description's own.

    Raises:
        ConfigError: If the description lacks a number that a plan needs.
    """
    lacking = [name for name in _NEEDED if getattr(hardware, name) is None]
    if lacking:
        raise ConfigError(
            f"hardware ({hardware.name}) must give {', '.join(lacking)} for a plan; add "
            f"{'it' if len(lacking) == 1 else 'them'} to a YAML file of your own and name that"
        )
    reached = reached or Efficiencies.of(hardware.reached, f"hardware ({hardware.name})")
    network = hardware.network_gbit_s_per_gpu or 0.0
    nvlink = hardware.nvlink_gb_s
    return Machine(
        hardware=hardware,
        reached=reached,
        multiprocessors=hardware.multiprocessors or 1,
        memory_bytes=hardware.memory_bytes or 0.0,
        memory_rate=(hardware.memory_bandwidth_gb_s or 0.0) * 1e9 * reached.memory,
        # Without NVLink the GPUs of a node reach each other no faster than the network.
        nvlink=nvlink / 2 * 1e9 * reached.nvlink if nvlink else network / 8 * 1e9 * reached.network,
        network=network / 8 * 1e9 * reached.network,
        per_node=hardware.gpus_per_node or 1,
    )
