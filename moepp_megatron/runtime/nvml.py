"""An open connection to NVML through nvidia-ml-py, for health checks and telemetry."""

import importlib
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from moepp_megatron.runtime.gpu_state import ALL_LINKS, SAMPLE, Driver, GPUState, Library

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
        self._events: Any = None

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
        return Driver(version, parts)

    def count(self) -> int:
        """GPUs that NVML shows this process, whatever CUDA_VISIBLE_DEVICES says."""
        return int(self._library.module.nvmlDeviceGetCount())

    def card(self, index: int) -> GPUState:
        """State of GPU `index`; a GPU that does not answer has `faults`."""
        faults: list[str] = []
        handle = self._ask("nvmlDeviceGetHandleByIndex", index, faults=faults)
        if handle is None:
            return GPUState(index, faults=tuple(faults) or ("no handle",))
        return GPUState.read(self._library, handle, index)

    def index_of(self, uuids: Sequence[str]) -> list[int]:
        """NVML numbers of the GPUs with these UUIDs, in this order; unknown ones are left out.

        The UUID of a MIG device gives the GPU that it is a part of.
        """
        known = {
            _bare_uuid(name): index for index, names in enumerate(self._uuids()) for name in names
        }
        return [known[uuid] for uuid in map(_bare_uuid, uuids) if uuid in known]

    def visible(self, environment: Mapping[str, str] | None = None) -> list[int]:
        """NVML numbers of the GPUs that CUDA shows to a process, in CUDA's order.

        CUDA_VISIBLE_DEVICES holds numbers or (beginnings of) UUIDs; the first entry that names no
        GPU ends it, as for CUDA (CUDA C++ Programming Guide, "CUDA Environment Variables"). Numbers
        are CUDA's own, which are NVML's where all GPUs of the node are of one kind or
        CUDA_DEVICE_ORDER is PCI_BUS_ID.
        """
        variables = os.environ if environment is None else environment
        entries, uuids = variables.get("CUDA_VISIBLE_DEVICES"), self._uuids()
        if entries is None:
            return list(range(len(uuids)))
        indices: list[int] = []
        for entry in entries.split(","):
            index = _index(entry.strip(), uuids)
            if index is None:
                break
            indices.append(index)
        return indices

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
        names = [self._ask("nvmlDeviceGetUUID", each) for each in handles if each is not None]
        return [name for name in names if name is not None]

    def sample(self, index: int) -> dict[str, float]:
        """The values of GPU `index` that telemetry reads, by metric; what it lacks is left out.

        `nvlink_bytes` counts all links, both ways, since the driver was loaded.
        """
        library = self._library
        handle = self._ask("nvmlDeviceGetHandleByIndex", index)
        if handle is None:
            return {}
        found = library.answers(handle, SAMPLE)
        pcie = [found.pop(f"pcie_{way}", None) for way in ("tx", "rx")]
        traffic = library.fields(
            handle,
            (library.module.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, ALL_LINKS),
            (library.module.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, ALL_LINKS),
        )
        if None not in pcie:
            found["pcie_bytes_per_s"] = sum(pcie)
        kilobytes = [count for count in traffic if count is not None]
        if len(kilobytes) == 2:
            found["nvlink_bytes"] = sum(kilobytes) * 1024
        return found

    def watch_faults(self, indices: Sequence[int]) -> None:
        """Watch these GPUs for Xid errors, where the driver can."""
        self._events = self._ask("nvmlEventSetCreate")
        kind = self._library.module.nvmlEventTypeXidCriticalError
        for index in indices if self._events is not None else ():
            handle = self._ask("nvmlDeviceGetHandleByIndex", index)
            if handle is not None:
                self._ask("nvmlDeviceRegisterEvents", handle, kind, self._events)

    def new_faults(self) -> list[tuple[int | None, int]]:
        """New Xid errors of watched GPUs, each as (NVML's number of the GPU, Xid); never waits."""
        errors: list[tuple[int | None, int]] = []
        while self._events is not None:
            event = self._ask("nvmlEventSetWait_v2", self._events, 0)
            if event is None:
                # NVML says "timeout" where there is no event.
                break
            errors.append((self._ask("nvmlDeviceGetIndex", event.device), int(event.eventData)))
        return errors

    def energies(self, indices: Sequence[int]) -> list[float | None]:
        """Energy in J since the driver was loaded, of each GPU."""
        energies: list[float | None] = []
        for index in indices:
            handle = self._ask("nvmlDeviceGetHandleByIndex", index)
            counter = self._ask("nvmlDeviceGetTotalEnergyConsumption", handle)
            energies.append(None if counter is None else counter * 1e-3)
        return energies


def _bare_uuid(name: str) -> str:
    """Only the UUID of "GPU-...", "MIG-..." or the older "MIG-GPU-.../1/0"."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix).partition("/")[0]
    return name


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
