"""Reads the state of a GPU from NVML as plain data.

Every number may be None: NVML does not know it for this GPU, driver or permission. Tests hand in a
stand-in for the library with the same function names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# In place of a link's number in a field of NVLink: the sum over all links (nvml.h, `scopeId`).
ALL_LINKS = 2**32 - 1


class Library:
    """The functions of NVML (`pynvml`, initialized, or a stand-in) without its exceptions."""

    def __init__(self, module: Any) -> None:
        self.module = module
        # Nothing to say for this GPU, this driver or this user: not a fault.
        self._silent = (
            module.NVMLError_NotSupported,
            module.NVMLError_FunctionNotFound,
            module.NVMLError_NoPermission,
            module.NVMLError_InvalidArgument,
            module.NVMLError_NotFound,
            module.NVMLError_NoData,
        )

    def ask(self, function: str, *arguments: Any, faults: list[str] | None = None) -> Any:
        """Call a function; None where NVML has no answer. Errors of the GPU go to `faults`."""
        try:
            return getattr(self.module, function)(*arguments)
        except (AttributeError, *self._silent):
            return None
        except self.module.NVMLError as error:
            if faults is not None and str(error) not in faults:
                faults.append(str(error))
            return None

    def fields(self, handle: Any, *fields: int | tuple[int, int]) -> list[int | None]:
        """Field values of a GPU, each None where it has none; of an NVLink field (field, link)."""
        values = self.ask("nvmlDeviceGetFieldValues", handle, list(fields))
        if values is None:
            return [None] * len(fields)
        return [
            int(_field_number(value, self.module)) if value.nvmlReturn == 0 else None
            for value in values
        ]


def text(value: Any) -> str | None:
    """Older versions of nvidia-ml-py hand out bytes."""
    return value.decode() if isinstance(value, bytes) else value


def scaled(value: int | None, factor: float) -> float | None:
    """An integer of NVML in another unit."""
    return None if value is None else value * factor


def _field_number(value: Any, library: Any) -> float:
    """The member of a field value's union that its type names."""
    members = {
        library.NVML_VALUE_TYPE_DOUBLE: "dVal",
        library.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
        library.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
        library.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
        library.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
        library.NVML_VALUE_TYPE_SIGNED_INT: "siVal",
    }
    return float(getattr(value.value, members[value.valueType]))


@dataclass(frozen=True)
class NvLink:
    """One NVLink link: whether it is up, and its errors since the driver was loaded."""

    index: int
    active: bool
    crc_errors: int | None = None
    replays: int | None = None
    recoveries: int | None = None


@dataclass(frozen=True)
class GpuProcess:
    """A process with memory on a GPU; `memory` in bytes, None where NVML hides it."""

    pid: int
    memory: int | None


@dataclass(frozen=True)
class Driver:
    """Versions of the driver ("580.95.05") and of the newest CUDA that it supports, as (13, 0)."""

    version: str | None
    cuda: tuple[int, int] | None


@dataclass(frozen=True)
class RemappedRows:
    """Rows of device memory replaced by spare ones (Ampere and newer)."""

    correctable: int
    uncorrectable: int
    pending: bool
    failed: bool


