"""Samples the devices of one node from a background thread.

A sample is of one device, a GPU through NVML or the node's CPU through psutil: its values by the
metric of a record that they become (`catalogue.py` says what each means); unknown ones are left
out.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import batched
from typing import Any, NamedTuple

import psutil

from moepp_megatron.runtime.nvml import Nvml

logger = logging.getLogger(__name__)

Sample = dict[str, float]
# Of these metrics the highest value counts, of the others the mean over devices and samples.
_HIGHEST = ("gpu_memory_bytes", "gpu_temperature_c", "host_memory_bytes")
_MEANS = (
    "gpu_power_w",
    "gpu_utilization",
    "gpu_clock_mhz",
    "nvlink_bytes_per_s",
    "pcie_bytes_per_s",
    "cpu_utilization",
)


class Usage(NamedTuple):
    """Usage of devices over a time, as vectors to be reduced over nodes.

    Attributes:
        sums: To be summed: sum and number of values of each mean, energy of the GPUs in J, number
            of nodes that do not report it, number of GPUs.
        highest: Of which the largest counts: the highest values, -inf for unknown ones, and the
            length of the time in seconds.
    """

    sums: list[float]
    highest: list[float]

    @classmethod
    def of(
        cls,
        samples: Iterable[Sequence[Sample]],
        energy_j: float | None,
        devices: int,
        seconds: float,
    ) -> "Usage":
        """Sum up samples of one node, each of all devices."""
        known = [device for sample in samples for device in sample]
        values = {
            name: [device[name] for device in known if name in device]
            for name in (*_MEANS, *_HIGHEST)
        }
        sums = [float(of(values[name])) for name in _MEANS for of in (sum, len)]
        highest = [max(values[name], default=-math.inf) for name in _HIGHEST]
        energy = [energy_j or 0.0, float(energy_j is None), float(devices)]
        return cls([*sums, *energy], [*highest, seconds])

    def metrics(self, tokens: int) -> dict[str, Any]:
        """Fields of a record; `tokens` were trained on in the time."""
        *means, energy_j, unknown, devices = self.sums
        *highest, seconds = self.highest
        found: dict[str, Any] = {
            name: total / count
            for name, (total, count) in zip(_MEANS, batched(means, 2), strict=True)
            if count
        }
        for name, value in zip(_HIGHEST, highest, strict=True):
            if math.isfinite(value):
                found[name] = int(value) if name.endswith("_bytes") else value
        if devices:
            found["gpu_hours"] = seconds * devices / 3600
        # A sum without some of the GPUs would look like a saving.
        if not unknown:
            found["energy_j"] = energy_j
            if tokens > 0:
                found["energy_per_token_j"] = energy_j / tokens
        return found


# What a rank without a sampler has to say.
NOTHING = Usage.of((), 0.0, 0, 0.0)


class Source:
    """The devices of one node; by itself, a source that has samples only, such as a CPU's."""

    # Number of GPUs; 0 if the devices are not GPUs.

    devices = 0

    def sample(self) -> list[Sample]:
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


class GpuSource(Source):
    """GPUs of this node."""

    def __init__(
        self, uuids: Sequence[str], nvml: Nvml, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._nvml, self._clock = nvml, clock
        self._indices = nvml.index_of(uuids)
        self.devices = len(self._indices)
        nvml.watch_faults(self._indices)
        self._traffic: dict[int, tuple[float, float]] = {}

    def sample(self) -> list[Sample]:
        """Take one sample of every GPU; takes about 40 ms per GPU, mostly waiting for PCIe."""
        return [self._sample(index) for index in self._indices]

    def _sample(self, index: int) -> Sample:
        found = self._nvml.sample(index)
        total = found.pop("nvlink_bytes", None)
        if total is None:
            return found
        now = self._clock()
        before, self._traffic[index] = self._traffic.get(index), (now, total)
        # The counter starts at 0 when the driver is loaded again.
        if before is not None and total >= before[1] and now > before[0]:
            found["nvlink_bytes_per_s"] = (total - before[1]) / (now - before[0])
        return found

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


class CpuSource(Source):
    """All cores and the memory of this node; only the administrator may read a CPU's energy."""

    def __init__(self) -> None:
        # The first call only marks the start of what the next one measures.
        psutil.cpu_percent()

    def sample(self) -> list[Sample]:
        """Take one sample: use of the cores since the one before, and present use of memory."""
        memory = psutil.virtual_memory()
        used = memory.total - memory.available
        return [{"cpu_utilization": psutil.cpu_percent() / 100.0, "host_memory_bytes": used}]


class Sampler:
    """Samples a source every `interval_s` seconds until stopped.

    A source that fails is dropped with a warning, because telemetry must not end a run.
    """

    def __init__(
        self,
        source: Source,
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source, self._interval_s, self._clock = source, interval_s, clock
        self._lock = threading.Lock()
        self._samples: list[list[Sample]] = []
        self._last: list[Sample] = []
        self._stop = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="moepp-telemetry", daemon=True)
        self._begun, self._energy = clock(), self._read_energy()

    def start(self) -> None:
        """Start sampling; the first sample exists on return, so that every `take` has one."""
        self.look()
        self._begun, self._energy = self._clock(), self._read_energy()
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close the source."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._source.close()

    def look(self) -> None:
        """Take one sample now."""
        if self._failed:
            return
        try:
            sample = self._source.sample()
            faults = self._source.faults()
        except Exception as error:
            self._give_up(error)
            return
        for fault in faults:
            logger.error("%s", fault)
        with self._lock:
            self._samples.append(sample)
            self._last = sample

    def take(self) -> Usage:
        """The usage since `start` or the last `take`.

        It costs a read of the energy counters. If no sample fell into the time, the newest counts.
        """
        now, energy = self._clock(), self._read_energy()
        with self._lock:
            samples, self._samples = self._samples, []
            samples = samples or ([self._last] if self._last else [])
        spent = None
        if energy is not None and self._energy is not None and energy >= self._energy:
            spent = energy - self._energy
        usage = Usage.of(samples, spent, self._source.devices, now - self._begun)
        self._begun, self._energy = now, energy
        return usage

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.look()

    def _read_energy(self) -> float | None:
        if self._failed:
            return None
        try:
            return self._source.energy_j()
        except Exception as error:
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        logger.warning("telemetry is off from here on: %s", error)
