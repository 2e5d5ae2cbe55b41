"""Which GPU a rank computes on."""

from __future__ import annotations

import socket

import torch
import torch.distributed as dist

from moepp_megatron.config.errors import UnfitError
from moepp_megatron.runtime.rank import RankEnvironment


def own_gpu(environment: RankEnvironment, store: dist.Store | None) -> torch.device:
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
