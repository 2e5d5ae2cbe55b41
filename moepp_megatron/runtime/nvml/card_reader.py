"""Reads the whole state of one GPU."""

from __future__ import annotations

from typing import Any

from moepp_megatron.runtime.nvml.library import Library, scaled, text
from moepp_megatron.runtime.nvml.state import GpuProcess, GPUState, NvLink, RemappedRows


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
