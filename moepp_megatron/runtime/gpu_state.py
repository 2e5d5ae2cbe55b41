"""Reads the state of a GPU from NVML as plain data.

Every number may be None: NVML does not know it for this GPU, driver or permission. Tests hand in a
stand-in for the library with the same function names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# In place of a link's number in a field of NVLink: the sum over all links (nvml.h, `scopeId`).
ALL_LINKS = 2**32 - 1


# Converts the answer; the function; names of constants that it takes.
_Query = tuple[Callable[[Any], Any], str, *tuple[str, ...]]


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

    def answers(
        self, handle: Any, queries: Mapping[str, _Query], faults: list[str] | None = None
    ) -> dict[str, Any]:
        """Answers about a GPU by name, converted; those that NVML does not have are left out."""
        found = {}
        for name, (convert, function, *constants) in queries.items():
            arguments = (getattr(self.module, constant) for constant in constants)
            answer = self.ask(function, handle, *arguments, faults=faults)
            if answer is not None:
                found[name] = convert(answer)
        return found

    def fields(self, handle: Any, *fields: int | tuple[int, int]) -> list[int | None]:
        """Field values of a GPU, each None where it has none; of an NVLink field (field, link)."""
        values = self.ask("nvmlDeviceGetFieldValues", handle, list(fields))
        if values is None:
            return [None] * len(fields)
        return [
            int(_field_number(value, self.module)) if value.nvmlReturn == 0 else None
            for value in values
        ]


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
class _NvLink:
    """One NVLink link: whether it is up, and its recoveries since the driver was loaded."""

    index: int
    active: bool
    recoveries: int | None = None


@dataclass(frozen=True)
class _GpuProcess:
    """A process with memory on a GPU; `memory` in bytes, None where NVML hides it."""

    pid: int
    memory: int | None


@dataclass(frozen=True)
class Driver:
    """Versions of the driver ("580.95.05") and of the newest CUDA that it supports, as (13, 0)."""

    version: str | None
    cuda: tuple[int, int] | None


@dataclass(frozen=True)
class _RemappedRows:
    """Rows of device memory that wait to be replaced by spare ones, or could not be."""

    pending: bool
    failed: bool


@dataclass(frozen=True)
class GPUState:
    """State of one GPU at one time; power in W.

    Attributes:
        index: NVML's number.
        name: Product name such as "NVIDIA H100 80GB HBM3"; None if unknown.
        uuid: "GPU-...".
        faults: Errors that queries ended with, such as "GPU is lost", each once.
        recovery_action: The driver's demand (0 none, 1 reset, 2 reboot, ...).
        ecc_uncorrected: Uncorrectable errors since the driver was loaded.
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
    rows: _RemappedRows | None = None
    throttle_reasons: int | None = None
    power_limit: float | None = None
    default_power_limit: float | None = None
    pcie_generation: int | None = None
    pcie_max_generation: int | None = None
    pcie_width: int | None = None
    busy_power_state: bool | None = None
    links: tuple[_NvLink, ...] = ()
    processes: tuple[_GpuProcess, ...] = ()

    @classmethod
    def read(cls, library: Library, handle: Any, index: int) -> "GPUState":
        """Everything about GPU `index`, with the errors of the queries."""
        faults: list[str] = []
        found = library.answers(handle, _STATE, faults)
        found["links"] = _links(library, handle, faults)
        (action,) = library.fields(handle, library.module.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION)
        return cls(index, faults=tuple(faults), recovery_action=action, **found)


def _milli(value: int) -> float:
    """A number of thousandths, as NVML gives power and energy."""
    return value * 1e-3


def _rows(rows: tuple[int, int, int, int]) -> _RemappedRows:
    _, _, pending, failed = rows
    return _RemappedRows(bool(pending), bool(failed))


def _processes(processes: Sequence[Any]) -> tuple[_GpuProcess, ...]:
    return tuple(_GpuProcess(int(each.pid), each.usedGpuMemory) for each in processes)


_STATE: dict[str, _Query] = {
    "name": (str, "nvmlDeviceGetName"),
    "uuid": (str, "nvmlDeviceGetUUID"),
    "throttle_reasons": (int, "nvmlDeviceGetCurrentClocksEventReasons"),
    "processes": (_processes, "nvmlDeviceGetComputeRunningProcesses"),
    "rows": (_rows, "nvmlDeviceGetRemappedRows"),
    "ecc_enabled": (lambda mode: bool(mode[0]), "nvmlDeviceGetEccMode"),
    "ecc_uncorrected": (
        int,
        "nvmlDeviceGetTotalEccErrors",
        "NVML_MEMORY_ERROR_TYPE_UNCORRECTED",
        "NVML_VOLATILE_ECC",
    ),
    "power_limit": (_milli, "nvmlDeviceGetEnforcedPowerLimit"),
    "default_power_limit": (_milli, "nvmlDeviceGetPowerManagementDefaultLimit"),
    # NVML_PSTATE_0.
    "busy_power_state": (lambda state: state == 0, "nvmlDeviceGetPerformanceState"),
    "pcie_generation": (int, "nvmlDeviceGetCurrPcieLinkGeneration"),
    "pcie_max_generation": (int, "nvmlDeviceGetMaxPcieLinkGeneration"),
    "pcie_width": (int, "nvmlDeviceGetCurrPcieLinkWidth"),
}
SAMPLE: dict[str, _Query] = {
    "gpu_power_w": (_milli, "nvmlDeviceGetPowerUsage"),
    "gpu_utilization": (lambda rates: rates.gpu / 100.0, "nvmlDeviceGetUtilizationRates"),
    "gpu_memory_bytes": (lambda memory: int(memory.used), "nvmlDeviceGetMemoryInfo"),
    "gpu_temperature_c": (int, "nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"),
    "gpu_clock_mhz": (int, "nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
    **{
        f"pcie_{way}": (
            lambda kilobytes: kilobytes * 1024.0,
            "nvmlDeviceGetPcieThroughput",
            f"NVML_PCIE_UTIL_{way.upper()}_BYTES",
        )
        for way in ("tx", "rx")
    },
}


def _links(library: Library, handle: Any, faults: list[str]) -> tuple[_NvLink, ...]:
    links = []
    for index in range(library.module.NVML_NVLINK_MAX_LINKS):
        state = library.ask("nvmlDeviceGetNvLinkState", handle, index, faults=faults)
        if state is None:
            # Links are numbered without gaps, so that the first unknown one ends them.
            break
        counter = library.module.NVML_NVLINK_ERROR_DL_RECOVERY
        recoveries = library.ask(
            "nvmlDeviceGetNvLinkErrorCounter", handle, index, counter, faults=faults
        )
        links.append(_NvLink(index, bool(state), recoveries))
    return tuple(links)
