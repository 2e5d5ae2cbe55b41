"""The conditions under which a pilot was measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

from moepp_megatron.runtime.nvml import Nvml, NvmlUnavailableError


def device_name(on_gpu: bool) -> str:
    """Name of the GPUs or of the processor that ranks compute on.

    Args:
        on_gpu: Whether the runs used GPUs, which this machine need not have.
    """
    if not on_gpu:
        return _processor()
    try:
        with Nvml() as nvml:
            name = nvml.card(0).name if nvml.count() else None
    except NvmlUnavailableError:
        name = None
    return name or "GPU of another machine"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def versions() -> dict[str, str]:
    """Versions of torch and megatron-core, without importing them, which takes seconds."""
    return {"torch": version("torch"), "megatron_core": version("megatron-core")}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine() or "CPU"
