"""Names, data types, sizes and splits of c10d's operations, as torch writes them.

There are two forms: NCCL's `record_param_comms` and kernels carry `In msg nelems`, `dtype`, `In
split size` (torch/csrc/distributed/c10d/ParamCommsUtils.hpp, torch/csrc/profiler/util.cpp); an
operation of c10d on a CPU carries the shapes of its tensors (`record_shapes`).
"""

import math
from dataclasses import dataclass
from typing import Any

from moepp_megatron.tools.profiling.formats.records import (
    LARGEST,
    MOST_RANKS,
    optional,
    whole_list,
)
from moepp_megatron.tools.profiling.trace import Operation

# c10::ScalarType in NCCL's events, C++ type names in those of the CPU.
_BYTES = {
    "float": 4,
    "double": 8,
    "half": 2,
    "c10::half": 2,
    "bfloat16": 2,
    "c10::bfloat16": 2,
    "long": 8,
    "long int": 8,
    "int": 4,
    "short": 2,
    "short int": 2,
    "byte": 1,
    "char": 1,
    "unsigned char": 1,
    "signed char": 1,
    "bool": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "complexfloat": 8,
    "complexdouble": 16,
}

# By the beginning of a name; the first that fits.
_NAMES = {
    "all_to_all": Operation.ALL_TO_ALL,
    "alltoall": Operation.ALL_TO_ALL,
    "reduce_scatter": Operation.REDUCE_SCATTER,
    "all_reduce_barrier": Operation.BARRIER,
    "all_reduce": Operation.ALL_REDUCE,
    "allreduce": Operation.ALL_REDUCE,
    "all_gather": Operation.ALL_GATHER,
    "allgather": Operation.ALL_GATHER,
    "broadcast": Operation.BROADCAST,
    "barrier": Operation.BARRIER,
    "reduce": Operation.REDUCE,
    "gather": Operation.GATHER,
    "scatter": Operation.SCATTER,
    "send": Operation.SEND,
    "recv": Operation.RECEIVE,
}


def operation_of(name: str) -> Operation:
    """Return the operation that c10d calls `allreduce_`, `_allgather_base_`, `gloo:send`, ..."""
    plain = name.lower().split("::")[-1].split(":")[-1].lstrip("_")
    operations = (operation for start, operation in _NAMES.items() if plain.startswith(start))
    return next(operations, Operation.OTHER)


def _bytes_of_type(name: str) -> int | None:
    """Bytes of an element; None for a type that is not known."""
    plain = name.lower()
    return 1 if plain.removeprefix("c10::").startswith("float8") else _BYTES.get(plain)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a call on one rank, with the fields of `Collective`."""

    size: int | None = None
    sent: tuple[int, ...] | None = None
    received: tuple[int, ...] | None = None
    row_bytes: int | None = None


def sizes_of_nccl(args: dict[str, Any], operation: Operation) -> Sizes:
    """Read the arguments of `record_param_comms` or of an NCCL kernel."""
    width = _bytes_of_type(str(args.get("dtype", "")))
    given, returned = (optional(args, f"{side} msg nelems", int) for side in ("In", "Out"))
    if width is None or given is None or returned is None:
        return Sizes()
    if operation is not Operation.ALL_TO_ALL:
        return Sizes(max(given, returned) * width)
    splits = [whole_list(args.get(f"{side} split size")) for side in ("In", "Out")]
    ranks = optional(args, "Group size", int) or 0
    return _split([given * width, returned * width], splits, ranks)


def sizes_of_cpu(args: dict[str, Any], operation: Operation, ranks: int, dtype: str = "") -> Sizes:
    """Compute sizes from the shapes of an operation of c10d among `ranks` ranks, 0 where unknown.

    `dtype` is the type of its tensors if the event does not have it, as for lists of tensors.
    """
    if operation is Operation.BARRIER:
        return Sizes(0)
    types = [str(kind) for kind in optional(args, "Input type", list) or []]
    width = _bytes_of_type(next((kind for kind in types if _bytes_of_type(kind)), dtype))
    totals = [(width or 0) * count for count in _elements(optional(args, "Input Dims", list) or [])]
    if width is None or not totals or max(totals) > LARGEST:
        return Sizes()
    if operation is not Operation.ALL_TO_ALL or len(totals) < 2:
        return Sizes(max(totals))
    texts = optional(args, "Concrete Inputs", list) or []
    lists = [whole_list(text) for text in texts if str(text).startswith("[")]
    # c10d::alltoall_base_(output, input, group, output splits, input splits, ...).
    returned_split, given_split = [*lists, None, None][:2]
    return _split([totals[1], totals[0]], [given_split, returned_split], ranks)


def _elements(dims: list[Any]) -> list[int]:
    """Elements of each argument that is a tensor or a list of tensors."""
    counts = []
    for shape in dims:
        if isinstance(shape, list) and shape:
            sizes = [whole_list(one) for one in (shape if isinstance(shape[0], list) else [shape])]
            counts.append(sum(math.prod(size) for size in sizes if size is not None))
    return counts


def _split(totals: list[int], splits: list[list[int] | None], ranks: int) -> Sizes:
    """Sizes of an all-to-all, from totals and splits of input and output. Empty splits are even."""
    parts: list[tuple[int, ...] | None] = []
    row = None
    for total, rows in zip(totals, splits, strict=True):
        if rows is None or (not rows and not 0 < ranks <= MOST_RANKS):
            parts.append(None)
        elif not rows:
            parts.append((total // ranks,) * ranks)
        elif sum(rows) == 0:
            parts.append((0,) * len(rows))
        else:
            row = total // sum(rows)
            parts.append(tuple(count * row for count in rows))
    return Sizes(max(totals), parts[0], parts[1], row)
