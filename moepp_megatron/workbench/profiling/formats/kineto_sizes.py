"""Reads sizes, data types and splits in the forms of torch's profiler.

There are two forms: NCCL's `record_param_comms` and kernels carry `In msg nelems`, `dtype`, `In
split size` (torch/csrc/distributed/c10d/ParamCommsUtils.hpp, torch/csrc/profiler/util.cpp); an
operation of c10d on a CPU carries the shapes of its tensors (`record_shapes`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moepp_megatron.config.json_file import parse_json
from moepp_megatron.workbench.profiling.collective import Operation

# c10::ScalarType in NCCL's events and flight records, C++ type names in those of the CPU.
_BYTES = {
    "float": 4, "double": 8, "half": 2, "c10::half": 2, "bfloat16": 2, "c10::bfloat16": 2,
    "long": 8, "long int": 8, "int": 4, "short": 2, "short int": 2, "byte": 1, "char": 1,
    "unsigned char": 1, "signed char": 1, "bool": 1, "uint16": 2, "uint32": 4, "uint64": 8,
    "complexfloat": 8, "complexdouble": 16,
}  # fmt: skip

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
    """Operation of a name of c10d: `allreduce_`, `_allgather_base_`, `all_to_allv`, `gloo:send`.

    Those of flight records too (torch/distributed/flight_recorder/components/types.py, COLLECTIVES
    and P2P).
    """
    plain = name.lower().split("::")[-1].split(":")[-1].lstrip("_")
    for start, operation in _NAMES.items():
        if plain.startswith(start):
            return operation
    return Operation.OTHER


def bytes_of_type(name: str) -> int | None:
    """Bytes of an element; None for a type that is not known."""
    plain = name.lower()
    return 1 if plain.removeprefix("c10::").startswith("float8") else _BYTES.get(plain)


def whole_list(text: Any) -> list[int] | None:
    """Numbers of "[1, 2]"; None if it is not a list, or is cut short: "[1, 2, ...]"."""
    if isinstance(text, list):
        return [int(item) for item in text] if "..." not in text else None
    if not isinstance(text, str) or "..." in text:
        return None
    try:
        found = parse_json(text)
    except ValueError:
        return None
    return [int(item) for item in found] if isinstance(found, list) else None


@dataclass(frozen=True)
class Sizes:
    """Bytes of a call on one rank, with the fields of `Collective`."""

    size: int | None = None
    dtype: str = ""
    sent: tuple[int, ...] | None = None
    received: tuple[int, ...] | None = None
    row_bytes: int | None = None


def sizes_of_nccl(args: dict[str, Any], operation: Operation) -> Sizes:
    """Read the arguments of `record_param_comms` or of an NCCL kernel."""
    dtype = str(args.get("dtype", ""))
    width = bytes_of_type(dtype)
    given, returned = args.get("In msg nelems"), args.get("Out msg nelems")
    if width is None or not isinstance(given, int) or not isinstance(returned, int):
        return Sizes(dtype=dtype)
    size = max(given, returned) * width
    if operation is not Operation.ALL_TO_ALL:
        return Sizes(size, dtype)
    ranks = int(args.get("Group size") or 0)
    return _split(
        (given * width, returned * width),
        (whole_list(args.get("In split size")), whole_list(args.get("Out split size"))),
        dtype,
        ranks,
    )


def sizes_of_cpu(args: dict[str, Any], operation: Operation, ranks: int, dtype: str = "") -> Sizes:
    """Compute sizes from the shapes of an operation of c10d.

    Args:
        args: Arguments of its event.
        operation: Its operation.
        ranks: Ranks in its group, 0 where unknown.
        dtype: Type of its tensors if the event does not have it, as for lists of tensors.
    """
    if operation is Operation.BARRIER:
        return Sizes(0)
    tensors = _tensors(args.get("Input Dims", []))
    dtype = next((kind for kind in args.get("Input type", []) if bytes_of_type(kind)), dtype)
    width = bytes_of_type(dtype)
    if width is None:
        return Sizes(dtype="")
    totals = [sum(math.prod(shape) for shape in shapes) * width for shapes in tensors]
    if not totals:
        return Sizes(dtype=dtype)
    if operation is not Operation.ALL_TO_ALL or len(totals) < 2:
        return Sizes(max(totals), dtype)
    concrete = [whole_list(text) for text in args.get("Concrete Inputs", [])]
    lists = [
        found
        for text, found in zip(args.get("Concrete Inputs", []), concrete, strict=True)
        if isinstance(text, (str, list)) and str(text).startswith("[")
    ]
    # c10d::alltoall_base_(output, input, group, output splits, input splits, ...).
    returned_split, given_split = (lists + [None, None])[:2]
    return _split((totals[1], totals[0]), (given_split, returned_split), dtype, ranks)


def _tensors(dims: list[Any]) -> list[list[list[int]]]:
    """Shapes of each argument that is a tensor or a list of tensors."""
    found = []
    for shape in dims:
        if not shape:
            continue
        found.append(shape if isinstance(shape[0], list) else [shape])
    return found


def _split(
    totals: tuple[int, int],
    splits: tuple[list[int] | None, list[int] | None],
    dtype: str,
    ranks: int,
) -> Sizes:
    """Sizes of an all-to-all, from totals and splits of input and output. Empty splits are even."""
    parts: list[tuple[int, ...] | None] = []
    row = None
    for total, rows in zip(totals, splits, strict=True):
        if rows is None:
            parts.append(None)
        elif not rows:
            parts.append((total // ranks,) * ranks if ranks else None)
        elif sum(rows) == 0:
            parts.append((0,) * len(rows))
        else:
            row = total // sum(rows)
            parts.append(tuple(count * row for count in rows))
    return Sizes(max(totals), dtype, parts[0], parts[1], row)
