"""Small messages between the CPUs of all ranks.

Not over NCCL: a check whether all ranks have finished writing must not wait for the GPU.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# A rank may wait this long for another one's disk.
_TIMEOUT = timedelta(hours=1)


class Agreement:
    """Messages between all ranks; every rank must make every call, in the same order."""

    def __init__(self) -> None:
        self._group: Any = None
        if dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def all(self, value: bool) -> bool:
        """True if `value` is true on every rank."""
        flag = torch.tensor([int(value)], device="cpu")
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._group)
        return bool(flag.item())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def first_reason(self, reason: str | None) -> str | None:
        """The first rank's reason against something, named by its rank; None if none has one."""
        for rank, theirs in enumerate(self.gather(reason)):
            if theirs is not None:
                return theirs if dist.get_world_size() == 1 else f"rank {rank}: {theirs}"
        return None
