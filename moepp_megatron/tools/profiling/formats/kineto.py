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

from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from moepp_megatron.tools.profiling.formats.c10d import (
    Sizes,
    operation_of,
    sizes_of_cpu,
    sizes_of_nccl,
)
from moepp_megatron.tools.profiling.formats.kineto_events import (
    Around,
    Swept,
    TraceEvent,
    read_events,
    sweep,
)
from moepp_megatron.tools.profiling.formats.records import (
    field,
    optional,
    read_document,
    whole_list,
)
from moepp_megatron.tools.profiling.trace import (
    Collective,
    Operation,
    ProfileError,
    RankTrace,
    TracedGroup,
)

_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST_CALL = "record_param_comms"
# By what `ncclDevKernel_AllReduce_Sum_bf16_RING_LL(...)` contains; the first that fits.
_KERNELS = {
    "AllReduce": Operation.ALL_REDUCE,
    "AllGather": Operation.ALL_GATHER,
    "ReduceScatter": Operation.REDUCE_SCATTER,
    "Broadcast": Operation.BROADCAST,
    "Reduce": Operation.REDUCE,
}


def read_kineto(path: Path) -> RankTrace:
    """Read a `.pt.trace.json` or `.pt.trace.json.gz` file; ProfileError if damaged or none."""
    content = read_document(path)
    if not isinstance(content, dict) or not isinstance(content.get("traceEvents"), list):
        raise ProfileError(f"{path}: has no traceEvents; give a trace that torch.profiler exported")
    return _parse_kineto(content, str(path))


def _parse_kineto(content: dict[str, Any], place: str = "trace") -> RankTrace:
    """Read the parsed JSON of a trace; `place` names it in errors."""
    about = field(content, "distributedInfo", dict, place, {})
    where = f"{place}, distributedInfo"
    groups = {}
    for entry in field(about, "pg_config", list, where, []):
        name = field(entry, "pg_name", str, where)
        ranks = tuple(whole_list(entry.get("ranks")) or ())
        groups[name] = TracedGroup(name, ranks, field(entry, "pg_desc", str, where, ""))
    rank = field(about, "rank", int, where, 0, least=0)
    spans, links = read_events(content["traceEvents"], place)
    kernels = [event for event in spans if event.category in _GPU_WORK]
    on_gpu = bool(kernels)
    calls = [event for event in spans if _is_call(event, on_gpu)]
    swept = sweep(spans, links, calls)
    trace = RankTrace(
        rank=rank,
        backend=field(about, "backend", str, where, ""),
        on_gpu=on_gpu,
        groups=groups,
        steps=swept.steps,
        waits=[] if on_gpu else swept.waits,
        base_ns=field(content, "baseTimeNanoseconds", int, place, 0),
    )
    reader = _Reader(rank, groups, swept)
    if on_gpu:
        trace.collectives = reader.of_nccl(kernels, calls)
        trace.kernels = [event.span for event in kernels if not _is_nccl(event)]
    else:
        trace.collectives = reader.of_gloo(calls, spans)
    trace.collectives.sort(key=lambda call: call.start_us)
    return trace


def _is_call(event: TraceEvent, on_gpu: bool) -> bool:
    """True if it marks the call of a collective on the host."""
    if event.category != "cpu_op":
        return False
    if on_gpu:
        return event.name == _HOST_CALL
    return event.name.startswith("c10d::") and operation_of(event.name) is not Operation.OTHER


def _is_nccl(event: TraceEvent) -> bool:
    return event.name.startswith(("ncclDevKernel", "ncclKernel", "ncclSymDevKernel"))


