"""The GPU that a rank computes on, and the CPU cores next to it.

The rank binds itself to these cores, not torchrun by `--numa-binding` or srun by `--cpu-bind`: so
the binding holds however the rank was started, and needs no `numactl`.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moepp_megatron.config.errors import UnfitError
from moepp_megatron.runtime.rank import RankEnvironment

_SYSTEM = Path("/sys")


def gpu_of_rank(environment: RankEnvironment, store: dist.Store | None) -> torch.device:
    """The GPU of this rank: of those of the node the one of its number, or the first of its own.

    A scheduler may show each rank only its own GPUs (`srun --gpus-per-task=1`). All of them are
    then number 0, so ranks of a node that see fewer GPUs than they are exchange which they have,
    through `store`; it is None where they have met already, and each has chosen.

    Raises:
        UnfitError: More ranks than GPUs, on every rank of the node.
    """
    if environment.local_world_size <= torch.cuda.device_count():
        return torch.device("cuda", environment.local_rank)
    if store is None:
        return torch.device("cuda", torch.cuda.current_device())
    node = f"gpu of {socket.gethostname()}"
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    store.set(f"{node} {environment.local_rank}", uuid)
    ranks = range(environment.local_world_size)
    gpus = {store.get(f"{node} {rank}") for rank in ranks}
    if len(gpus) < len(ranks):
        here = max(len(gpus), torch.cuda.device_count())
        raise UnfitError(
            f"ranks of {socket.gethostname()} ({len(ranks)}) must be at most its GPUs ({here}), "
            f"since NCCL takes one rank a GPU; start {here} there, or show every rank a GPU of its "
            "own"
        )
    return torch.device("cuda", 0)


def bind_to_gpu(device: torch.device) -> None:
    """Let this thread, and those that it starts, run only on cores of its GPU's NUMA node.

    Cores that this process may not use are left out. Does nothing on a CPU, and if the system does
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
