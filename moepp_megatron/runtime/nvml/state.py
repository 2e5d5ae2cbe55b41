"""The state of a GPU from NVML, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


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