class _Reader:
    """Builds collectives of a rank from events, its groups and the surroundings of its calls."""

    def __init__(self, rank: int, groups: dict[str, TracedGroup], swept: Swept) -> None:
        self._rank, self._groups, self._swept = rank, groups, swept

    def of_nccl(self, kernels: list[TraceEvent], calls: list[TraceEvent]) -> list[Collective]:
        """Collectives of NCCL's kernels and the calls that started them."""
        by_id = {}
        for call in calls:
            if (number := optional(call.args, "External id", int)) is not None:
                by_id[number] = call
        return [self._nccl(event, by_id) for event in kernels if _is_nccl(event)]

    def _nccl(self, kernel: TraceEvent, by_id: dict[int, TraceEvent]) -> Collective:
        call = by_id.get(optional(kernel.args, "External id", int) or -1)
        args = {**(call.args if call is not None else {}), **kernel.args}
        around = self._around(call)
        operation = operation_of(str(args.get("Collective name") or ""))
        if operation is Operation.OTHER:
            fitting = (found for part, found in _KERNELS.items() if part in kernel.name)
            operation = next(fitting, Operation.OTHER)
        name = optional(args, "Process Group Name", str)
        name = name or (around.call.group if around.call else "")
        known = self._groups[name].ranks if name in self._groups else ()
        ranks = tuple(whole_list(args.get("Process Group Ranks")) or known)
        return Collective(
            operation=operation,
            group=name,
            group_ranks=ranks,
            group_size=optional(args, "Group size", int) or len(known),
            sequence=around.call.number if around.call else optional(args, "Seq", int),
            **self._shared(around, sizes_of_nccl(args, operation), kernel),
        )

    def of_gloo(self, calls: list[TraceEvent], spans: list[TraceEvent]) -> list[Collective]:
        """Collectives of calls on the training thread and gloo's transfers."""
        transfers: dict[tuple[Operation, str], deque[TraceEvent]] = defaultdict(deque)
        gloo_spans = [event for event in spans if event.name.startswith("gloo:")]
        for event in sorted(gloo_spans, key=lambda one: one.start):
            dims = optional(event.args, "Input Dims", list) or [""]
            transfers[operation_of(event.name), str(dims[0])].append(event)
        collectives = [
            self._gloo(call, transfers) for call in sorted(calls, key=lambda one: one.start)
        ]
        # A group of one rank has nothing to send.
        return [one for one in collectives if one.group_size != 1]

    def _gloo(
        self, call: TraceEvent, transfers: dict[tuple[Operation, str], deque[TraceEvent]]
    ) -> Collective:
        operation = operation_of(call.name)
        around = self._around(call)
        name = around.call.group if around.call else ""
        ranks = self._groups[name].ranks if name in self._groups else ()
        transfer = _take(transfers, operation, call)
        # A list of tensors shows its type only there.
        types = [""] if transfer is None else optional(transfer.args, "Input type", list) or [""]
        return Collective(
            operation=operation,
            group=name,
            group_ranks=ranks,
            group_size=len(ranks),
            sequence=around.call.number if around.call else None,
            **self._shared(
                around,
                sizes_of_cpu(call.args, operation, len(ranks), str(types[0])),
                transfer or call,
            ),
        )

    def _shared(self, around: Around, sizes: Sizes, timed: TraceEvent) -> dict[str, Any]:
        """Return fields common to NCCL and gloo."""
        return {
            "rank": self._rank,
            **vars(sizes),
            "pair": around.call.pair if around.call else None,
            "start_us": timed.start,
            "end_us": timed.end,
            "scopes": around.scopes,
        }

    def _around(self, call: TraceEvent | None) -> Around:
        return Around() if call is None else self._swept.around.get(call.key, Around())


def _take(
    transfers: dict[tuple[Operation, str], deque[TraceEvent]],
    operation: Operation,
    call: TraceEvent,
) -> TraceEvent | None:
    """The transfer of a call: the first unused one of its kind and shape."""
    kind = Operation.ALL_REDUCE if operation is Operation.REDUCE_SCATTER else operation
    given = [dims for dims in optional(call.args, "Input Dims", list) or [] if dims]
    firsts = [dims[0] if isinstance(dims, list) else "" for dims in given]
    shapes = [
        str(first if isinstance(first, list) else dims)
        for first, dims in zip(firsts, given, strict=True)
    ]
    # gloo may show the outputs, the inputs, or none (a barrier).
    for shape in [*reversed(shapes), "", "[]"]:
        waiting = transfers.get((kind, shape))
        # Transfers of calls before the recording began stay over.
        while waiting and waiting[0].start < call.start:
            waiting.popleft()
        if waiting:
            return waiting.popleft()
    return None
