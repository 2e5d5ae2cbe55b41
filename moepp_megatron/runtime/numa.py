"""Keeps a rank on the CPU cores next to its GPU.

In the rank itself, not by torchrun's `--numa-binding` or srun's `--cpu-bind`: so it holds whoever
has started the rank, and needs no `numactl`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

_SYSTEM = Path("/sys")


def bind_to_gpu(device: torch.device) -> None:
    """Let this thread, and those that it starts, run only on cores of its GPU's NUMA node.

    Cores that this process may not use stay out. Does nothing on a CPU, and where the system does
    not say which cores are near.
    """
    if device.type != "cuda":
        return
    # torch's stub file does not know these fields.
    gpu: Any = torch.cuda.get_device_properties(device)
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    near = cores_near(address) & os.sched_getaffinity(0)
    if near:
        os.sched_setaffinity(0, near)


def cores_near(address: str, system: Path = _SYSTEM) -> set[int]:
    """The cores of the NUMA node of a PCI device such as 0000:1b:00.0; empty if not known."""
    try:
        node = int((system / "bus/pci/devices" / address / "numa_node").read_text())
        # A machine with one node says -1: every core is as near as any other.
        cores = system / f"devices/system/node/node{node}/cpulist"
        return set() if node < 0 else _numbers(cores.read_text())
    except (OSError, ValueError):
        return set()


def _numbers(text: str) -> set[int]:
    """The numbers of a list such as `0-3,8,10-11`."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers
