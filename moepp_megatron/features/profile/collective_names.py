"""Process group and number of every collective, as a range in the trace.

NCCL's kernels name their group in a trace. gloo's do not, and neither says which call on one rank
belongs to which on another. So while a profile is recorded, every call is in a range
`moepp/comm/GROUP/NUMBER/METHOD`: NUMBER counts the calls of a group, which are in the same order
on all of its ranks. Sends and receives are counted by direction, with ranks in the group:
`moepp/comm/GROUP/FROM>TO.NUMBER/send`.

On a CPU the thread that trains waits in `Work.wait`: it is in a range `moepp/wait`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.profiler import record_function

from moepp_megatron.features.profile.ranges import PREFIX, Ranges

# The doors of c10d, whatever function they are called by. Names differ between torch versions.
_METHODS = (
    "_allgather_base",
    "_reduce_scatter_base",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "gather_single",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
)
_TO_ONE = ("send", "recv")


class CollectiveNames:
    """Adds the ranges; `Ranges.undo` removes them."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, str]] = Counter()

    def put(self, ranges: Ranges) -> None:
        """Name every collective from now on."""
        group = dist.ProcessGroup
        for method in _METHODS:
            if hasattr(group, method):
                ranges.replace(group, method, functools.partial(self._numbered, method))
        for method in _TO_ONE:
            ranges.replace(group, method, functools.partial(self._between_two, method))
        if dist.get_backend() == "gloo":
            ranges.around(dist.Work, "wait", "wait")

    def _numbered(self, method: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def inner(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            with record_function(self._name(group, method, "")):
                return function(group, *args, **kwargs)

        return inner

    def _between_two(self, method: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def inner(group: dist.ProcessGroup, tensors: Any, peer: int, *args: Any) -> Any:
            ends = (group.rank(), peer) if method == "send" else (peer, group.rank())
            with record_function(self._name(group, method, f"{ends[0]}>{ends[1]}.")):
                return function(group, tensors, peer, *args)

        return inner

    def _name(self, group: dist.ProcessGroup, method: str, ends: str) -> str:
        key = (group.group_name, ends)
        number = self._calls[key]
        self._calls[key] += 1
        return f"{PREFIX}comm/{group.group_name}/{ends}{number}/{method}"
