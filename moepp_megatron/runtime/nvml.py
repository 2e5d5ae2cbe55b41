"""An open connection to NVML through nvidia-ml-py, for health checks and telemetry."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from moepp_megatron.runtime.gpu_state import (
    ALL_LINKS,
    CardReader,
    Driver,
    GPUState,
    Library,
    Sample,
    scaled,
    text,
)

# "MIG-GPU-<uuid>/<instance>/<slice>" is the name of a MIG device up to driver 470.
_PREFIXES = ("MIG-GPU-", "MIG-", "GPU-")


class NvmlUnavailableError(RuntimeError):
    """NVML cannot be used here; `has_driver` if a driver is installed and refuses."""

    def __init__(self, message: str, has_driver: bool) -> None:
        super().__init__(message)
        self.has_driver = has_driver


class Nvml(AbstractContextManager):
    """An open connection to NVML. Use as a context.

    `library` is `pynvml`, or a stand-in with its function names; None imports it.
    NvmlUnavailableError without a driver, or with one that does not work.
    """

    def __init__(self, library: Any = None) -> None:
        if library is None:
            try:
                library = importlib.import_module("pynvml")
            except ImportError:
                missing = "package nvidia-ml-py is missing"
                raise NvmlUnavailableError(missing, has_driver=False) from None
        try:
            library.nvmlInit()
        except library.NVMLError_LibraryNotFound:
            missing = "no NVIDIA driver on this machine"
            raise NvmlUnavailableError(missing, has_driver=False) from None
        except library.NVMLError as error:
            raise NvmlUnavailableError(str(error), has_driver=True) from None
        self._library = Library(library)
        self._ask = self._library.ask

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Shut NVML down; samples can no longer be taken."""
        self._library.module.nvmlShutdown()

    def driver(self) -> Driver:
        """Versions of the driver."""
        version = self._ask("nvmlSystemGetDriverVersion")
        cuda = self._ask("nvmlSystemGetCudaDriverVersion_v2")
        parts = None if cuda is None else (cuda // 1000, cuda % 1000 // 10)
        return Driver(text(version), parts)

    def count(self) -> int:
        """GPUs that NVML shows this process, whatever CUDA_VISIBLE_DEVICES says."""
        return int(self._library.module.nvmlDeviceGetCount())

    def card(self, index: int) -> GPUState:
        """State of GPU `index`; a GPU that does not answer has `faults`."""
        faults: list[str] = []
        handle = self._ask("nvmlDeviceGetHandleByIndex", index, faults=faults)
        if handle is None:
            return GPUState(index, faults=tuple(faults) or ("no handle",))
        return CardReader(self._library, handle, faults).read(index)

    def index_of(self, uuids: Sequence[str]) -> list[int]:
        """NVML numbers of the GPUs with these UUIDs, in this order; unknown ones are left out.

        The UUID of a MIG device gives the GPU that it is a part of.
        """
        known = {
            _bare_uuid(name): index for index, names in enumerate(self._uuids()) for name in names
        }
        return [known[uuid] for uuid in map(_bare_uuid, uuids) if uuid in known]

    def visible(self, environment: Mapping[str, str] | None = None) -> list[int]:
        """NVML numbers of the GPUs that CUDA shows to a process, in CUDA's order."""
        variables = os.environ if environment is None else environment
        return _visible_indices(variables.get("CUDA_VISIBLE_DEVICES"), self._uuids())

    def _uuids(self) -> list[list[str]]:
        """[GPUs] UUIDs of each GPU and of the MIG devices on it."""
        return [self._uuids_on(index) for index in range(self.count())]

    def _uuids_on(self, index: int) -> list[str]:
        handle = self._ask("nvmlDeviceGetHandleByIndex", index)
        if handle is None:
            return []
        parts = self._ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0
        of_part = "nvmlDeviceGetMigDeviceHandleByIndex"
        handles = [handle, *(self._ask(of_part, handle, part) for part in range(parts))]
        names = [text(self._ask("nvmlDeviceGetUUID", each)) for each in handles if each is not None]
        return [name for name in names if name is not None]

    def sample(self, index: int, with_traffic: bool = True) -> Sample:
        """The values of GPU `index` that telemetry reads.

        With PCIe traffic, for which NVML watches the link for 20 ms per direction.
        """
        library = self._library.module
        handle = self._ask("nvmlDeviceGetHandleByIndex", index)
        if handle is None:
            return Sample()
        busy = self._ask("nvmlDeviceGetUtilizationRates", handle)
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        tx, rx = self._library.fields(
            handle,
            (library.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, ALL_LINKS),
            (library.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, ALL_LINKS),
        )
        pcie: list[float | None] = [None, None]
        if with_traffic:
            counters = (library.NVML_PCIE_UTIL_TX_BYTES, library.NVML_PCIE_UTIL_RX_BYTES)
            ask = "nvmlDeviceGetPcieThroughput"
            pcie = [scaled(self._ask(ask, handle, c), 1024.0) for c in counters]
        return Sample(
            power=scaled(self._ask("nvmlDeviceGetPowerUsage", handle), 1e-3),
            energy=scaled(self._ask("nvmlDeviceGetTotalEnergyConsumption", handle), 1e-3),
            utilization=None if busy is None else busy.gpu / 100.0,
            memory_used=None if memory is None else int(memory.used),
            temperature=self._ask("nvmlDeviceGetTemperature", handle, library.NVML_TEMPERATURE_GPU),
            sm_clock=self._ask("nvmlDeviceGetClockInfo", handle, library.NVML_CLOCK_SM),
            pcie_tx=pcie[0],
            pcie_rx=pcie[1],
            nvlink_tx=None if tx is None else tx * 1024,
            nvlink_rx=None if rx is None else rx * 1024,
        )

    def watch_faults(self, indices: Sequence[int]) -> FaultWatch | None:
        """Watch these GPUs for Xid errors; None where the driver cannot."""
        events = self._ask("nvmlEventSetCreate")
        if events is None:
            return None
        for index in indices:
            handle = self._ask("nvmlDeviceGetHandleByIndex", index)
            if handle is not None:
                kind = self._library.module.nvmlEventTypeXidCriticalError
                self._ask("nvmlDeviceRegisterEvents", handle, kind, events)
        return FaultWatch(self._library, events)

    def energies(self, indices: Sequence[int]) -> list[float | None]:
        """Energy in J since the driver was loaded, of each GPU."""
        energies: list[float | None] = []
        for index in indices:
            handle = self._ask("nvmlDeviceGetHandleByIndex", index)
            counter = self._ask("nvmlDeviceGetTotalEnergyConsumption", handle)
            energies.append(scaled(counter, 1e-3))
        return energies


class FaultWatch:
    """Xid errors of the watched GPUs since the watch began. Made by `Nvml.watch_faults`."""

    def __init__(self, library: Library, events: Any) -> None:
        self._library, self._events = library, events

    def poll(self) -> list[tuple[int | None, int]]:
        """New errors, each as (NVML's number of the GPU, Xid); never waits."""
        errors: list[tuple[int | None, int]] = []
        while True:
            event = self._library.ask("nvmlEventSetWait_v2", self._events, 0)
            if event is None:
                # NVML says "timeout" where there is no event.
                return errors
            index = self._library.ask("nvmlDeviceGetIndex", event.device)
            errors.append((index, int(event.eventData)))


def _bare_uuid(name: str) -> str:
    """Only the UUID of "GPU-...", "MIG-..." or the older "MIG-GPU-.../1/0"."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix).partition("/")[0]
    return name


def _visible_indices(variable: str | None, uuids: Sequence[Sequence[str]]) -> list[int]:
    """NVML's numbers of the GPUs that CUDA shows, in CUDA's order.

    The first entry that names no GPU ends the list, as for CUDA (CUDA C++ Programming Guide,
    "CUDA Environment Variables"). Numbers are CUDA's own, which are NVML's where all GPUs of the
    node are of one kind or CUDA_DEVICE_ORDER is PCI_BUS_ID.

    Args:
        variable: CUDA_VISIBLE_DEVICES, which holds numbers or (beginnings of) UUIDs; None where it
            is not set.
        uuids: [GPUs] UUIDs of each GPU and of the MIG devices on it.
    """
    if variable is None:
        return list(range(len(uuids)))
    indices: list[int] = []
    for entry in variable.split(","):
        index = _index(entry.strip(), uuids)
        if index is None:
            break
        indices.append(index)
    return indices


def _index(entry: str, uuids: Sequence[Sequence[str]]) -> int | None:
    if entry.isdecimal():
        return int(entry) if int(entry) < len(uuids) else None
    wanted = _bare_uuid(entry)
    if wanted == entry or not wanted:
        return None
    named = [
        index
        for index, names in enumerate(uuids)
        if any(_bare_uuid(name).startswith(wanted) for name in names)
    ]
    return named[0] if len(named) == 1 else None
