"""The only place that asks NVML (through nvidia-ml-py), for health checks and telemetry.

card_reader.py  reads the whole state of one GPU
library.py      calls NVML; distinguishes missing answers from faults, and converts units
session.py      an open connection to NVML; its numbers of the GPUs that CUDA shows
state.py        the state of a GPU from NVML, as plain data

Every number may be None: NVML does not know it for this GPU, driver or permission. Tests hand in
a stand-in for the library with the same function names.
"""

from moepp_megatron.runtime.nvml.session import FaultWatch, Nvml, NvmlUnavailableError
from moepp_megatron.runtime.nvml.state import (
    Driver,
    GpuProcess,
    GPUState,
    NvLink,
    RemappedRows,
    Sample,
)

__all__ = [
    "GPUState",
    "Driver",
    "FaultWatch",
    "GpuProcess",
    "NvLink",
    "Nvml",
    "NvmlUnavailableError",
    "RemappedRows",
    "Sample",
]
