"""Sources of samples: a node's GPUs through NVML, or its CPU through psutil."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import psutil

from moepp_megatron.features.telemetry.usage import DeviceSample
from moepp_megatron.runtime.nvml import Nvml


class TelemetrySource:
    """The devices of one node; a source of which only samples are known, such as a CPU's."""

    @property
    def devices(self) -> int:
        """Number of GPUs; 0 if the devices are not GPUs."""
        return 0

    def sample(self) -> list[DeviceSample]:
        """Take one sample of every device."""
        raise NotImplementedError

    def energy_j(self) -> float | None:
        """Energy of all devices since some start, J; None if any does not report it."""
        return None

    def faults(self) -> list[str]:
        """Faults since the last call, as text."""
        return []

    def close(self) -> None:
        """Close the source; no more calls follow."""


class GpuSource(TelemetrySource):
    """GPUs of this node.

    Args:
        uuids: The GPUs that the run uses, "GPU-...".
        nvml: An open NVML, which is closed with this.
    """

    def __init__(
        self, uuids: Sequence[str], nvml: Nvml, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._nvml, self._clock = nvml, clock
        self._indices = nvml.index_of(uuids)
        nvml.watch_faults(self._indices)
        self._traffic: dict[int, tuple[float, int]] = {}

    @property
    def devices(self) -> int:
        """Number of GPUs."""
        return len(self._indices)

    def sample(self) -> list[DeviceSample]:
        """Take one sample of every GPU; takes about 40 ms per GPU, mostly waiting for PCIe."""
        return [self._sample(index) for index in self._indices]

    def _sample(self, index: int) -> DeviceSample:
        seen = self._nvml.sample(index)
        pcie = [rate for rate in (seen.pcie_tx, seen.pcie_rx) if rate is not None]
        return DeviceSample(
            power_w=seen.power,
            utilization=seen.utilization,
            clock_mhz=seen.sm_clock,
            memory_bytes=seen.memory_used,
            temperature_c=seen.temperature,
            nvlink_bytes_per_s=self._nvlink_rate(index, seen.nvlink_tx, seen.nvlink_rx),
            pcie_bytes_per_s=sum(pcie) if len(pcie) == 2 else None,
        )

    def _nvlink_rate(self, index: int, sent: int | None, received: int | None) -> float | None:
        if sent is None or received is None:
            return None
        now, total = self._clock(), sent + received
        before, self._traffic[index] = self._traffic.get(index), (now, total)
        # The counter starts at 0 when the driver is loaded again.
        if before is None or total < before[1] or now <= before[0]:
            return None
        return (total - before[1]) / (now - before[0])

    def energy_j(self) -> float | None:
        """Energy of all GPUs since the driver was loaded."""
        energies = self._nvml.energies(self._indices)
        known = [energy for energy in energies if energy is not None]
        return sum(known) if known and len(known) == len(energies) else None

    def faults(self) -> list[str]:
        """Xid errors that the driver has reported."""
        return [
            f"GPU {index if index is not None else '?'}: Xid {xid}; look for NVRM Xid lines in "
            "dmesg and at moepp doctor on this node"
            for index, xid in self._nvml.new_faults()
        ]

    def close(self) -> None:
        """Shut NVML down."""
        self._nvml.close()


class CpuSource(TelemetrySource):
    """All cores and the memory of this node; only the administrator may read a CPU's energy."""

    def __init__(self) -> None:
        # The first call only marks the start of what the next one measures.
        psutil.cpu_percent()

    def sample(self) -> list[DeviceSample]:
        """Take one sample: use of the cores since the one before, and present use of memory."""
        memory = psutil.virtual_memory()
        used = memory.total - memory.available
        return [DeviceSample(utilization=psutil.cpu_percent() / 100.0, memory_bytes=used)]