@dataclass(frozen=True)
class GPUState:
    """State of one GPU at one time. Clocks in MHz, power in W, temperatures in degrees Celsius.

    Attributes:
        index: NVML's number.
        name: Product name such as "NVIDIA H100 80GB HBM3"; None if unknown.
        uuid: "GPU-...".
        faults: Errors that queries ended with, such as "GPU is lost", each once.
        recovery_action: The driver's demand (0 none, 1 reset, 2 reboot, ...).
        ecc_uncorrected: Uncorrectable errors since the driver was loaded.
        ecc_corrected: Corrected errors since the driver was loaded.
        retired_pages: Pages taken out of use (before Ampere).
        retirement_pending: Whether pages wait for a restart to be retired.
        throttle_reasons: Bit mask `nvmlClocksEventReason...`.
        pcie_generation: Present generation of the link; falls when a GPU is idle.
        pcie_max_generation: Highest generation that GPU and slot support.
        busy_power_state: Whether the GPU is in P0, the state under load.
    """

    index: int
    name: str | None = None
    uuid: str | None = None
    faults: tuple[str, ...] = ()
    recovery_action: int | None = None
    ecc_enabled: bool | None = None
    ecc_uncorrected: int | None = None
    ecc_corrected: int | None = None
    retired_pages: int | None = None
    retirement_pending: bool | None = None
    rows: RemappedRows | None = None
    throttle_reasons: int | None = None
    sm_clock: int | None = None
    max_sm_clock: int | None = None
    power: float | None = None
    power_limit: float | None = None
    default_power_limit: float | None = None
    temperature: int | None = None
    slowdown_temperature: int | None = None
    pcie_generation: int | None = None
    pcie_max_generation: int | None = None
    pcie_width: int | None = None
    pcie_replays: int | None = None
    busy_power_state: bool | None = None
    links: tuple[NvLink, ...] = ()
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One GPU's values for telemetry.

    Power in W, energy in J since the driver was loaded, utilisation and shares 0 to 1, memory in
    bytes, clock in MHz, traffic in bytes per second (PCIe) and bytes since some start (NVLink).
    """

    power: float | None = None
    energy: float | None = None
    utilization: float | None = None
    memory_used: int | None = None
    temperature: int | None = None
    sm_clock: int | None = None
    pcie_tx: float | None = None
    pcie_rx: float | None = None
    nvlink_tx: int | None = None
    nvlink_rx: int | None = None


class CardReader:
    """Reads everything about one GPU; collects the errors of its queries."""

    def __init__(self, library: Library, handle: Any, faults: list[str]) -> None:
        self._calls, self._library = library, library.module
        self._handle, self._faults = handle, faults

    def _ask(self, function: str, *arguments: Any) -> Any:
        return self._calls.ask(function, self._handle, *arguments, faults=self._faults)

    def read(self, index: int) -> GPUState:
        """The GPU's state."""
        card = GPUState(
            index,
            name=text(self._ask("nvmlDeviceGetName")),
            uuid=text(self._ask("nvmlDeviceGetUUID")),
            recovery_action=self._calls.fields(
                self._handle, self._library.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
            )[0],
            throttle_reasons=self._ask("nvmlDeviceGetCurrentClocksEventReasons"),
            links=self._links(),
            processes=self._processes(),
            rows=self._rows(),
            **self._memory_errors(),
            **self._clocks_and_power(),
            **self._pcie(),
        )
        # What was found on the way counts too, so this comes last.
        return GPUState(**{**card.__dict__, "faults": tuple(self._faults)})

    def _memory_errors(self) -> dict[str, Any]:
        library = self._library
        mode = self._ask("nvmlDeviceGetEccMode")
        counters = [
            self._ask("nvmlDeviceGetTotalEccErrors", kind, library.NVML_VOLATILE_ECC)
            for kind in (
                library.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                library.NVML_MEMORY_ERROR_TYPE_CORRECTED,
            )
        ]
        causes = (
            library.NVML_PAGE_RETIREMENT_CAUSE_MULTIPLE_SINGLE_BIT_ECC_ERRORS,
            library.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR,
        )
        pages = [self._ask("nvmlDeviceGetRetiredPages", cause) for cause in causes]
        pending = self._ask("nvmlDeviceGetRetiredPagesPendingStatus")
        return {
            "ecc_enabled": None if mode is None else bool(mode[0]),
            "ecc_uncorrected": counters[0],
            "ecc_corrected": counters[1],
            "retired_pages": None if pages == [None, None] else sum(len(p or ()) for p in pages),
            "retirement_pending": None if pending is None else bool(pending),
        }

    def _rows(self) -> RemappedRows | None:
        rows = self._ask("nvmlDeviceGetRemappedRows")
        if rows is None:
            return None
        correctable, uncorrectable, pending, failed = rows
        return RemappedRows(correctable, uncorrectable, bool(pending), bool(failed))

    def _clocks_and_power(self) -> dict[str, Any]:
        library = self._library
        state = self._ask("nvmlDeviceGetPerformanceState")
        return {
            "sm_clock": self._ask("nvmlDeviceGetClockInfo", library.NVML_CLOCK_SM),
            "max_sm_clock": self._ask("nvmlDeviceGetMaxClockInfo", library.NVML_CLOCK_SM),
            "power": scaled(self._ask("nvmlDeviceGetPowerUsage"), 1e-3),
            "power_limit": scaled(self._ask("nvmlDeviceGetEnforcedPowerLimit"), 1e-3),
            "default_power_limit": scaled(
                self._ask("nvmlDeviceGetPowerManagementDefaultLimit"), 1e-3
            ),
            "temperature": self._ask("nvmlDeviceGetTemperature", library.NVML_TEMPERATURE_GPU),
            "slowdown_temperature": self._ask(
                "nvmlDeviceGetTemperatureThreshold", library.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
            ),
            "busy_power_state": None if state is None else state == library.NVML_PSTATE_0,
        }

    def _pcie(self) -> dict[str, Any]:
        return {
            "pcie_generation": self._ask("nvmlDeviceGetCurrPcieLinkGeneration"),
            "pcie_max_generation": self._ask("nvmlDeviceGetMaxPcieLinkGeneration"),
            "pcie_width": self._ask("nvmlDeviceGetCurrPcieLinkWidth"),
            "pcie_replays": self._ask("nvmlDeviceGetPcieReplayCounter"),
        }

    def _links(self) -> tuple[NvLink, ...]:
        library, links = self._library, []
        for index in range(library.NVML_NVLINK_MAX_LINKS):
            state = self._ask("nvmlDeviceGetNvLinkState", index)
            if state is None:
                # Links are numbered without gaps, so that the first unknown one ends them.
                break
            crc, replays, recoveries = (
                self._ask("nvmlDeviceGetNvLinkErrorCounter", index, counter)
                for counter in (
                    library.NVML_NVLINK_ERROR_DL_CRC_FLIT,
                    library.NVML_NVLINK_ERROR_DL_REPLAY,
                    library.NVML_NVLINK_ERROR_DL_RECOVERY,
                )
            )
            links.append(NvLink(index, bool(state), crc, replays, recoveries))
        return tuple(links)

    def _processes(self) -> tuple[GpuProcess, ...]:
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses") or ()
        return tuple(GpuProcess(int(p.pid), p.usedGpuMemory) for p in processes)
