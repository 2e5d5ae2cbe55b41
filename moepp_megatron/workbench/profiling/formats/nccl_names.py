"""NCCL's names of functions, and the buffer that its counts describe.

Sources: NVIDIA/nccl 2.30.7, src/collectives.cc (ncclFuncToString), and
plugins/profiler/inspector/inspector.cc (which says All2All where NCCL says AlltoAll).
"""

from __future__ import annotations

from moepp_megatron.workbench.profiling.collective import Operation

_OPERATIONS = {
    "AllGather": Operation.ALL_GATHER,
    "AllGatherV": Operation.ALL_GATHER,
    "AllReduce": Operation.ALL_REDUCE,
    "AlltoAll": Operation.ALL_TO_ALL,
    "All2All": Operation.ALL_TO_ALL,
    "Broadcast": Operation.BROADCAST,
    "Gather": Operation.GATHER,
    "Recv": Operation.RECEIVE,
    "Reduce": Operation.REDUCE,
    "ReduceScatter": Operation.REDUCE_SCATTER,
    "Scatter": Operation.SCATTER,
    "Send": Operation.SEND,
}

POINT_TO_POINT = frozenset({Operation.SEND, Operation.RECEIVE})

# Their count is that of one rank's part; the larger buffer holds a part for each rank.
_COUNTS_A_PART = frozenset(
    {
        Operation.ALL_GATHER,
        Operation.REDUCE_SCATTER,
        Operation.ALL_TO_ALL,
        Operation.GATHER,
        Operation.SCATTER,
    }
)


def operation_of(function: str) -> Operation:
    """The operation of an NCCL function's name; OTHER for one that is not known."""
    return _OPERATIONS.get(function, Operation.OTHER)


def buffer_size(operation: Operation, size: int, ranks: int) -> int | None:
    """Bytes of the larger buffer of a rank, from the bytes of NCCL's count.

    Args:
        operation: What the collective does.
        size: Count times bytes of the data type, as NCCL reports them to profilers.
        ranks: Ranks in the group; 0 where unknown.

    Returns:
        Bytes; None where the number of ranks is needed and unknown.
    """
    if operation not in _COUNTS_A_PART:
        return size
    return size * ranks if ranks > 0 else None
