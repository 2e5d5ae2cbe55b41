"""The only place that asks NVML (through nvidia-ml-py), for health checks and telemetry.

Every number may be None: NVML does not know it for this card, driver or permission. Tests hand in
a stand-in for the library with the same function names.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self


class NvmlUnavailableError(RuntimeError):
    """NVML cannot be used here.

    Attributes:
        has_driver: Whether a driver is installed and refuses, as opposed to a machine without one.
    """

    def __init__(self, message: str, has_driver: bool) -> None:
        super().__init__(message)
        self.has_driver = has_driver


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
    """A process with memory on a card; `memory` in bytes, None where NVML hides it."""

    pid: int
    memory: int | None


@dataclass(frozen=True)
class Driver:
    """Versions: of the driver ("580.95.05"), and of the newest CUDA it serves, as (13, 0)."""

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
class Card:
    """State of one card at one time. Clocks in MHz, power in W, temperatures in degrees Celsius.

    Attributes:
        index: NVML's number.
        name: Such as "NVIDIA H100 80GB HBM3"; None if the card does not even say that.
        uuid: "GPU-...".
        faults: Errors that queries ended with, such as "GPU is lost", each once.
        recovery_action: What the driver asks for (0 none, 1 reset, 2 reboot, ...).
        ecc_enabled: Whether ECC is on.
        ecc_uncorrected: Uncorrectable errors since the driver was loaded.
        ecc_corrected: Corrected errors since the driver was loaded.
        retired_pages: Pages taken out of use (before Ampere).
        retirement_pending: Whether pages wait for a restart to be retired.
        rows: Remapped rows.
        throttle_reasons: Bit mask `nvmlClocksEventReason...`.
        pcie_generation: Of the link at this time; falls when a card is idle.
        pcie_max_generation: That card and slot can agree on.
        busy_power_state: Whether the card is in P0, the state under load.
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
    """What telemetry reads of one card.

    Power in W, energy in J since the driver was loaded, utilisation and shares 0 to 1, memory in
    bytes, clock in MHz, traffic in bytes a second (PCIe) and bytes since some start (NVLink).
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


class Nvml:
    """An open NVML. Use as a context.

    Args:
        library: The module `pynvml`, or a stand-in with its function names; None imports it.

    Raises:
        NvmlUnavailableError: No driver, or one that does not work.
    """

    def __init__(self, library: Any = None) -> None:
        if library is None:
            try:
                library = importlib.import_module("pynvml")
            except ImportError:
                raise NvmlUnavailableError(
                    "package nvidia-ml-py is missing", has_driver=False
                ) from None
        self._library = library
        # Nothing to say for this card, this driver or this user: not a fault.
        self._silent = (
            library.NVMLError_NotSupported,
            library.NVMLError_FunctionNotFound,
            library.NVMLError_NoPermission,
            library.NVMLError_InvalidArgument,
            library.NVMLError_NotFound,
            library.NVMLError_NoData,
        )
        try:
            library.nvmlInit()
        except library.NVMLError_LibraryNotFound:
            raise NvmlUnavailableError(
                "no NVIDIA driver on this machine", has_driver=False
            ) from None
        except library.NVMLError as error:
            raise NvmlUnavailableError(str(error), has_driver=True) from None

    def __enter__(self) -> Self:
        """Open already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Shut NVML down; samples can no longer be taken."""
        self._library.nvmlShutdown()

    def driver(self) -> Driver:
        """Versions of the driver."""
        version = self._ask("nvmlSystemGetDriverVersion")
        cuda = self._ask("nvmlSystemGetCudaDriverVersion_v2")
        parts = None if cuda is None else (cuda // 1000, cuda % 1000 // 10)
        return Driver(_text(version), parts)

    def count(self) -> int:
        """Cards that NVML shows this process, whatever CUDA_VISIBLE_DEVICES says."""
        return int(self._library.nvmlDeviceGetCount())

    def card(self, index: int) -> Card:
        """State of card `index`; a card that does not answer has `faults`."""
        faults: list[str] = []
        handle = self._ask("nvmlDeviceGetHandleByIndex", index, faults=faults)
        if handle is None:
            return Card(index, faults=tuple(faults) or ("no handle",))
        return _CardReader(self, handle, faults).read(index)

    def index_of(self, uuids: Sequence[str]) -> list[int]:
        """NVML numbers of the cards with these UUIDs, in this order; unknown ones are left out."""
        known = {}
        for index in range(self.count()):
            handle = self._ask("nvmlDeviceGetHandleByIndex", index)
            if handle is not None:
                known[_text(self._ask("nvmlDeviceGetUUID", handle))] = index
        return [known[uuid] for uuid in uuids if uuid in known]

    def sample(self, index: int, with_traffic: bool = True) -> Sample:
        """What telemetry reads of card `index`.

        Args:
            index: NVML's number.
            with_traffic: Also PCIe traffic, for which NVML watches the link 20 ms a direction.
        """
        library = self._library
        handle = self._ask("nvmlDeviceGetHandleByIndex", index)
        if handle is None:
            return Sample()
        busy = self._ask("nvmlDeviceGetUtilizationRates", handle)
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        tx, rx = self.fields(
            handle,
            library.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
            library.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
        )
        pcie: list[float | None] = [None, None]
        if with_traffic:
            counters = (library.NVML_PCIE_UTIL_TX_BYTES, library.NVML_PCIE_UTIL_RX_BYTES)
            ask = "nvmlDeviceGetPcieThroughput"
            pcie = [_scaled(self._ask(ask, handle, c), 1024.0) for c in counters]
        return Sample(
            power=_scaled(self._ask("nvmlDeviceGetPowerUsage", handle), 1e-3),
            energy=_scaled(self._ask("nvmlDeviceGetTotalEnergyConsumption", handle), 1e-3),
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
        """Watch these cards for Xid errors; None where the driver cannot."""
        events = self._ask("nvmlEventSetCreate")
        if events is None:
            return None
        for index in indices:
            handle = self._ask("nvmlDeviceGetHandleByIndex", index)
            if handle is not None:
                kind = self._library.nvmlEventTypeXidCriticalError
                self._ask("nvmlDeviceRegisterEvents", handle, kind, events)
        return FaultWatch(self, events)

    def energies(self, indices: Sequence[int]) -> list[float | None]:
        """Energy in J since the driver was loaded, of each card."""
        energies: list[float | None] = []
        for index in indices:
            handle = self._ask("nvmlDeviceGetHandleByIndex", index)
            counter = self._ask("nvmlDeviceGetTotalEnergyConsumption", handle)
            energies.append(_scaled(counter, 1e-3))
        return energies

    def fields(self, handle: Any, *fields: int | tuple[int, int]) -> list[int | None]:
        """Field values of a card, each None where it has none; a pair is (field, scope)."""
        values = self._ask("nvmlDeviceGetFieldValues", handle, list(fields))
        if values is None:
            return [None] * len(fields)
        return [
            int(_field_number(value, self._library)) if value.nvmlReturn == 0 else None
            for value in values
        ]

    def _ask(self, function: str, *arguments: Any, faults: list[str] | None = None) -> Any:
        """Call a function; None where NVML has no answer. Errors of the card go to `faults`."""
        library = self._library
        try:
            return getattr(library, function)(*arguments)
        except (AttributeError, *self._silent):
            return None
        except library.NVMLError as error:
            if faults is not None and str(error) not in faults:
                faults.append(str(error))
            return None


class FaultWatch:
    """Xid errors of the watched cards since the watch began. Made by `Nvml.watch_faults`."""

    def __init__(self, nvml: Nvml, events: Any) -> None:
        self._nvml, self._events = nvml, events

    def poll(self) -> list[tuple[int | None, int]]:
        """New errors, each as (NVML's number of the card, Xid); never waits."""
        found: list[tuple[int | None, int]] = []
        while True:
            event = self._nvml._ask("nvmlEventSetWait_v2", self._events, 0)
            if event is None:
                # NVML says "timeout" where there is no event.
                return found
            index = self._nvml._ask("nvmlDeviceGetIndex", event.device)
            found.append((index, int(event.eventData)))


class _CardReader:
    """Reads everything about one card; collects what it stumbles over."""

    def __init__(self, nvml: Nvml, handle: Any, faults: list[str]) -> None:
        self._nvml, self._library = nvml, nvml._library
        self._handle, self._faults = handle, faults

    def _ask(self, function: str, *arguments: Any) -> Any:
        return self._nvml._ask(function, self._handle, *arguments, faults=self._faults)

    def read(self, index: int) -> Card:
        """The card's state."""
        card = Card(
            index,
            name=_text(self._ask("nvmlDeviceGetName")),
            uuid=_text(self._ask("nvmlDeviceGetUUID")),
            recovery_action=self._nvml.fields(
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
        return Card(**{**card.__dict__, "faults": tuple(self._faults)})

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
            "power": _scaled(self._ask("nvmlDeviceGetPowerUsage"), 1e-3),
            "power_limit": _scaled(self._ask("nvmlDeviceGetEnforcedPowerLimit"), 1e-3),
            "default_power_limit": _scaled(
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
        found = self._ask("nvmlDeviceGetComputeRunningProcesses") or ()
        return tuple(GpuProcess(int(p.pid), p.usedGpuMemory) for p in found)


def _text(value: Any) -> str | None:
    """Older versions of nvidia-ml-py hand out bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _scaled(value: int | None, factor: float) -> float | None:
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
