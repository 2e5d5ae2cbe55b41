"""Reads traces of torch's profiler (Kineto), of NCCL and of gloo.

**NCCL.** `record_param_comms` marks the call on the host, a kernel `ncclDevKernel_...` the transfer
on its stream; both carry the same arguments, and an `External id` that links them. Times are the
kernel's: from the first rank's wait for the last to the end of the transfer.

**gloo.** `c10d::...` marks the call on the training thread. The transfer is a range `gloo:...` on
one of gloo's own threads (on the training thread for send and receive), which says its tensor's
shape and not its group. Calls of a kind and shape are matched with transfers of that kind and
shape in order of time. Times are the transfer's: from when gloo's thread takes it up, waiting for
other ranks included. A reduce-scatter of gloo is an all-reduce inside.

Times in a trace are microseconds after `baseTimeNanoseconds`.
"""

from __future__ import annotations

import gzip
import zlib
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from moepp_megatron.config.json_file import parse_json
from moepp_megatron.workbench.profiling.collective import Collective, Operation
from moepp_megatron.workbench.profiling.formats.kineto_events import (
    Around,
    Event,
    Swept,
    complete,
    key,
    span,
    sweep,
)
from moepp_megatron.workbench.profiling.formats.kineto_sizes import (
    Sizes,
    operation_of,
    sizes_of_cpu,
    sizes_of_nccl,
    whole_list,
)
from moepp_megatron.workbench.profiling.groups import TracedGroup
from moepp_megatron.workbench.profiling.trace import ProfileError, RankTrace

_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST_CALL = "record_param_comms"


def read_kineto(path: Path) -> RankTrace:
    """Read a `.pt.trace.json` or `.pt.trace.json.gz` file.

    Raises:
        ProfileError: If it is not such a file.
    """
    try:
        raw = path.read_bytes()
        content = parse_json(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}; give a file that can be read") from None
    except (EOFError, zlib.error, ValueError) as error:
        raise ProfileError(f"{path}: not a whole JSON file ({error}); record it again") from None
    if not isinstance(content, dict) or not isinstance(content.get("traceEvents"), list):
        raise ProfileError(f"{path}: has no traceEvents; give a trace that torch.profiler exported")
    return parse_kineto(content)


def parse_kineto(content: dict[str, Any]) -> RankTrace:
    """Read the parsed JSON of a trace."""
    about = content.get("distributedInfo") or {}
    events: list[Event] = content["traceEvents"]
    groups = {
        str(entry["pg_name"]): TracedGroup(
            str(entry["pg_name"]),
            tuple(whole_list(entry.get("ranks")) or ()),
            str(entry.get("pg_desc", "")),
        )
        for entry in about.get("pg_config") or []
    }
    rank = int(about.get("rank", 0))
    spans = complete(events)
    kernels = [event for event in spans if event.get("cat") in _GPU_WORK]
    on_gpu = bool(kernels)
    calls = [event for event in spans if _is_call(event, on_gpu)]
    swept = sweep(events, calls)
    trace = RankTrace(
        rank=rank,
        backend=str(about.get("backend", "")),
        on_gpu=on_gpu,
        groups=groups,
        parts=swept.parts,
        steps=swept.steps,
        waits=[] if on_gpu else swept.waits,
        base_ns=int(content.get("baseTimeNanoseconds", 0)),
    )
    reader = _Reader(rank, groups, swept)
    if on_gpu:
        trace.collectives = reader.of_nccl(kernels, calls)
        trace.kernels = [span(event) for event in kernels if not _is_nccl(event)]
    else:
        trace.collectives = reader.of_gloo(calls, spans)
        trace.host_work = _host_work(spans, swept)
    trace.collectives.sort(key=lambda one: one.start_us)
    return trace


def _is_call(event: Event, on_gpu: bool) -> bool:
    """Whether it marks the call of a collective on the host."""
    if event.get("cat") != "cpu_op":
        return False
    if on_gpu:
        return bool(event["name"] == _HOST_CALL)
    name: str = event["name"]
    return name.startswith("c10d::") and operation_of(name) is not Operation.OTHER


def _is_nccl(event: Event) -> bool:
    return event["name"].startswith(("ncclDevKernel", "ncclKernel", "ncclSymDevKernel"))


def _host_work(spans: list[Event], swept: Swept) -> list[Any]:
    """Outermost operations of the training thread that do not communicate."""
    work, end = [], float("-inf")
    mine = [e for e in spans if e.get("cat") == "cpu_op" and e["tid"] == swept.thread]
    for event in sorted(mine, key=lambda one: (one["ts"], -one["dur"])):
        name: str = event["name"]
        if name.startswith("autograd::engine") or event["ts"] < end:
            continue
        if name.startswith("c10d::"):
            continue
        end = event["ts"] + event["dur"]
        work.append(span(event))
    return work


