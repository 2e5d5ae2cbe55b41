"""Samples of devices, and their sums over time and over nodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class DeviceSample:
    """One sample of one device, a GPU or a node's CPU; None for unknown values.

    Attributes:
        power_w: Power, W.
        utilization: Utilisation, 0 to 1.
        clock_mhz: Clock of the multiprocessors.
        memory_bytes: Memory in use.
        temperature_c: Temperature, degrees Celsius.
        nvlink_bytes_per_s: NVLink traffic since the sample before, sent and received.
        pcie_bytes_per_s: PCIe traffic, sent and received.
    """

    power_w: float | None = None
    utilization: float | None = None
    clock_mhz: float | None = None
    memory_bytes: float | None = None
    temperature_c: float | None = None
    nvlink_bytes_per_s: float | None = None
    pcie_bytes_per_s: float | None = None


# Of these the highest counts, of the others the mean.
_HIGHEST = ("memory_bytes", "temperature_c")
_MEANS = tuple(field.name for field in fields(DeviceSample) if field.name not in _HIGHEST)


@dataclass(frozen=True)
class Usage:
    """Usage of devices over a time.

    Attributes:
        sums: Sum of each quantity over devices and samples.
        counts: Number of samples in each sum.
        highest: Highest value of the quantities in which the highest counts.
        energy_j: Energy of all devices, J; None if any of them does not report it.
        devices: Number of devices.
        seconds: Length of the time in seconds.
    """

    sums: dict[str, float]
    counts: dict[str, int]
    highest: dict[str, float]
    energy_j: float | None
    devices: int
    seconds: float

    @classmethod
    def of(
        cls,
        samples: Iterable[Sequence[DeviceSample]],
        energy_j: float | None,
        devices: int,
        seconds: float,
    ) -> Usage:
        """Sum up samples, each of all devices."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        highest: dict[str, float] = {}
        for sample in samples:
            for device in sample:
                for name, value in asdict(device).items():
                    if value is None:
                        continue
                    if name in _HIGHEST:
                        highest[name] = max(value, highest.get(name, value))
                    else:
                        sums[name] = sums.get(name, 0.0) + value
                        counts[name] = counts.get(name, 0) + 1
        return cls(sums, counts, highest, energy_j, devices, seconds)

    def value(self, name: str) -> float | None:
        """Mean or highest value of a quantity of `DeviceSample`; None if no device reported it."""
        assert name in _HIGHEST + _MEANS, f"no quantity {name}"
        if name in _HIGHEST:
            return self.highest.get(name)
        return self.sums[name] / self.counts[name] if self.counts.get(name) else None

    def summands(self) -> list[float]:
        """The values that are summed over nodes, as a vector for `from_vectors`."""
        means = [self.sums.get(name, 0.0) for name in _MEANS]
        counts = [float(self.counts.get(name, 0)) for name in _MEANS]
        unknown = self.energy_j is None
        return [*means, *counts, self.energy_j or 0.0, float(unknown), float(self.devices)]

    def tops(self) -> list[float]:
        """The values whose highest over nodes counts, as a vector for `from_vectors`."""
        return [*(self.highest.get(name, -math.inf) for name in _HIGHEST), self.seconds]

    @classmethod
    def from_vectors(cls, summands: Sequence[float], tops: Sequence[float]) -> Usage:
        """The usage of all nodes, from the sum of `summands` and the maximum of `tops`."""
        width = len(_MEANS)
        energy, unknown, devices = summands[2 * width :]
        return cls(
            dict(zip(_MEANS, summands[:width], strict=True)),
            {name: round(n) for name, n in zip(_MEANS, summands[width : 2 * width], strict=True)},
            {n: top for n, top in zip(_HIGHEST, tops[:-1], strict=True) if math.isfinite(top)},
            # A sum without some of the GPUs would look like a saving.
            energy if unknown == 0 else None,
            round(devices),
            tops[-1],
        )


# What a rank without a sampler has to say.
NOTHING = Usage({}, {}, {}, 0.0, 0, 0.0)
