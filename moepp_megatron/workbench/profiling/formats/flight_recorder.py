"""Reads dumps of torch's flight recorder.

Written by torch (c10d/FlightRecorderDetail.hpp, versions 2.x), as JSON or as a pickle; a run of
this package writes both into `hangs/` (training/resilience/flight_recorder.py). Every collective
that a rank enqueued is there, with sizes and order. How long it took is only there for NCCL with
TORCH_NCCL_ENABLE_TIMING=1; when it ran never is: the watchdog looks every tenth of a second. The
times that are given are those at which the host enqueued the calls.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moepp_megatron.config.json_file import parse_json
from moepp_megatron.workbench.profiling.collective import Collective, Operation
from moepp_megatron.workbench.profiling.formats.kineto_sizes import bytes_of_type, operation_of
from moepp_megatron.workbench.profiling.formats.records import SourceError, field, read_bytes

SOURCE = "flight_recorder"
_MAJOR_VERSION = "2"
_PICKLE = b"\x80"
_RANK = re.compile(r"(\d+)(\.json|\.pkl|\.pickle)?(\.gz)?$")
_PEER = re.compile(r"(?:send|recv) (\d+)(->|<-)(\d+|\?)")


class _DataUnpickler(pickle.Unpickler):
    """Reads plain values only: a dump needs no class, and a class could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise SourceError(f"asks for {module}.{name}, which no flight record contains")


def _load_dump(path: Path) -> dict[str, Any]:
    """A rank's dump, JSON or pickle, without running anything that a pickle may hold.

    Raises:
        SourceError: If it is neither, or of another version.
    """
    content = read_bytes(path)
    try:
        if content.startswith(_PICKLE):
            dump = _DataUnpickler(io.BytesIO(content)).load()
        else:
            dump = parse_json(content)
    except Exception as error:  # whatever damaged bytes make an unpickler do
        raise SourceError(f"{path}: no flight record ({error})") from error
    version = field(dump, "version", str, str(path))
    if version.partition(".")[0] != _MAJOR_VERSION:
        raise SourceError(f"{path}: flight record of version {version}; supported: 2.x")
    return dump


def read_flight_record(path: Path) -> list[Collective]:
    """Reads one rank's dump, whose name ends with the rank (`trace_rank_3`).

    Args:
        path: The file.

    Returns:
        Collectives in the order in which they were enqueued. One without `duration_ms` has a
        duration of 0.

    Raises:
        SourceError: The file is damaged, lacks a field, or does not name its rank.
    """
    found = _RANK.search(path.name)
    if found is None:
        raise SourceError(
            f"{path}: the name of a flight record must end with its rank, such as trace_rank_3"
        )
    dump = _load_dump(path)
    groups = _groups(dump, str(path))
    entries = field(dump, "entries", list, str(path))
    return [
        _collective(entry, int(found[1]), groups, f"{path}, entry {number}")
        for number, entry in enumerate(entries)
    ]


def _groups(dump: dict[str, Any], place: str) -> dict[str, tuple[int, ...]]:
    """Global ranks by name of the group; gloo's dumps have the default group without a name."""
    configured = field(dump, "pg_config", dict, place)
    groups = {}
    for name in configured:
        ranks = field(configured[name], "ranks", str, f"{place}, pg_config {name!r}")
        groups[name] = tuple(int(rank) for rank in re.findall(r"\d+", ranks))
    return groups


def _collective(
    entry: dict[str, Any], rank: int, groups: dict[str, tuple[int, ...]], place: str
) -> Collective:
    name = field(entry, "profiling_name", str, place).rpartition(":")[2]
    operation = operation_of(name.partition(" ")[0])
    named = entry.get("process_group")
    if not isinstance(named, list | tuple) or len(named) < 2:
        raise SourceError(f"{place}: field 'process_group' is not a name and a description")
    group, description = str(named[0]), str(named[1])
    ranks = groups.get(group, groups.get("", ()) if description == "default_pg" else ())
    start = field(entry, "time_created_ns", int, place) / 1e3
    took = field(entry, "duration_ms", float, place, 0.0) * 1e3
    size, dtype = _size(entry, place)
    pair = _pair(name)
    sent, received = _parts(operation, pair, size, len(ranks))
    point_to_point = operation in (Operation.SEND, Operation.RECEIVE)
    sequence = field(entry, "collective_seq_id", int, place)
    return Collective(
        operation=operation,
        rank=rank,
        group=group,
        description="" if description == "undefined" else description,
        group_ranks=ranks,
        group_size=len(ranks),
        size=size,
        dtype=dtype,
        sent=sent,
        received=received,
        sequence=None if point_to_point else sequence,
        start_us=start,
        end_us=start + took,
        pair=pair,
        placed=False,
        source=SOURCE,
    )


def _size(entry: dict[str, Any], place: str) -> tuple[int | None, str]:
    """Bytes of the larger of inputs and outputs, and their data type."""
    totals = []
    names: list[str] = []
    for side in ("input", "output"):
        shapes: Sequence[Any] = field(entry, f"{side}_sizes", list, place)
        dtypes = field(entry, f"{side}_dtypes", list, place)
        names += dtypes
        if not dtypes:
            continue
        # One type for all tensors, or one for each.
        each = dtypes if len(dtypes) == len(shapes) else [dtypes[0]] * len(shapes)
        widths = [bytes_of_type(str(dtype)) for dtype in each]
        if any(width is None for width in widths):
            return None, names[0]
        pairs = zip(shapes, widths, strict=True)
        totals.append(sum(math.prod(shape) * (width or 0) for shape, width in pairs))
    return (max(totals) if totals else None), (names[0] if names else "")


def _pair(name: str) -> tuple[int, int] | None:
    """Ranks of the group that a send or receive goes from and to; None where not said."""
    found = _PEER.match(name)
    if found is None or found[3] == "?":
        return None
    own, other = int(found[1]), int(found[3])
    return (own, other) if found[2] == "->" else (other, own)


def _parts(
    operation: Operation, pair: tuple[int, int] | None, size: int | None, ranks: int
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Bytes to and from each rank for a send or receive with a known peer; None otherwise."""
    if pair is None or size is None or max(pair) >= ranks:
        return None, None
    sends = operation is Operation.SEND
    peer = pair[1] if sends else pair[0]
    parts = tuple(size if rank == peer else 0 for rank in range(ranks))
    return (parts, None) if sends else (None, parts)