class _Reader:
    """Builds collectives from events.

    Args:
        rank: Rank of the trace.
        groups: Its process groups.
        swept: The surroundings of its calls.
    """

    def __init__(self, rank: int, groups: dict[str, TracedGroup], swept: Swept) -> None:
        self._rank, self._groups, self._swept = rank, groups, swept

    def of_nccl(self, kernels: list[Event], calls: list[Event]) -> list[Collective]:
        """Build collectives from NCCL's kernels and the calls that started them."""
        by_id = {
            call["args"]["External id"]: call
            for call in calls
            if call.get("args", {}).get("External id") is not None
        }
        return [self._nccl(event, by_id) for event in kernels if _is_nccl(event)]

    def _nccl(self, kernel: Event, by_id: dict[Any, Event]) -> Collective:
        own = kernel.get("args", {})
        call = by_id.get(own.get("External id"))
        args = {**(call.get("args", {}) if call is not None else {}), **own}
        around = self._around(call)
        named = str(args.get("Collective name") or "")
        operation = operation_of(named)
        if operation is Operation.OTHER:
            operation = _operation_of_kernel(kernel["name"])
        name = str(args.get("Process Group Name", "") or (around.call.group if around.call else ""))
        group = self._groups.get(name)
        ranks = whole_list(args.get("Process Group Ranks"))
        sizes = sizes_of_nccl(args, operation)
        sequence = around.call.number if around.call else args.get("Seq")
        return Collective(
            operation=operation,
            group=name,
            group_ranks=tuple(ranks) if ranks else (group.ranks if group else ()),
            group_size=int(args.get("Group size") or (len(group.ranks) if group else 0)),
            sequence=int(sequence) if isinstance(sequence, int) else None,
            stream=str(own.get("stream", kernel["tid"])),
            **self._shared(around, sizes, kernel),
        )

    def of_gloo(self, calls: list[Event], spans: list[Event]) -> list[Collective]:
        """Build collectives from calls on the training thread and gloo's transfers."""
        transfers: dict[tuple[Operation, str], deque[Event]] = defaultdict(deque)
        found = [event for event in spans if event["name"].startswith("gloo:")]
        for event in sorted(found, key=lambda one: one["ts"]):
            transfers[_gloo_kind(event), _shape(event)].append(event)
        collectives = []
        for call in sorted(calls, key=lambda one: one["ts"]):
            collective = self._gloo(call, transfers)
            # A group of one rank has nothing to send.
            if collective.group_size != 1:
                collectives.append(collective)
        return collectives

    def _gloo(
        self, call: Event, transfers: dict[tuple[Operation, str], deque[Event]]
    ) -> Collective:
        operation = operation_of(call["name"])
        around = self._around(call)
        name = around.call.group if around.call else ""
        group = self._groups.get(name)
        ranks = group.ranks if group else ()
        args = call.get("args", {})
        transfer = _take(transfers, operation, args, call["ts"])
        # A list of tensors shows its type only there.
        types = (transfer or {}).get("args", {}).get("Input type") or [""]
        sizes = sizes_of_cpu(args, operation, len(ranks), str(types[0]))
        timed = transfer if transfer is not None else call
        return Collective(
            operation=operation,
            group=name,
            group_ranks=ranks,
            group_size=len(ranks),
            sequence=around.call.number if around.call else None,
            stream=str(timed["tid"]),
            **self._shared(around, sizes, timed),
        )

    def _shared(self, around: Around, sizes: Sizes, timed: Event) -> dict[str, Any]:
        """What NCCL's and gloo's collectives say alike."""
        return {
            "rank": self._rank,
            **vars(sizes),
            "pair": around.call.pair if around.call else None,
            "start_us": float(timed["ts"]),
            "end_us": float(timed["ts"] + timed["dur"]),
            "source": "kineto",
            "scopes": around.scopes,
        }

    def _around(self, call: Event | None) -> Around:
        if call is None:
            return Around()
        return self._swept.around.get(key(call), Around())


def _take(
    transfers: dict[tuple[Operation, str], deque[Event]],
    operation: Operation,
    args: dict[str, Any],
    called: float,
) -> Event | None:
    """The transfer of a call: the first unused one of its kind and shape."""
    kind = Operation.ALL_REDUCE if operation is Operation.REDUCE_SCATTER else operation
    for shape in _shapes(args):
        waiting = transfers.get((kind, shape))
        # Transfers of calls before the recording began stay over.
        while waiting and waiting[0]["ts"] < called:
            waiting.popleft()
        if waiting:
            return waiting.popleft()
    return None


def _shapes(args: dict[str, Any]) -> list[str]:
    """Shapes under which gloo may show a call: its inputs, its outputs, none (a barrier)."""
    shapes = []
    for dims in args.get("Input Dims", []):
        if dims:
            shapes.append(str(dims[0] if isinstance(dims[0], list) else dims))
    return [*reversed(shapes), "", "[]"]


def _shape(event: Event) -> str:
    dims = event.get("args", {}).get("Input Dims") or [""]
    return str(dims[0])


def _gloo_kind(event: Event) -> Operation:
    return operation_of(event["name"])


def _operation_of_kernel(name: str) -> Operation:
    """The operation in `ncclDevKernel_AllReduce_Sum_bf16_RING_LL(...)`, if nothing else has it."""
    for part, operation in (
        ("AllReduce", Operation.ALL_REDUCE),
        ("AllGather", Operation.ALL_GATHER),
        ("ReduceScatter", Operation.REDUCE_SCATTER),
        ("Broadcast", Operation.BROADCAST),
        ("Reduce", Operation.REDUCE),
    ):
        if part in name:
            return operation
    return Operation.OTHER
